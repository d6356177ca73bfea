"""Errors of a result against the truth, relative to the norm of the whole tensor."""

from .problem import Result

# bf16 logits of one product are off by 2^-9 of their size: gradients by a few percent where the softmax is peaked
LARGEST = {"loss": 0.05, "d_hidden": 0.05, "d_weight": 0.05, "logps_mean": 0.02, "logps_max": 0.1}
SLACK = 3  # and by at most this many times the error of plain PyTorch in the same dtype, where that is known
_STEP = 2**23  # elements compared at a time


def errors(result: Result, exact: Result, loss_scale=0.0, mask=None) -> dict[str, float]:
    """name -> |result - exact| / |exact| of everything that both hold, and the errors of the log-probs, in nats.

    ``loss_scale``: the loss is nearly a signed mean of the advantages; where they cancel, rounded log-probs are all that is left of
    it, and its error is taken relative to this. ``mask`` [B, T]: where log-probs are compared; None is everywhere.
    """
    found = {}
    for name in ("loss", "d_hidden", "d_weight"):
        ours, wanted = getattr(result, name), getattr(exact, name)
        if ours is not None and wanted is not None:
            found[name] = _relative(ours, wanted)
    if "loss" in found:
        size = exact.loss.abs().item()
        found["loss"] *= size / max(size, loss_scale) if size else 1.0
    if result.logps is not None:
        off = (result.logps.double() - exact.logps).abs()
        off = off.flatten() if mask is None else off[mask.bool()]
        found["logps_max"], found["logps_mean"] = (off.max().item(), off.mean().item()) if off.numel() else (0.0, 0.0)
    return found


def accept(name, found, workload, plain=None):
    """Raises AssertionError unless the provider computed what was asked for; ``plain`` holds the errors of plain PyTorch."""
    wanted = {"loss", "d_hidden"} | ({"d_weight"} if workload.trains_head else set()) if workload.gradients else {"logps_max"}
    if not wanted <= found.keys():
        raise AssertionError(f"{name} returned {sorted(found)}, wanted {sorted(wanted)}")
    for quantity, error in found.items():
        allowed = max(LARGEST[quantity], SLACK * (plain or {}).get(quantity, 0.0))
        if not error <= allowed:
            raise AssertionError(f"{name}: error of {quantity} is {error:.2e}, more than {allowed:.0e}")


def worst(found, gradients):
    """The worst relative error of loss and gradients, or of the log-probs where there are no gradients."""
    if not gradients:
        return found.get("logps_max")
    return max((error for quantity, error in found.items() if not quantity.startswith("logps")), default=None)


def _relative(ours, wanted):
    if ours.shape != wanted.shape:
        raise AssertionError(f"shape {tuple(ours.shape)}, wanted {tuple(wanted.shape)}")
    off = size = 0.0
    for a, b in zip(ours.flatten().split(_STEP), wanted.flatten().split(_STEP), strict=True):
        off += (a.double() - b).square().sum().item()
        size += b.double().square().sum().item()
    return (off / size) ** 0.5 if size else float(off > 0)
