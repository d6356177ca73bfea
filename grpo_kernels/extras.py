"""Optional requirements: the error that names the extra which brings a missing one, and peft without bitsandbytes."""

import contextlib
import importlib
import sys
from importlib.util import find_spec

# the modules that each extra of pyproject.toml brings and this package imports
BRINGS = {
    "train": ("transformers", "accelerate", "datasets", "peft", "yaml", "tokenizers", "pyarrow"),
    "bench": ("matplotlib",),
}


class MissingExtra(ModuleNotFoundError):
    """A module that an optional part of the package imports is not installed."""


@contextlib.contextmanager
def needs(extra, user):
    """Around the imports of ``user``: a missing module that the extra brings becomes an error with the command that installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if isinstance(error, MissingExtra) or (error.name or "").split(".")[0] not in BRINGS[extra]:
            raise
        remedy = f"pip install 'grpo-kernels[{extra}]'"
        raise MissingExtra(f"{user} needs {error.name}, which is not installed: {remedy}", name=error.name) from error


def import_peft():
    """Imports peft without bitsandbytes, which is then loaded when 4-bit or 8-bit weights first need it.

    transformers' Trainer imports peft where it is installed, and peft.helpers imports bitsandbytes for one function: a second of
    every command, and on some processors a warning about kernels that nobody asked for. Does nothing where one of the two is not
    installed, or is imported already.
    """
    if {"peft", "bitsandbytes"} & sys.modules.keys() or not (find_spec("peft") and find_spec("bitsandbytes")):
        return
    sys.modules["bitsandbytes"] = None  # to import it raises ImportError, which peft.helpers expects
    try:
        import peft
    finally:
        del sys.modules["bitsandbytes"]
    peft.helpers.bnb = _OnUse()


class _OnUse:
    def __getattr__(self, name):
        return getattr(importlib.import_module("bitsandbytes"), name)
