"""Makes peers importable whose own packages import what their kernels do not need. Kept out of the wheel: it replaces modules."""

import contextlib
import importlib
import importlib.util
import sys
import types


def install(library):
    """Puts a module with what is asked of it, or bare packages, where those of ``library`` cannot be imported."""
    needed, shim = {
        "trl": ("trl.trainer.utils", _trl), "verl": ("verl.utils.kernel.linear_cross_entropy", _verl)
    }.get(library, ("sys", None))  # fmt: skip
    try:
        importlib.import_module(needed)
    except Exception:  # of whatever it needs
        shim()


def _trl():
    # ChunkedLogProbFunction's backward wants one function of it, which does nothing without DeepSpeed
    stub = sys.modules["trl.trainer.utils"] = types.ModuleType("trl.trainer.utils")
    stub.maybe_gather_lm_head_ctx = lambda *a: contextlib.nullcontext()


def _verl():
    # verl's own __init__ wants ray, tensordict and more
    for name in [name for name in sys.modules if name.split(".")[0] == "verl"]:
        del sys.modules[name]
    found = importlib.util.find_spec("verl")
    for name in ("verl", "verl.utils", "verl.plugin", "verl.utils.experimental") if found else ():
        bare = sys.modules[name] = types.ModuleType(name)
        bare.__path__ = [found.submodule_search_locations[0] + name.removeprefix("verl").replace(".", "/")]
