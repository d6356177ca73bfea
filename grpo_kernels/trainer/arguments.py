"""A run from the command line: flags, a YAML file of the same names, JSONL data."""

import dataclasses
import difflib
import json
from dataclasses import dataclass, field

import torch
import yaml
from transformers import HfArgumentParser

from .config import GRPOConfig


@dataclass
class RunArguments:
    """What a run is made of, beside the options in `GRPOConfig`."""

    config: str | None = field(default=None, metadata={"help": "YAML file that sets options by these names; flags win."})
    model: str | None = field(default=None, metadata={"help": "Path or name of a causal LM with its tokenizer."})
    data: str | None = field(default=None, metadata={"help": "JSONL file of rows with a prompt: a string or messages."})
    eval_data: str | None = field(default=None, metadata={"help": "JSONL file to evaluate on."})
    reward: list[str] | None = field(
        default=None, metadata={"help": "Reward functions, each package.module:function, found from the working directory."}
    )

    @property
    def is_demo(self) -> bool:
        return self.model is None and self.data is None


class _Parser(HfArgumentParser):
    def error(self, message):
        raise ValueError(message)  # argparse would print the usage of 150 options and exit


def parse(argv, demo_defaults) -> tuple[RunArguments, GRPOConfig]:
    """Defaults < those of the demo, if it is one < the YAML file < flags.

    Raises:
        ValueError: naming the option, what was wanted and what came.
    """
    parser = _Parser((RunArguments, GRPOConfig), prog="grpo-kernels train", allow_abbrev=False)
    given = vars(_Parser(RunArguments, allow_abbrev=False, add_help=False).parse_known_args(argv)[0])
    settings = read_yaml(given["config"]) if given["config"] else {}
    if isinstance(settings.get("reward"), str):
        settings["reward"] = [settings["reward"]]
    run = {**given, **settings, **{name: value for name, value in given.items() if value is not None}}
    if run["model"] is None and run["data"] is None:
        parser.set_defaults(**demo_defaults)
    parser.set_defaults(**settings)
    run, args, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    if unknown:
        raise ValueError(_unknown("option", unknown[0], parser._option_string_actions))
    for name in ("model", "data", "reward"):
        if not run.is_demo and not getattr(run, name):
            raise ValueError(f"--{name} is missing: a run needs --model, --data and --reward; the demo none of them")
    if run.is_demo and (run.reward or run.eval_data):
        raise ValueError("--reward and --eval_data need --model and --data; the demo brings its own")
    return run, args


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
            raise ValueError(f"--config {path}: " + _unknown("key", str(key), known))
    return settings


def read_jsonl(path) -> list[dict]:
    """Rows of a JSONL file, blank lines aside; raises ValueError naming file and line."""
    rows = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    rows.append(_row(line, f"{path}, line {number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not rows:
        raise ValueError(f"{path}: wanted at least one row, got none")
    return rows


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


def _unknown(kind, name, known):
    close = difflib.get_close_matches(name, known, n=3)
    return f"unknown {kind} {name!r}" + (f"; did you mean {' or '.join(close)}?" if close else "")
