"""A run from the command line: flags, a YAML file of the same names, data from JSONL, parquet or a dataset on disk."""

import contextlib
import dataclasses
import difflib
import importlib.util
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
import yaml
from transformers import BitsAndBytesConfig, HfArgumentParser

from ..extras import needs
from ..losses.config import LOSS_TYPES
from .config import NOT_OURS, GRPOConfig, option
from .rewards import load_reward


@dataclass
class RunArguments:
    """What a run is made of, beside the options in `GRPOConfig`."""

    config: str | None = option(None, "YAML file that sets options by these names; flags win.")
    model: str | None = option(None, "Path or name of a causal LM with its tokenizer; without it and data the demo runs.")
    data: str | None = option(
        None, "Rows with a prompt, text or messages: a JSONL or parquet file, or a folder of datasets' save_to_disk."
    )
    eval_data: str | None = option(None, "Likewise, to evaluate on.")
    reward: list[str] | None = option(
        None, "Each package.module:function, found from the working directory, or the folder of a reward model."
    )
    dry_run: bool = option(False, "Check everything, print the plan of the run, train nothing.")
    use_peft: bool = option(False, "Train LoRA adapters instead of the model's weights.")
    lora_r: int = option(16, "Rank of the adapters.")
    lora_alpha: int = option(32, "The adapters' scale times their rank.")
    lora_dropout: float = option(0.0, "Dropout in front of the adapters; 0 if the head has one.")
    lora_target_modules: list[str] | None = option(
        None, "Layers with an adapter, lm_head if named; None is PEFT's choice, all-linear all."
    )
    load_in_4bit: bool = option(False, "QLoRA: the frozen weights in 4 bits (nf4); needs bitsandbytes.")
    load_in_8bit: bool = option(False, "The frozen weights in 8 bits; needs bitsandbytes.")

    def peft_config(self):
        """Of the adapters, or None."""
        if not self.use_peft:
            defaults = {f.name: f.default for f in dataclasses.fields(self) if f.name.startswith("lora_")}
            if changed := [name for name, default in defaults.items() if getattr(self, name) != default]:
                raise ValueError(f"--{changed[0]} needs --use_peft")
            return None
        with needs("train", "--use_peft"):
            from peft import LoraConfig
        target = self.lora_target_modules
        return LoraConfig(
            task_type="CAUSAL_LM", r=self.lora_r, lora_alpha=self.lora_alpha, lora_dropout=self.lora_dropout,
            target_modules=target[0] if target == ["all-linear"] else target,
        )  # fmt: skip

    def quantization_config(self, dtype):
        """Of the frozen weights, or None; ``dtype`` is what is computed in."""
        if not (self.load_in_4bit or self.load_in_8bit):
            return None
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("--load_in_4bit and --load_in_8bit exclude each other, got both")
        if not self.use_peft:
            raise ValueError("--load_in_4bit and --load_in_8bit need --use_peft: rounded weights are not trained")
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError("--load_in_4bit and --load_in_8bit need bitsandbytes; pip install bitsandbytes")
        return BitsAndBytesConfig(load_in_4bit=self.load_in_4bit, load_in_8bit=self.load_in_8bit, bnb_4bit_quant_type="nf4",
                                  bnb_4bit_compute_dtype=dtype)  # fmt: skip

    @property
    def is_demo(self) -> bool:
        return self.model is None and self.data is None


_USAGE = """grpo-kernels train --model PATH --data FILE --reward pkg.mod:fn ... [--OPTION VALUE ...]
       grpo-kernels train --config FILE.yaml [--OPTION VALUE ...]
       grpo-kernels train [--OPTION VALUE ...]                       the built-in demo"""
_ABOUT = """Trains a causal LM on rewards with GRPO. The options are those of this command, of the loss, of transformers'
TrainingArguments and of the rollouts, in this order. A YAML file sets the same names."""
_FEW = 12  # choices that a message lists
_CLOSE = 0.75  # of difflib's ratio; --clip_eps and --logging_steps have 0.6
_LONG = 5  # letters of a name that may be part of another


class _Parser(HfArgumentParser):
    def error(self, message):
        raise ValueError(message)  # argparse would print the usage of 150 options and exit

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:  # of which argparse would list all, forty of --optim
            names = [str(getattr(choice, "value", choice)) for choice in action.choices]
            known = f"; `train --help` lists {len(names)}" if len(names) > _FEW else f", wanted {', '.join(names)}"
            raise ValueError(f"--{action.dest} has no choice {value!r}{_suggested(str(value), names) or known}")


_DEMO_ONLY = "--reward, --eval_data and --use_peft need --model and --data; the demo brings its own"


def parse(argv, demo_defaults) -> tuple[RunArguments, GRPOConfig]:
    """Defaults < those of the demo, if it is one < the YAML file < flags.

    Raises:
        ValueError: naming the option, what was wanted and what came.
    """
    parser = _Parser((RunArguments, GRPOConfig), prog="grpo-kernels train", allow_abbrev=False, usage=_USAGE, description=_ABOUT)
    given = vars(_Parser(RunArguments, allow_abbrev=False, add_help=False).parse_known_args(argv)[0])
    settings = read_yaml(given["config"]) if given["config"] else {}
    if isinstance(settings.get("reward"), str):
        settings["reward"] = [settings["reward"]]
    run = {**given, **settings, **{name: value for name, value in given.items() if value is not None}}
    if run["model"] is None and run["data"] is None and not {"-h", "--help"} & set(argv):
        if run["reward"]:  # whose module may register the loss_type: before that is judged
            raise ValueError(_DEMO_ONLY)
        parser.set_defaults(**demo_defaults)
    elif _loss_type(argv, settings) not in LOSS_TYPES:
        for spec in run["reward"] or ():
            load_reward(spec)  # whose module may register it
    parser.set_defaults(**settings)
    run, args, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    if unknown:
        known = [f"--{action.dest}" for action in parser._actions if action.dest not in NOT_OURS]
        raise ValueError(f"unknown option {unknown[0]!r}" + _suggested(unknown[0], known))
    for name in ("model", "data", "reward"):
        if not run.is_demo and not getattr(run, name):
            raise ValueError(f"--{name} is missing: a run needs --model, --data and --reward; the demo none of them")
    if run.model and "/" not in run.model and not os.path.isdir(run.model):  # a typo, more often than gpt2
        raise ValueError(f"--model {run.model!r}: no such folder, and no owner/name of a model on the hub")
    if run.is_demo and (run.eval_data or run.use_peft):
        raise ValueError(_DEMO_ONLY)
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    if (quantized := run.quantization_config(dtype)) is not None:
        if "quantization_config" in (args.model_init_kwargs or {}):
            raise ValueError("--load_in_4bit, --load_in_8bit and model_init_kwargs' quantization_config exclude each other")
        args.model_init_kwargs = {**(args.model_init_kwargs or {}), "quantization_config": quantized}
    args.output_dir = args.output_dir and os.path.normpath(args.output_dir)  # makedirs of a/../b makes a too
    return run, args


def _loss_type(argv, settings):
    """What is asked for, before it can be validated."""
    parser = _Parser(allow_abbrev=False, add_help=False, dataclass_types=())
    parser.add_argument("--loss_type", default=settings.get("loss_type", GRPOConfig.loss_type))
    return parser.parse_known_args(argv)[0].loss_type


@contextlib.contextmanager
def output_folder(path, keep):
    """Makes the folder, so that one that cannot be written is refused before anything slow.

    What was made goes again, where it is empty, if the block raises or ``keep`` is False.
    """
    if not path:
        raise ValueError(f"output_dir must be a folder, got {path!r}")
    new, kept = [folder for folder in (Path(path), *Path(path).parents) if not folder.exists()], False
    try:
        try:
            Path(path).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path).close()
        except OSError as error:
            raise ValueError(f"output_dir must be a folder that can be written, got {path!r}: {error.strerror}") from error
        yield
        kept = keep
    finally:
        with contextlib.suppress(OSError):
            for folder in () if kept else new:
                folder.rmdir()


def no_bars_in_a_file():
    """Progress bars of transformers' loading are for a terminal."""
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()


def leave_together(args):
    """The end of a run on several processes: one that is gone before the others are done would make them fail."""
    if args.world_size > 1:
        torch.distributed.barrier()
        # gloo's destructor joins threads that may be waiting for the interpreter it holds: one run in ten hung
        if args.device.type != "cpu":
            torch.distributed.destroy_process_group()


def read_yaml(path) -> dict:
    """Options by name; raises ValueError for what is not one."""
    try:
        with open(path, encoding="utf-8") as file:
            settings = yaml.safe_load(file) or {}
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path}: not YAML ({error})") from error
    if not isinstance(settings, dict):
        raise ValueError(f"--config {path}: wanted a mapping of option names to values, got {type(settings).__name__}")
    known = {f.name for cls in (RunArguments, GRPOConfig) for f in dataclasses.fields(cls) if f.init} - {"config"}
    for key in settings:
        if key not in known:
            raise ValueError(f"--config {path}: unknown key {str(key)!r}" + _suggested(str(key), sorted(known)))
    return settings


def read_data(path):
    """Rows by index, from a JSONL or parquet file or the folder that datasets' `save_to_disk` wrote. No code in it is run.

    Raises:
        ValueError: naming the file, and the line where there are lines.
    """
    if os.path.isdir(path) or str(path).endswith(".parquet"):
        return _read_dataset(path)
    return read_jsonl(path)


def _read_dataset(path):
    with needs("train", f"{path} (JSONL needs nothing)"):
        import datasets
    try:
        data = datasets.load_from_disk(path) if os.path.isdir(path) else datasets.Dataset.from_parquet(path)
    except Exception as error:
        raise ValueError(f"{path}: {type(error).__name__}: {str(error)[:300]}") from error
    if isinstance(data, datasets.DatasetDict):
        if "train" not in data:
            raise ValueError(f"{path}: wanted one dataset, or a split named train, got splits {sorted(data)}")
        data = data["train"]
    if "prompt" not in data.column_names or len(data) == 0:
        raise ValueError(f"{path}: wanted rows with a 'prompt', got {len(data)} rows of {data.column_names}")
    return data


def read_jsonl(path) -> list[dict]:
    """Rows of a JSONL file, blank lines aside; raises ValueError naming file and line."""
    rows = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    rows.append(_row(line, f"{path}, line {number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    if not rows:
        raise ValueError(f"{path}: wanted at least one row, got none")
    columns = dict.fromkeys(name for row in rows for name in row)  # a batch of rows that all lack one has it too, as None
    return [columns | row for row in rows]


def _row(line, where):
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    if not isinstance(row, dict) or "prompt" not in row:
        raise ValueError(f"{where}: wanted an object with a 'prompt', got {line.strip()[:80]}")
    if not isinstance(row["prompt"], (str, list)) or not row["prompt"]:
        raise ValueError(f"{where}: 'prompt' must be text or a list of messages, got {row['prompt']!r}")
    return row


def _suggested(name, known):
    """The names that are spelled much like it, or that hold all of its words."""
    plain = name.partition("=")[0].replace("-", "_").strip("_")
    bare = {option.lstrip("-"): option for option in known}
    close = difflib.get_close_matches(plain, bare, n=3, cutoff=_CLOSE)
    if len(plain) >= _LONG:
        close += [option for option in bare if f"_{plain}_" in f"_{option}_"]
    close = list(dict.fromkeys(close))[:4]
    return f"; did you mean {' or '.join(bare[option] for option in close)}?" if close else ""
