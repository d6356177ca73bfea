"""peft without bitsandbytes, which is then loaded where 4-bit or 8-bit weights are.

transformers' Trainer imports peft where it is installed, and peft.helpers imports bitsandbytes for one function: a second of every
command, and on some processors a warning about kernels that nobody asked for.
"""

import importlib
import sys
from importlib.util import find_spec


class _OnUse:
    def __getattr__(self, name):
        return getattr(importlib.import_module("bitsandbytes"), name)


def import_peft():
    """Does nothing where one of the two is not installed, or is imported already."""
    if {"peft", "bitsandbytes"} & sys.modules.keys() or not (find_spec("peft") and find_spec("bitsandbytes")):
        return
    sys.modules["bitsandbytes"] = None  # to import it raises ImportError, which peft.helpers expects
    try:
        import peft
    finally:
        del sys.modules["bitsandbytes"]
    peft.helpers.bnb = _OnUse()
