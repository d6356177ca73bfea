"""The row kernels in Triton: checked launches, and the launch shape.

On a GPU they are compiled at first use; on the CPU they run in Triton's interpreter when TRITON_INTERPRET=1 was set before
the import, which is slow and meant for tests. The contract of the functions is that of `pytorch.py`.
"""

import contextlib
from dataclasses import dataclass

import torch

from ..losses.terms import KINDS

_REMEDY = "pip install triton (3.4 or newer)"
_SCALE_BLOCK = 8192

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


def statistics(tile, stats):
    """Folds a tile into the running statistics [R, 4] of its rows."""
    if _launchable(tile, stats=stats):
        _launch(kernels.statistics_kernel, tile, None, stats, shape=_shape(tile))


def gradient(tile, out, scored, g, g_entropy=None, from_stash=False):
    """Writes the gradient of the raw logits, from a tile of logits or of a stash."""
    if _launchable(tile, out, g=g, g_entropy=g_entropy, **scored._asdict()):
        mode = kernels.FROM_STASH if from_stash else kernels.FROM_LOGITS
        shape = _shape(tile, plain=g_entropy is None)
        _launch(kernels.gradient_kernel, tile, out, scored, g, g_entropy, shape=shape, MODE=mode.value)


def stash(tile, out, scored):
    """Writes ``onehot - p``, from which `gradient` can be made later without the logits."""
    if _launchable(tile, out, **scored._asdict()):
        _launch(kernels.gradient_kernel, tile, out, scored, None, None, shape=_shape(tile), MODE=kernels.TO_STASH.value)


def policy(tile, out, rows, terms, scored):
    """The fused GRPO kernel: statistics, scores, coefficient and gradient of whole rows in one launch."""
    vectors = {name: getattr(rows, name) for name in kernels.Rows._fields}
    if terms.kind != "linear" and rows.w_policy is not None and rows.advantages is None:
        raise AssertionError("advantages are missing")
    if rows.ref is not None and rows.w_kl is None:
        raise AssertionError("w_kl is missing")
    if _launchable(tile, out, **vectors, **scored._asdict()):
        numbers = terms.epsilon_low, terms.epsilon_high, terms.delta, terms.sapo_temperature_pos, terms.sapo_temperature_neg
        _launch(kernels.policy_kernel, tile, out, scored, kernels.Rows(**vectors), numbers=numbers,
                shape=_shape(tile, reads=2, plain=rows.w_entropy is None),
                KIND=KINDS.index(terms.kind), BIAS_CORRECTION=bool(terms.use_bias_correction_kl))  # fmt: skip


def scale_(tensor, scale):
    """``tensor *= scale`` in place; the 0-dim scale stays on the device, and where it is 1 nothing is read or written."""
    if not (tensor.is_contiguous() and scale.numel() == 1 and scale.device == tensor.device):
        raise AssertionError("wanted a contiguous tensor and one number on its device")
    if tensor.numel():
        with _device(tensor):
            kernels.scale_kernel[(-(-tensor.numel() // _SCALE_BLOCK),)](
                tensor, scale, tensor.numel(), BLOCK=_SCALE_BLOCK, num_warps=8
            )


def _launch(kernel, tile, out, *args, shape, numbers=(), **constants):
    (rows, columns), transform = tile.values.shape, tile.transform
    numbers = transform.logit_scale, transform.softcap or 0.0, transform.temperature, *numbers
    matrices = [kernels.Matrix(x, x.stride(0)) for x in (tile.values, out) if x is not None]
    with _device(tile.values):
        kernel[(rows,)](
            *matrices, *args, tile.target, tile.bias, tile.temperature, columns, *map(float, numbers), **constants,
            SOFTCAP=transform.softcap is not None, BLOCK=shape.block, num_warps=shape.warps,
        )  # fmt: skip


def _shape(tile, reads=1, plain=True):
    plain = plain and tile.bias is None and tile.transform.softcap is None
    return launch_shape(tile.values.shape[1], tile.values.element_size(), reads, plain)


def _launchable(tile, out=None, **vectors):
    """Whether there are rows to launch for. Raises AssertionError, also under `python -O`, where a kernel would read or write
    past the end of a tensor."""
    values = tile.values
    rows, columns = values.shape
    acc = torch.float64 if values.dtype == torch.float64 else torch.float32
    wanted = {"stats": ((rows, 4), acc), "bias": ((columns,), acc), "target": ((rows,), torch.int64)}
    for name, x in dict(vectors, target=tile.target, bias=tile.bias, temperature=tile.temperature).items():
        shape, dtype = wanted.get(name, ((rows,), acc))
        if x is not None and not (x.shape == shape and x.dtype == dtype and x.device == values.device and x.is_contiguous()):
            raise AssertionError(f"{name} must be contiguous {shape} {dtype} on {values.device}, got {_about(x)}")
    for name, x in ("values", values), ("out", values if out is None else out):
        adjacent = (columns <= 1 or x.stride(1) == 1) and (rows <= 1 or x.stride(0) >= columns)
        if x.shape != values.shape or x.device != values.device or not adjacent:
            wanted = f"{rows} rows apart of {columns} adjacent columns on {values.device}"
            raise AssertionError(f"{name} must be {wanted}, got {_about(x)}")
    if out is not None and rows:
        itself = out.dtype == values.dtype and out.data_ptr() == values.data_ptr() and out.stride(0) == values.stride(0)
        if not (itself or _end(out) <= values.data_ptr() or _end(values) <= out.data_ptr()):
            raise AssertionError("out must be the tile itself or other memory")
    return rows > 0


def _about(tensor):
    return f"{tuple(tensor.shape)} {tensor.dtype} at strides {tensor.stride()} on {tensor.device}"


def _end(matrix):
    rows, columns = matrix.shape
    return matrix.data_ptr() + ((rows - 1) * matrix.stride(0) + columns) * matrix.element_size()


def _device(tensor):
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
