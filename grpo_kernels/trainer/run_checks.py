"""Checks of a run before its first step; and an error on one process that stops all processes."""

import contextlib
import os

from accelerate.utils import gather_object
from transformers import PreTrainedModel

from .config import GRPOConfig
from .rewards import ModelReward, noted


def check_process(args):
    """Raises unless this is one process of those that ``args`` counts, with at most one GPU."""
    if not isinstance(args, GRPOConfig):
        raise TypeError(f"args must be a GRPOConfig, got {type(args).__name__}")
    if args.n_gpu > 1:
        raise ValueError(f"one process trains on one GPU, got {args.n_gpu}: start with torchrun, or show it one GPU")
    if (processes := int(os.environ.get("WORLD_SIZE", 1))) != args.world_size:
        raise ValueError(f"this is one of {processes} processes (WORLD_SIZE), but args knows of {args.world_size}")


def reward_functions(given, tokenizers, args) -> list:
    """The reward functions as a list, models among them as `ModelReward`."""
    functions = list(given) if isinstance(given, (list, tuple)) else [given]
    tokenizers = list(tokenizers) if isinstance(tokenizers, (list, tuple)) else [tokenizers] * len(functions)
    if len(tokenizers) != len(functions):
        raise ValueError(f"reward_processing_classes must have {len(functions)} entries, as reward_funcs, got {len(tokenizers)}")
    for i, function in enumerate(functions):
        if isinstance(function, (str, os.PathLike, PreTrainedModel)):
            functions[i] = ModelReward.of(function, tokenizers[i], args.device, args.trust_remote_code)
    if not functions or not all(map(callable, functions)):
        raise TypeError(f"reward_funcs must be functions, models or paths of models, got {given!r}")
    if args.reward_weights is not None and len(args.reward_weights) != len(functions):
        raise ValueError(
            f"reward_weights must have one weight for each of {len(functions)} reward functions, got {args.reward_weights}"
        )
    return functions


def named_datasets(dataset) -> dict:
    """Evaluation sets by name; one alone has the empty name."""
    return {} if dataset is None else dataset if isinstance(dataset, dict) else {"": dataset}


def check_datasets(args, train_dataset, eval_dataset):
    check_dataset("train_dataset", train_dataset)
    if args.eval_on_start and eval_dataset is None:
        raise ValueError("eval_on_start must be False without an eval_dataset (--eval_data), got True")
    for name, dataset in named_datasets(eval_dataset).items():
        check_dataset(f"eval_dataset {name}".strip(), dataset)


def check_dataset(name, dataset):
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(f"{name} must have a length and rows by index, got {type(dataset).__name__}")
    if len(dataset) == 0:
        raise ValueError(f"{name} must have at least one row, got none")
    if "prompt" not in dataset[0]:
        raise ValueError(f"{name} must have a column 'prompt', got {sorted(dataset[0])}")


@contextlib.contextmanager
def raising_together(args):
    """Where one process raises, all of them do, naming it, instead of waiting for it in the next collective."""
    error = None
    try:
        yield
    except Exception as raised:
        if args.world_size == 1:
            raise
        error = raised
    if args.world_size > 1:
        told = f": {note}" if (note := noted(error)) else f" raised {type(error).__name__}: {error}"
        said = error and f"rank {args.process_index}{told}"
        if errors := [text for text in gather_object([said]) if text]:
            raise RuntimeError("; ".join(errors)) from error
