"""The row kernels in CUDA C++: machine code built ahead of time, nothing compiled at first use, PyTorch not linked.

They live in a shared library of their own, `_cuda.so` beside this package's modules, which is handed addresses, shapes, strides, a
device and a stream through plain C structs. The contract of the three functions is that of `pytorch.py`.

Source: csrc/row_kernels_cuda.cu (launches), csrc/row_kernels_cuda.cuh (loops), csrc/row_math.h (formulas).
"""

import ctypes
import functools
import math
from pathlib import Path

import torch

from .. import build_cuda

LIBRARY = Path(__file__).parent.parent / "_cuda.so"
BUILD = "`grpo-kernels doctor --build-cuda` builds them where nvcc is installed"
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2, torch.float16: 3}
_KINDS = {"clipped": 0, "cispo": 1, "sapo": 2, "linear": 3}


def _struct(name, *members):
    """A struct of csrc/params.h: (type, names) in order."""
    fields = [(one, kind) for kind, names in members for one in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


_INT, _INT64, _DOUBLE, _BOOL, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_double, ctypes.c_bool, ctypes.c_void_p
_Tile = _struct("Tile", (_POINTER, "data"), (_INT64, "rows columns row_stride"), (_INT, "dtype"))
_Output = _struct("Output", (_POINTER, "data"), (_INT64, "row_stride"), (_INT, "dtype"))
_Transform = _struct("Transform", (_DOUBLE, "logit_scale softcap temperature"), (_POINTER, "bias row_temperature"))
_PROBLEM = (_Tile, "tile"), (_Transform, "transform")
_Statistics = _struct("Statistics", *_PROBLEM, (_POINTER, "target stats"), (_BOOL, "probs"), (_Output, "out"))
_Gradient = _struct("Gradient", *_PROBLEM, (_POINTER, "target lse logps entropy g g_entropy"), (_BOOL, "from_probs"),
                    (_Output, "out"))  # fmt: skip
_Terms = _struct("Terms", (_INT, "kind"), (_DOUBLE, "epsilon_low epsilon_high delta sapo_temperature_pos sapo_temperature_neg"),
                 (_BOOL, "use_bias_correction_kl"))  # fmt: skip
_Policy = _struct("Policy", *_PROBLEM, (_Terms, "terms"),
                  (_POINTER, "target old ref advantages w_policy w_kl w_entropy logps entropy"), (_Output, "out"))  # fmt: skip
_Launch = _struct("Launch", (_INT, "device"), (_POINTER, "stream"), (_INT, "variant cluster threads"))


class Kernels:
    """The three functions of a backend over one shared library; ``shape`` is what a launch is not to choose itself.

    That is variant (1: two reads of the tile, 2: the row kept by a cluster of blocks), cluster (blocks) and threads (of a block).
    """

    def __init__(self, path, **shape):
        self.library, self.shape = loaded(str(path)), shape

    def statistics(self, tile, stats, target, transform, *, bias=None, temperature=None, probs=False, out=None):
        """Folds a tile into the running statistics [R, 4]; with probs writes its softmax to ``out`` (None: over the tile)."""
        _check(tile, out, stats=stats, target=target, bias=bias, temperature=temperature)
        params = _Statistics(_tile(tile), _transform(transform, bias, temperature), _at(target), _at(stats), probs, _output(out))
        self._launch("statistics", tile, params)

    def gradient(self, tile, target, lse, logps, entropy, g, g_entropy, transform, *, bias=None, temperature=None,
                 from_probs=False, out=None):  # fmt: skip
        """Writes the gradient of a tile of logits, or of stashed probabilities, to ``out`` (None: over the tile)."""
        vectors = {"target": target, "lse": lse, "logps": logps, "entropy": entropy, "g": g, "g_entropy": g_entropy}
        _check(tile, out, bias=bias, temperature=temperature, **vectors)
        addresses = {name: _at(vector) for name, vector in vectors.items()}
        transform = _transform(transform, bias, temperature)
        params = _Gradient(tile=_tile(tile), transform=transform, from_probs=from_probs, out=_output(out), **addresses)
        self._launch("gradient", tile, params)

    def policy(self, tile, target, rows, terms, transform, logps, entropy, *, bias=None, temperature=None, out=None):
        """The fused GRPO kernel: statistics, log-prob, entropy, coefficient and gradient of whole rows in one launch."""
        names = ("old", "ref", "advantages", "w_policy", "w_kl", "w_entropy")
        vectors = {"target": target, "logps": logps, "entropy": entropy, **{name: getattr(rows, name) for name in names}}
        _check(tile, out, bias=bias, temperature=temperature, **vectors)
        delta = math.inf if terms.delta is None else terms.delta
        compiled = _Terms(_KINDS[terms.kind], terms.epsilon_low, terms.epsilon_high, delta, terms.sapo_temperature_pos,
                          terms.sapo_temperature_neg, terms.use_bias_correction_kl)  # fmt: skip
        addresses = {name: _at(vector) for name, vector in vectors.items()}
        transform = _transform(transform, bias, temperature)
        self._launch("policy", tile, _Policy(tile=_tile(tile), transform=transform, terms=compiled, out=_output(out), **addresses))

    def _launch(self, kernel, tile, params):
        launch = _Launch(**_place(tile), **self.shape)
        wrong = getattr(self.library, f"grpo_cuda_{kernel}")(ctypes.byref(params), ctypes.byref(launch))
        if wrong:
            raise RuntimeError(wrong.decode())


@functools.cache
def loaded(path):
    """The library with the types of its functions."""
    library = ctypes.CDLL(path)
    for name in ("statistics", "gradient", "policy", "sources", "probe"):
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


def gradient(*args, **more):
    _kernels().gradient(*args, **more)


def policy(*args, **more):
    _kernels().policy(*args, **more)


def _place(tile):
    """Device and stream of a launch."""
    if not tile.is_cuda:
        return {}
    return {"device": tile.device.index, "stream": torch.cuda.current_stream(tile.device).cuda_stream}


def _at(tensor):
    return None if tensor is None else tensor.data_ptr()


def _tile(tile):
    return _Tile(tile.data_ptr(), *tile.shape, tile.stride(0), _DTYPES[tile.dtype])


def _output(out):
    return _Output() if out is None else _Output(out.data_ptr(), out.stride(0), _DTYPES[out.dtype])


def _transform(transform, bias, temperature):
    return _Transform(transform.logit_scale, transform.softcap or 0.0, transform.temperature, _at(bias), _at(temperature))


def _check(tile, out, **tensors):
    """An AssertionError names what is wrong with a tensor before a kernel reads past its end; also under ``python -O``."""
    (rows, columns), device = tile.shape, tile.device
    accumulate = torch.float64 if tile.dtype == torch.float64 else torch.float32
    if tile.dtype not in _DTYPES:
        raise AssertionError(f"tile must be one of {', '.join(map(str, _DTYPES))}, got {tile.dtype}")
    if columns > 1 and tile.stride(1) != 1:
        raise AssertionError(f"tile's columns must be adjacent, got strides {tile.stride()}")
    if rows > 1 and tile.stride(0) < columns:
        raise AssertionError(f"tile's rows must be apart, got strides {tile.stride()}")
    if out is not None:
        _check_out(tile, out)
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        shape = (rows, 4) if name == "stats" else (columns,) if name == "bias" else (rows,)
        dtype = torch.int64 if name == "target" else accumulate
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device or not tensor.is_contiguous():
            raise AssertionError(f"{name} must be contiguous {shape} {dtype} on {device}, got {tuple(tensor.shape)} {tensor.dtype}")


def _check_out(tile, out):
    rows, columns = tile.shape
    apart = (columns <= 1 or out.stride(1) == 1) and (rows <= 1 or out.stride(0) >= columns)
    if out.shape != tile.shape or out.device != tile.device or not apart:
        raise AssertionError(
            f"out must be {tuple(tile.shape)} with adjacent columns on {tile.device}, got {tuple(out.shape)} with {out.stride()}"
        )
    if out.dtype not in (tile.dtype, torch.bfloat16, torch.float16):
        raise AssertionError(f"out must not be wider than the tile, got {out.dtype}")
    if out.data_ptr() == tile.data_ptr():
        if out.stride(0) * out.element_size() != tile.stride(0) * tile.element_size() and rows > 1:
            raise AssertionError(f"out's rows must lie on the tile's, got strides {out.stride()} over {tile.stride()}")
    elif out.data_ptr() < _end(tile) and tile.data_ptr() < _end(out):
        raise AssertionError("out must begin where the tile does, or be memory of its own")


def _end(x):
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr() + (last + 1) * x.element_size() if x.numel() else 0
