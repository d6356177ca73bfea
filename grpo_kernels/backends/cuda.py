"""The row and pair kernels in CUDA C++: machine code built ahead of time, nothing compiled at first use, PyTorch not linked.

They live in a shared library of their own, `_cuda.so` beside this package's modules, which is handed addresses, shapes, strides, a
device and a stream through plain C structs. The contract is that of `pytorch.py`.

Source: csrc/row_kernels_cuda.cu (launches), csrc/row_kernels_cuda.cuh, csrc/divergence_cuda.cuh and csrc/pairs_cuda.cuh (loops),
csrc/row_math.h and csrc/divergence_math.h (formulas).
"""

import ctypes
import functools
from pathlib import Path

import torch

from .. import build_cuda
from . import params
from .comparison import check_both
from .statistics import check, check_close, check_pairs, require

LIBRARY = Path(__file__).parent.parent / "_cuda.so"
BUILD = "`grpo-kernels doctor --build-cuda` builds them where nvcc is installed"
_TWO_TILES = ("divergence_statistics", "jensen_shannon", "divergence_gradient")
_KERNELS = ("statistics", "close", "gradient", "policy", *_TWO_TILES, "pair_logits", "pair_sums")
_RESULTS = {dtype: (dtype,) for dtype in (torch.bfloat16, torch.float16, torch.float64)}
_RESULTS[torch.float32] = (torch.float32, torch.bfloat16, torch.float16)
_Launch = params.struct("CudaLaunch", (params.INT, "device"), (params.POINTER, "stream"), (params.INT, "variant cluster threads"))


class Kernels:
    """The functions of a backend over one shared library; ``shape`` is what a launch is not to choose itself.

    That is variant (1: two reads of the tile, 2: the row kept by a cluster of blocks), cluster (blocks) and threads (of a block).
    """

    def __init__(self, path, **shape):
        self.library, self.shape = loaded(str(path)), shape

    def statistics(self, tile, stats):
        """Merges a tile into the statistics [R, 4] of its rows, or each fixed tile into its own, [R, parts, 4]; with squares 5."""
        check(tile, _RESULTS, stats=stats)
        self._launch("statistics", tile.values, params.statistics(tile, stats))

    def close(self, stats, scored, squared=None):
        """What is known of rows whose statistics are complete, their parts merged in order."""
        check_close(stats, scored, squared)
        self._launch("close", stats, params.close(stats, scored, squared))

    def gradient(self, tile, out, scored, g, g_entropy=None):
        """Writes the gradient of the raw logits."""
        check(tile, _RESULTS, out, g=g, g_entropy=g_entropy, **scored._asdict())
        self._launch("gradient", tile.values, params.gradient(tile, out, scored, g, g_entropy))

    def policy(self, tile, out, rows, terms, scored):
        """The fused GRPO kernel: statistics, coefficient and gradient of whole rows in one launch; ``scored`` is written."""
        check(tile, _RESULTS, out, **scored._asdict(), **vars(rows))
        self._launch("policy", tile.values, params.policy(tile, out, rows, terms, scored))

    def divergence_statistics(self, student, teacher, stats, kind):
        """Folds two tiles into the running statistics [R, 8] of their rows."""
        check_both(student, teacher, _RESULTS, stats=stats)
        self._launch("divergence_statistics", student.values, params.divergence_statistics(student, teacher, stats, kind))

    def jensen_shannon(self, student, teacher, scored, gap, sums, beta):
        """Adds a tile's part of (KL(p || m), KL(q || m)) to sums [R, 2]."""
        check_both(student, teacher, _RESULTS, sums=sums, gap=gap, **scored._asdict())
        self._launch("jensen_shannon", student.values, params.jensen_shannon(student, teacher, scored, gap, sums, beta))

    def divergence_gradient(self, student, teacher, out, scored, compared, g_divergence, divergence, g=None, g_entropy=None):
        """Writes the gradient of the student's raw logits."""
        vectors = {"gap": compared.gap, "own": compared.own, "g_divergence": g_divergence, "g_entropy": g_entropy}
        check_both(student, teacher, _RESULTS, out, **scored._asdict(), **vectors, **({} if g is None else {"g": g}))
        filled = params.divergence_gradient(student, teacher, out, scored, compared, g_divergence, divergence, g, g_entropy)
        self._launch("divergence_gradient", student.values, filled)

    def pair_logits(self, pairs, hidden, weight, out, scale=1.0, bias=None, add=False):
        """Writes z of pairs (row of hidden, row of weight)."""
        check_pairs(pairs, _RESULTS, out, hidden, weight, bias)
        require(hidden.dtype == weight.dtype, f"hidden must be {weight.dtype} as weight is, got {hidden.dtype}")
        self._launch("pair_logits", weight, params.pair_logits(pairs, hidden, weight, out, scale, bias, add))

    def pair_sums(self, pairs, g, source, out, scale=1.0, add=False):
        """Writes the sums over each row's pairs."""
        check_pairs(pairs, _RESULTS, g, out, source)
        self._launch("pair_sums", source, params.pair_sums(pairs, g, source, out, scale, add))

    def _launch(self, kernel, where, filled):
        launch = _Launch(**_place(where), **self.shape)
        wrong = getattr(self.library, f"grpo_cuda_{kernel}")(ctypes.byref(filled), ctypes.byref(launch))
        if wrong:
            raise RuntimeError(wrong.decode())


@functools.cache
def loaded(path):
    """The library with the types of its functions."""
    library = ctypes.CDLL(path)
    for name in (*_KERNELS, "sources", "probe"):
        getattr(library, f"grpo_cuda_{name}").restype = ctypes.c_char_p
    return library


def why_unusable(path) -> str | None:
    """None, or what is wrong with a library: it does not load, or was built from other sources than this package's."""
    try:
        library = loaded(str(path))
    except (OSError, AttributeError) as error:
        return f"cannot be loaded ({error})"
    # a struct that has changed since would be read as pointers that are none
    return None if library.grpo_cuda_sources().decode() == build_cuda.fingerprint() else "were built from other sources than these"


@functools.cache
def _broken():
    return why_unusable(LIBRARY)


@functools.cache
def _refused():
    """What a GPU says to kernels of this library, or None."""
    wrong = loaded(str(LIBRARY)).grpo_cuda_probe()
    return None if wrong is None else wrong.decode()


def why_unavailable() -> str | None:
    """None, or the reason why the CUDA C++ kernels cannot be used, with the remedy."""
    if not LIBRARY.exists():
        return f"the CUDA C++ kernels were not built; {BUILD}"
    if _broken():
        return f"the CUDA C++ kernels {_broken()}; {BUILD}"
    if not torch.cuda.is_available():
        return "there is no GPU; use backend='cpu'"
    return None if _refused() is None else f"the CUDA C++ kernels do not run on this GPU and driver ({_refused()}); use 'triton'"


@functools.cache
def _kernels():
    return Kernels(LIBRARY)


def statistics(*args, **more):
    _kernels().statistics(*args, **more)


def close(*args, **more):
    _kernels().close(*args, **more)


def gradient(*args, **more):
    _kernels().gradient(*args, **more)


def policy(*args, **more):
    _kernels().policy(*args, **more)


def divergence_statistics(*args, **more):
    _kernels().divergence_statistics(*args, **more)


def jensen_shannon(*args, **more):
    _kernels().jensen_shannon(*args, **more)


def divergence_gradient(*args, **more):
    _kernels().divergence_gradient(*args, **more)


def pair_logits(*args, **more):
    _kernels().pair_logits(*args, **more)


def pair_sums(*args, **more):
    _kernels().pair_sums(*args, **more)


def _place(tensor):
    """Device and stream of a launch."""
    if not tensor.is_cuda:
        return {}
    return {"device": tensor.device.index, "stream": torch.cuda.current_stream(tensor.device).cuda_stream}
