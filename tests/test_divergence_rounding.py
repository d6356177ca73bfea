"""float32 divergences of far distributions against float64: what is rounded with logits of tens must not show."""

import pytest
import torch
from support.tolerance import assert_no_worse_than_torch

from grpo_kernels import linear_divergence, reference


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("std", [10, 30])
@pytest.mark.parametrize("workspace_bytes", [None, 200_000])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_a_row_gradient_adds_up_to_0_whatever_lse_is_rounded_to(kind, workspace_bytes, std, backend):
    g = torch.Generator().manual_seed(0)
    hidden, teacher = (torch.randn(64, 64, generator=g) * std / 8 for _ in range(2))
    weight, teacher_weight = (torch.randn(503, 64, generator=g) for _ in range(2))

    def plain(dtype):
        leaf = hidden.to(dtype).requires_grad_()
        z, y = leaf @ weight.to(dtype).T, teacher.to(dtype) @ teacher_weight.to(dtype).T
        found = reference.divergence_from_logits(z, y, kind, 0.3)
        return found.detach(), *torch.autograd.grad(found.sum(), leaf)

    leaf = hidden.clone().requires_grad_()
    found = linear_divergence(
        leaf, weight.clone().requires_grad_(), teacher, teacher_weight, kind=kind, beta=0.3, workspace_bytes=workspace_bytes, backend=backend
    ).divergence  # fmt: skip
    ours = found.detach(), *torch.autograd.grad(found.sum(), leaf)
    for name, *values in zip(("divergence", "gradient"), ours, plain(torch.float32), plain(torch.float64), strict=True):
        assert_no_worse_than_torch(name, *values)
