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
    if _has_rows(tile, stats=stats):
        _launch(kernels.statistics_kernel, tile, _matrix(tile.values), stats, shape=_shape(tile))


def gradient(tile, out, scored, g, g_entropy=None, from_stash=False):
    """Writes the gradient of the raw logits, from a tile of logits or of a stash."""
    if _has_rows(tile, out, g=g, g_entropy=g_entropy, **scored._asdict()):
        mode = kernels.FROM_STASH if from_stash else kernels.FROM_LOGITS
        _launch(kernels.gradient_kernel, tile, _matrix(tile.values), _matrix(out), kernels.Scored(*scored), g, g_entropy,
                shape=_shape(tile, plain=g_entropy is None), MODE=mode.value)  # fmt: skip


def stash(tile, out, scored):
    """Writes ``onehot - p``, from which `gradient` can be made later without the logits."""
    if _has_rows(tile, out, **scored._asdict()):
        _launch(kernels.gradient_kernel, tile, _matrix(tile.values), _matrix(out), kernels.Scored(*scored), None, None,
                shape=_shape(tile), MODE=kernels.TO_STASH.value)  # fmt: skip


def policy(tile, out, rows, terms, scored):
    """The fused GRPO kernel: statistics, scores, coefficient and gradient of whole rows in one launch."""
    vectors = {name: getattr(rows, name) for name in kernels.Rows._fields}
    _require(terms.kind == "linear" or rows.w_policy is None or rows.advantages is not None, "advantages are missing")
    _require(rows.ref is None or rows.w_kl is not None, "w_kl is missing")
    if _has_rows(tile, out, **vectors, **scored._asdict()):
        _launch(kernels.policy_kernel, tile, _matrix(tile.values), _matrix(out), kernels.Scored(*scored), kernels.Rows(**vectors),
                numbers=(terms.epsilon_low, terms.epsilon_high, terms.delta, terms.sapo_temperature_pos, terms.sapo_temperature_neg),
                shape=_shape(tile, reads=2, plain=rows.w_entropy is None),
                KIND=KINDS.index(terms.kind), BIAS_CORRECTION=bool(terms.use_bias_correction_kl))  # fmt: skip


def scale_(tensor, scale):
    """``tensor *= scale`` in place; the 0-dim scale stays on the device, and where it is 1 nothing is read or written."""
    _require(tensor.is_contiguous() and scale.numel() == 1 and scale.device == tensor.device, "wanted a contiguous tensor and a number")
    if tensor.numel():
        with _device(tensor):
            kernels.scale_kernel[(-(-tensor.numel() // _SCALE_BLOCK),)](
                tensor, scale, tensor.numel(), BLOCK=_SCALE_BLOCK, num_warps=8
            )


def _launch(kernel, tile, *args, shape, numbers=(), **constants):
    transform = tile.transform
    transforms = transform.logit_scale, transform.softcap or 0.0, transform.temperature
    with _device(tile.values):
        kernel[(tile.values.shape[0],)](
            *args, tile.target, tile.bias, tile.temperature, tile.values.shape[1], *map(float, (*transforms, *numbers)), **constants,
            SOFTCAP=transform.softcap is not None, BLOCK=shape.block, num_warps=shape.warps,
        )  # fmt: skip


def _matrix(tensor):
    return kernels.Matrix(tensor, tensor.stride(0))


def _shape(tile, reads=1, plain=True):
    plain = plain and tile.bias is None and tile.transform.softcap is None
    return launch_shape(tile.values.shape[1], tile.values.element_size(), reads, plain)


def _has_rows(tile, out=None, **vectors):
    """Whether there is anything to launch for. Raises AssertionError before a kernel reads or writes past the end of a tensor."""
    values = tile.values
    rows, columns = values.shape
    acc = torch.float64 if values.dtype == torch.float64 else torch.float32
    wanted = {"stats": ((rows, 4), acc), "bias": ((columns,), acc), "target": ((rows,), torch.int64)}
    for name, tensor in dict(vectors, target=tile.target, bias=tile.bias, temperature=tile.temperature).items():
        shape, dtype = wanted.get(name, ((rows,), acc))
        if tensor is not None:
            good = tensor.shape == shape and tensor.dtype == dtype and tensor.device == values.device and tensor.is_contiguous()
            _require(good, f"{name} must be contiguous {shape} {dtype} on {values.device}, got {tuple(tensor.shape)} {tensor.dtype}")
    for name, matrix in ("values", values), ("out", out):
        if matrix is not None:
            good = matrix.shape == values.shape and matrix.device == values.device
            adjacent = (columns <= 1 or matrix.stride(1) == 1) and (rows <= 1 or matrix.stride(0) >= columns)
            _require(good and adjacent, f"{name} must be {rows} rows apart of {columns} adjacent columns on {values.device}, "
                                        f"got {tuple(matrix.shape)} at strides {matrix.stride()} on {matrix.device}")  # fmt: skip
    if out is not None and rows:
        same = out.dtype == values.dtype and out.data_ptr() == values.data_ptr() and out.stride(0) == values.stride(0)
        _require(same or _end(out) <= values.data_ptr() or _end(values) <= out.data_ptr(), "out must be the tile itself or other memory")
    return rows > 0


def _end(matrix):
    rows, columns = matrix.shape
    return matrix.data_ptr() + ((rows - 1) * matrix.stride(0) + columns) * matrix.element_size()


def _require(holds, message):
    # not an assert statement: `python -O` must not turn a wrong shape into a wild write
    if not holds:
        raise AssertionError(message)


def _device(tensor):
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
