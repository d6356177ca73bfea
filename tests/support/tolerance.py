"""How far a result may be from the truth: relative to the norm of the whole tensor, never element by element."""

import torch


def assert_close(name, ours, truth, tolerance, floor=None):
    """|ours - truth| <= tolerance * |truth| + floor (tolerance * 1e-2 by default), NaN nowhere."""
    assert (ours is None) == (truth is None), f"{name}: {ours} against {truth}"
    if truth is None:
        return
    assert ours.shape == truth.shape, f"{name}: {tuple(ours.shape)} against {tuple(truth.shape)}"
    ours, truth = ours.detach().double().cpu(), truth.detach().double().cpu()
    error, size = (ours - truth).norm().item(), truth.norm().item()
    floor = tolerance * 1e-2 if floor is None else floor
    assert error <= tolerance * size + floor, f"{name}: error {error:.3e} of {size:.3e}, allowed {tolerance:.0e}"


def assert_all_close(ours: dict, truth: dict, tolerance, floor=None, hint=""):
    assert ours.keys() == truth.keys(), f"{hint} {sorted(ours)} against {sorted(truth)}"
    for name, value in truth.items():
        assert_close(f"{hint} {name}", ours[name], value, tolerance, floor)


def assert_no_worse_than_torch(name, ours, torch_same_dtype, exact, slack=2.0, floor=1e-6):
    """Our error is at most ``slack`` times PyTorch's own in the same dtype, both against float64."""
    exact, ours = exact.detach().double().cpu(), ours.detach().cpu()
    error, budget = (ours.double() - exact).norm(), (torch_same_dtype.detach().double().cpu() - exact).norm()
    assert torch.isfinite(ours).all(), f"{name} is not finite"
    assert error <= slack * budget + floor * exact.norm() + 1e-30, f"{name}: {error:.3e} against torch's {budget:.3e}"
