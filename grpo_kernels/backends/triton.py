"""The row kernels in Triton: checked launches, and the launch shape.

On a GPU they are compiled at first use; on the CPU they run in Triton's interpreter when TRITON_INTERPRET=1 was set before
the import, which is slow and meant for tests. The contract of the three functions is that of `pytorch.py`.
"""

import contextlib
import math
from dataclasses import dataclass

import torch

_REMEDY = "pip install triton (3.4 or newer)"
_SCALE_BLOCK = 8192
_KINDS = {"clipped": 0, "cispo": 1, "sapo": 2, "linear": 3}

try:
    from . import row_kernels_triton as kernels

    _import_error = None
except Exception as error:  # a broken Triton, whatever it raises, must not take the other backends with it
    kernels, _import_error = None, f"{type(error).__name__}: {error}"

# whether they run in Triton's interpreter, on CPU tensors
INTERPRETED = kernels is not None and not isinstance(kernels.policy_kernel, kernels.triton.JITFunction)


def why_unavailable() -> str | None:
    """None, or the reason why the Triton kernels cannot be used, with the remedy."""
    if kernels is None:
        return f"triton cannot be imported ({_import_error}); {_REMEDY}"
    if INTERPRETED or torch.cuda.is_available():
        return None
    return "there is no GPU; on the CPU use backend='cpu', or set TRITON_INTERPRET=1 before the import to run the kernels slowly"


@dataclass(frozen=True)
class LaunchShape:
    block: int  # columns that a program takes in one step
    warps: int


def launch_shape(columns: int, element_size: int, reads: int = 1, plain: bool = True) -> LaunchShape:
    """A pure function of the width of a tile, of how often a kernel reads it, and of whether its arithmetic is plain.

    Eight elements a thread: two 16-byte loads in flight and two ahead. A long row that is read twice gets all the threads of a
    multiprocessor, so that few rows are in flight and the second read finds as much as can be of its row in the L2 cache. With
    a softcap, a bias or a gradient of the entropy, 64 registers are too few for that, and arithmetic sets the pace anyway;
    there, and where a row is read once, several programs share a multiprocessor, so that one's reductions hide behind
    another's loads. Reasoned from the compiled code (``make kernels``), not measured yet: ``make gpu PART=sweep`` times the
    alternatives.
    """
    for least, block, warps in ((65536, 8192, 32), (16384, 4096, 16), (2048, 2048, 8), (0, 1024, 4)):
        if columns >= least and (warps < 32 or (reads > 1 and plain)) and (warps < 16 or plain):
            return LaunchShape(block // 2, warps) if element_size == 8 else LaunchShape(block, warps)
    raise AssertionError(columns)


def statistics(tile, stats, target, transform, *, bias=None, temperature=None, probs=False, out=None):
    """Folds a tile into the running statistics [R, 4]; with probs writes its softmax to ``out`` (None: over the tile)."""
    rows, columns = tile.shape
    if rows == 0:
        return
    _check(tile, stats=stats, target=target, bias=bias, temperature=temperature)
    out = _destination(tile, out) if probs else None
    with _device(tile):
        kernels.statistics_kernel[(rows,)](
            tile, out, stats, target, bias, temperature, *_strides(tile, out), columns, *_numbers(transform),
            **_options(tile, out, transform, reads=1 + probs, plain=bias is None),
        )  # fmt: skip


def gradient(tile, target, lse, logps, entropy, g, g_entropy, transform, *, bias=None, temperature=None, from_probs=False,
             out=None):  # fmt: skip
    """Writes the gradient of a tile of logits, or of stashed probabilities, to ``out`` (None: over the tile)."""
    rows, columns = tile.shape
    if rows == 0:
        return
    vectors = {"lse": lse, "logps": logps, "entropy": entropy, "g": g, "g_entropy": g_entropy}
    _check(tile, target=target, bias=bias, temperature=temperature, **vectors)
    out = _destination(tile, out)
    with _device(tile):
        kernels.gradient_kernel[(rows,)](
            tile, out, target, lse, logps, entropy, g, g_entropy, bias, temperature, *_strides(tile, out), columns,
            *_numbers(transform), MODE=1 if from_probs else 0, **_options(tile, out, transform),
        )  # fmt: skip


def policy(tile, target, rows, terms, transform, logps, entropy, *, bias=None, temperature=None, out=None):
    """The fused GRPO kernel: statistics, log-prob, entropy, coefficient and gradient of whole rows in one launch."""
    height, columns = tile.shape
    if height == 0:
        return
    vectors = {name: getattr(rows, name) for name in kernels.Rows._fields}
    _check(tile, target=target, bias=bias, temperature=temperature, logps=logps, entropy=entropy, **vectors)
    out = _destination(tile, out)
    delta = math.inf if terms.delta is None else float(terms.delta)
    with _device(tile):
        kernels.policy_kernel[(height,)](
            tile, out, kernels.Rows(**vectors), logps, entropy, target, bias, temperature, *_strides(tile, out), columns,
            *_numbers(transform), float(terms.epsilon_low), float(terms.epsilon_high), delta,
            float(terms.sapo_temperature_pos), float(terms.sapo_temperature_neg), KIND=_KINDS[terms.kind],
            BIAS_CORRECTION=bool(terms.use_bias_correction_kl),
            **_options(tile, out, transform, reads=2, plain=bias is None and rows.w_entropy is None),
        )  # fmt: skip


def scale_(tensor, scale):
    """``tensor *= scale`` in place; the 0-dim scale stays on the device, and where it is 1 nothing is read or written."""
    assert tensor.is_contiguous() and scale.numel() == 1 and scale.device == tensor.device
    if tensor.numel():
        with _device(tensor):
            kernels.scale_kernel[(-(-tensor.numel() // _SCALE_BLOCK),)](
                tensor, scale, tensor.numel(), BLOCK=_SCALE_BLOCK, num_warps=8
            )


def _numbers(transform):
    return float(transform.logit_scale), float(transform.softcap or 0.0), float(transform.temperature)


def _strides(tile, out):
    return tile.stride(0), 0 if out is None else out.stride(0)


def _options(tile, out, transform, reads=1, plain=True):
    shape = launch_shape(tile.shape[1], tile.element_size(), reads, plain and transform.softcap is None)
    overlay = out is not None and out.dtype != tile.dtype and out.data_ptr() == tile.data_ptr()
    return {"SOFTCAP": transform.softcap is not None, "OVERLAY": overlay, "BLOCK": shape.block, "num_warps": shape.warps}


def _destination(tile, out):
    if out is None:
        return tile
    assert out.shape == tile.shape and (out.shape[1] <= 1 or out.stride(1) == 1), "out must be [R, C] with adjacent columns"
    if out.data_ptr() == tile.data_ptr():
        narrower = out.element_size() <= tile.element_size()
        assert narrower and out.stride(0) * out.element_size() == tile.stride(0) * tile.element_size(), "rows must lie on rows"
    return out


def _check(tile, **tensors):
    """An assertion names what is wrong with a tensor before a kernel reads past its end."""
    rows, columns = tile.shape
    accumulate = torch.float64 if tile.dtype == torch.float64 else torch.float32
    wanted = {"stats": (rows, 4), "bias": (columns,)}
    assert columns <= 1 or tile.stride(1) == 1, f"tile's columns must be adjacent, got strides {tile.stride()}"
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        shape, dtype = wanted.get(name, (rows,)), torch.int64 if name == "target" else accumulate
        good = tensor.shape == shape and tensor.dtype == dtype and tensor.device == tile.device and tensor.is_contiguous()
        assert good, f"{name} must be contiguous {shape} {dtype} on {tile.device}, got {tuple(tensor.shape)} {tensor.dtype}"


def _device(tile):
    return torch.cuda.device(tile.device) if tile.is_cuda else contextlib.nullcontext()
