"""Errors of a result against the truth, relative to the norm of the whole tensor."""

from .problem import Result

# bf16 logits of one product are off by 2^-9 of their size: gradients by a few percent where the softmax is peaked
LARGEST = 0.05
_STEP = 2**23  # elements compared at a time


def errors(result: Result, exact: Result) -> dict[str, float]:
    """name -> |result - exact| / |exact| of everything that both hold, and the largest error of a log-prob."""
    found = {}
    for name in ("loss", "d_hidden", "d_weight"):
        ours, wanted = getattr(result, name), getattr(exact, name)
        if ours is not None and wanted is not None:
            found[name] = _relative(ours, wanted)
    if result.logps is not None:
        where = result.logps != 0  # masked ones are 0 in ours and arbitrary elsewhere
        found["logps_max"] = (result.logps.double() - exact.logps)[where & (exact.logps != 0)].abs().max().item()
    return found


def accept(name, found, gradients):
    """Raises unless the provider computed what was asked for."""
    wanted = {"loss", "d_hidden"} if gradients else {"logps_max"}
    if not wanted <= found.keys():
        raise AssertionError(f"{name} returned {sorted(found)}, wanted {sorted(wanted)}")
    for quantity, error in found.items():
        allowed = 10 * LARGEST if quantity == "logps_max" else LARGEST
        if not error <= allowed:
            raise AssertionError(f"{name}: error of {quantity} is {error:.2e}, more than {allowed:.0e}")


def _relative(ours, wanted):
    if ours.shape != wanted.shape:
        raise AssertionError(f"shape {tuple(ours.shape)}, wanted {tuple(wanted.shape)}")
    off = size = 0.0
    for a, b in zip(ours.flatten().split(_STEP), wanted.flatten().split(_STEP), strict=True):
        off += (a.double() - b).square().sum().item()
        size += b.double().square().sum().item()
    return (off / size) ** 0.5
