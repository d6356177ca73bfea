"""Reward functions: `f(prompts, completions, completion_ids, **columns) -> list[float | None]`, None = not scorable."""

import asyncio
import contextlib
import functools
import importlib
import inspect
import math
import os
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification

from .models import finding, load_tokenizer

RESERVED = ("prompts", "completions", "completion_ids")


def exact_match(completions, answer, **_):
    """1.0 where the completion is the dataset's ``answer``, spaces around it aside; else 0.0."""
    return [float(text_of(c).strip() == str(a).strip()) for c, a in zip(completions, answer, strict=True)]


def text_of(completion) -> str:
    """The text of a completion: itself, or the content of the messages that a conversational prompt is answered with."""
    return completion if isinstance(completion, str) else "".join(message["content"] for message in completion)


def load_reward(spec: str):
    """The function named ``package.module:function``; the working directory is searched too. A folder is a reward model's path.

    Raises:
        ValueError: naming the spec and what is wrong with it.
    """
    if os.path.isdir(spec):
        return spec
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise ValueError(f"reward must be named package.module:function, or be the folder of a reward model, got {spec!r}")
    if module_name.endswith(".py"):
        dotted = os.path.normpath(module_name.removesuffix(".py")).replace(os.sep, ".")
        raise ValueError(f"reward {spec!r}: write {dotted}:{name}, without .py")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        missing = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}.")
        said = told(error, _users_place(error)) + (", looked for from the working directory" if missing else "")
        raise ValueError(f"reward {spec!r}: cannot import {module_name!r} ({said})") from error
    function = getattr(module, name, None)
    if not callable(function):
        wrong = "has no" if function is None else "holds something that cannot be called under"
        raise ValueError(f"reward {spec!r}: module {module_name!r} {wrong} {name!r}")
    return function


def reward_names(functions) -> list[str]:
    """One name per function for the metrics; a repeated name is numbered."""
    names = [getattr(f, "__name__", type(f).__name__) for f in functions]
    return [n if names.count(n) == 1 else f"{n}_{i}" for i, n in enumerate(names)]


def score(functions, prompts, completions, completion_ids, columns) -> torch.Tensor:
    """Rewards [B, K] float32 of B completions under K functions; nan where a function answered None.

    Raises:
        ValueError: naming the function, when its answer is not one finite number or None per completion.
    """
    for name in RESERVED:
        if name in columns:
            raise ValueError(f"dataset column {name!r} collides with an argument of the reward functions; rename it")
    rewards = []
    given = dict(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
    names = reward_names(functions)
    for answer, name in zip(_answers(functions, names, given), names, strict=True):
        answer = answer.tolist() if isinstance(answer, torch.Tensor) else answer
        try:
            if any(isinstance(value, str) for value in answer):
                raise TypeError("text")
            values = [math.nan if value is None else float(value) for value in answer]
        except (TypeError, ValueError) as error:
            raise ValueError(f"reward {name!r} must return a list of numbers or None, got {answer!r}") from error
        finite = all(given is None or math.isfinite(value) for given, value in zip(answer, values, strict=True))
        if len(values) != len(completions) or not finite:
            raise ValueError(
                f"reward {name!r} must return one finite number or None for each of {len(completions)} completions, "
                f"got {len(values)}: {values[:8]}"
            )
        rewards.append(torch.tensor(values, dtype=torch.float32))
    return torch.stack(rewards, dim=1)


def _answers(functions, names, given):
    """Of all functions; those that are asynchronous wait together."""
    answers = []
    for function, name in zip(functions, names, strict=True):
        with _naming(name, function):
            answers.append(function(**given))
    waiting = [i for i, answer in enumerate(answers) if inspect.isawaitable(answer)]
    if not waiting:
        return answers

    async def answered(i):
        with _naming(names[i], functions[i]):
            return await answers[i]

    async def gathered():
        return await asyncio.gather(*map(answered, waiting))

    # in a thread of its own: a notebook's has an event loop already, which cannot be entered twice
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(asyncio.run, gathered()).result()
    for i, answer in zip(waiting, found, strict=True):
        answers[i] = answer
    return answers


@contextlib.contextmanager
def _naming(name, function):
    """An exception of a reward function keeps its type; a note on it says which reward it was, and where in the user's code."""
    try:
        yield
    except (Exception, SystemExit) as error:
        said = f"reward {name!r} raised {told(error, _users_place(error, function))}"
        if isinstance(error, SystemExit):  # would end the run with status 0
            raise RuntimeError(said) from error
        error.__notes__ = [*getattr(error, "__notes__", ()), said]  # what 3.11's add_note does
        raise


def noted(error):
    """What `_naming` wrote on an exception, or None."""
    return next((note for note in reversed(getattr(error, "__notes__", ())) if note.startswith("reward ")), None)


def raised_at(error):
    """(file, line) of the last frame."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return last.filename, last.lineno


def told(error, place) -> str:
    """An exception in one line: its type, what it says, and where it was raised."""
    text = " ".join(str(error).split())
    said = type(error).__name__ + (f": {text}" if text else "")
    if place is None or isinstance(error, (ImportError, SyntaxError)):  # raised by the import itself
        return said
    return f"{said} ({os.path.basename(place[0])}, line {place[1]})"


def _users_place(error, function=None):
    """(file, line) where the user's code raised; of a function that was called wrongly, its definition. None: a function in C."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not _is_library(frame.filename):
            return frame.filename, frame.lineno
    while isinstance(function, functools.partial):
        function = function.func
    holder, called = (function, "__init__") if inspect.isclass(function) else (type(function), "__call__")
    code = getattr(function, "__code__", None) or getattr(getattr(holder, called, None), "__code__", None)
    return code and (code.co_filename, code.co_firstlineno)


def _is_library(file):
    ours, python = os.path.dirname(os.path.dirname(__file__)), os.path.dirname(os.__file__)
    installed = {"site-packages", "dist-packages"} & set(Path(file).parts)
    return bool(installed) or file.startswith(("<frozen", ours + os.sep, python + os.sep))


class ModelReward:
    """A reward model: the one logit of a sequence classifier, of prompt and completion together.

    Args:
        model: for sequence classification with one label. tokenizer: its own; conversational prompts go through its chat template.
    """

    batch_size = 32

    def __init__(self, model, tokenizer, name):
        if getattr(model.config, "num_labels", 1) != 1:
            raise ValueError(f"a reward model must have one label, {name} has {model.config.num_labels}")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.config.get_text_config().pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id
        self.model, self.tokenizer, self.__name__ = model.eval().requires_grad_(False), tokenizer, name

    @classmethod
    def of(cls, model, tokenizer, device, trust_remote_code=False):
        """From a model, or the path of one."""
        if isinstance(model, (str, os.PathLike)):
            path = os.fspath(model)
            with finding(path, "reward model"):
                model, loaded = AutoModelForSequenceClassification.from_pretrained(
                    path, trust_remote_code=trust_remote_code, output_loading_info=True
                )
            if loaded["missing_keys"]:
                raise ValueError(f"reward model {path!r} has no {', '.join(sorted(loaded['missing_keys'])[:3])}: it is none")
        else:
            path = model.config._name_or_path
        tokenizer = tokenizer or load_tokenizer(path, trust_remote_code=trust_remote_code)
        return cls(model.to(device), tokenizer, os.path.basename(os.path.normpath(path)) or type(model).__name__)

    @torch.inference_mode()
    def __call__(self, prompts, completions, **_):
        texts = [self._text(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        found = []
        for first in range(0, len(texts), self.batch_size):
            part = texts[first : first + self.batch_size]
            chat = not isinstance(prompts[first], str)  # whose template wrote the special tokens
            batch = self.tokenizer(part, padding=True, padding_side="right", add_special_tokens=not chat, return_tensors="pt")
            batch.pop("token_type_ids", None)
            found += self.model(**batch.to(self.model.device)).logits[:, 0].tolist()
        return found

    def _text(self, prompt, completion):
        if isinstance(prompt, str):
            return prompt + completion
        return self.tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)


def reward_metrics(rewards, group_ids, weights, names) -> dict[str, torch.Tensor]:
    """Statistics over the scorable completions, by TRL's names; nan where there are too few.

    Args:
        rewards: [B, K]; group_ids: [B], 0..groups-1; weights: [K] or None; names: K names of the reward functions.
    """
    metrics = {}
    for name, column in zip(names, rewards.unbind(1), strict=True):
        metrics[f"rewards/{name}/mean"], metrics[f"rewards/{name}/std"] = column.nanmean(), _nanstd(column)
    total = (rewards if weights is None else rewards * weights).nansum(1)
    total = total.masked_fill(rewards.isnan().all(1), math.nan)
    flat = [_is_flat(total[group_ids == group]) for group in range(int(group_ids.max()) + 1)]
    return metrics | {
        "reward": total.nanmean(),
        "reward_std": _nanstd(total),
        "frac_reward_zero_std": torch.tensor(flat, dtype=torch.float32, device=rewards.device).mean(),
    }


def _nanstd(values):
    return values[~values.isnan()].std() if (~values.isnan()).sum() > 1 else values.new_tensor(math.nan)


def _is_flat(values):
    values = values[~values.isnan()]
    return len(values) == 0 or bool(values.max() == values.min())
