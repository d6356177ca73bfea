"""Makes peers importable whose own packages import what their kernels do not need. Kept out of the wheel: it replaces modules.

`install` puts an empty package, or a module with the one function that is asked for, where the real one cannot be imported.
"""

import contextlib
import importlib
import importlib.util
import sys
import types

_VERL = ("verl", "verl.utils", "verl.plugin", "verl.utils.experimental")


def install():
    if importlib.util.find_spec("trl") and not _imports("trl.trainer.utils"):
        # ChunkedLogProbFunction's backward wants one function of it, which does nothing without DeepSpeed
        stub = types.ModuleType("trl.trainer.utils")
        stub.maybe_gather_lm_head_ctx = lambda *a: contextlib.nullcontext()
        sys.modules[stub.__name__] = stub
    found = importlib.util.find_spec("verl")
    if found and not _imports("verl.utils.kernel.linear_cross_entropy"):
        for name in [name for name in sys.modules if name.split(".")[0] == "verl"]:
            del sys.modules[name]
        for name in _VERL:  # bare: verl's own __init__ wants ray, tensordict and more
            bare = types.ModuleType(name)
            bare.__path__ = [found.submodule_search_locations[0] + name.removeprefix("verl").replace(".", "/")]
            sys.modules[name] = bare


def _imports(name):
    try:
        importlib.import_module(name)
    except Exception:  # of whatever it needs
        return False
    return True
