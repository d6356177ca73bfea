"""`grpo_loss_from_logits` against the reference: the loss, its gradient in place or not, slices, errors."""

import pytest
import torch
from support.loss_calls import PATHS, every_backend, on_the_cpu
from support.problems import draw_problem, make_problem
from support.seeds import each_seed
from support.tolerance import assert_all_close, assert_close

from grpo_kernels import GRPOLossConfig, grpo_loss_from_logits, reference


def reference_from_logits(logits, *positional, **keywords):
    """The reference with the logits as hidden states and the identity as head."""
    head = torch.eye(logits.shape[-1], dtype=logits.dtype)
    return reference.grpo_loss(logits, head, *positional, **keywords)


def logits_problem(p):
    """(logits, positional, keywords) of a problem, with the head's work already done."""
    positional, keywords, _ = p.arguments(needs=())
    hidden = positional[0].where(p.mask.bool().unsqueeze(-1), 0.0)
    z = reference.hidden_to_logits(hidden, positional[1], keywords.pop("bias"), keywords.pop("lora"))
    return z, positional[2:], keywords


@on_the_cpu
@every_backend
@pytest.mark.parametrize("inplace", [False, True])
@each_seed(0, 160, usual=30)
def test_loss_from_logits_equals_the_reference(seed, inplace, backend):
    """The caller holds the logits: same loss, and their gradient, written over them only if that was asked for."""
    p = draw_problem(seed)
    if p.bias is not None and not p.bias.isfinite().all():
        p.bias = None  # the identity as head cannot make a logit of -inf
    z, positional, keywords = logits_problem(p)
    results = []
    for function, more in ((grpo_loss_from_logits, dict(backend=backend, inplace_backward=inplace)), (reference_from_logits, {})):
        leaf = z.clone().requires_grad_()
        logits = leaf * 1.0  # what arrives in practice is no leaf, and a leaf cannot be overwritten
        out = function(logits, *positional, **keywords, **more)
        assert torch.equal(logits, z), "the forward must not write"
        (out.loss * 0.25).backward()
        results.append({"loss": out.loss, "logps": out.logps, "entropy": out.entropy, **out.metrics, "dz": leaf.grad})
        if function is grpo_loss_from_logits:
            assert inplace or torch.equal(logits, z)
    assert_all_close(*results, 1e-10)


@on_the_cpu
@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_from_logits_of_a_shifted_slice(dtype, backend):
    """logits[:, :-1] of a model's output, a vocabulary padded on the right, in the dtype they come in."""
    p = make_problem(B=4, T=7, V=61, dtype=dtype, banned=0, config=PATHS["one pass"])
    z, positional, keywords = logits_problem(p)
    for function in (grpo_loss_from_logits, reference_from_logits):
        whole = torch.full((4, 8, 64), 7.0, dtype=dtype).index_put((torch.tensor(0),), torch.tensor(3.0, dtype=dtype))
        whole[:, :-1, :61] = z.detach()
        whole.requires_grad_()
        more = dict(backend=backend) if function is grpo_loss_from_logits else {}
        out = function(whole[:, :-1, :61], *positional, **keywords, **more)
        out.loss.backward()
        if function is grpo_loss_from_logits:
            ours, loss = whole.grad.clone(), out.loss
    assert ours.dtype == dtype and not ours[:, -1].any() and not ours[..., 61:].any()
    assert_close("loss", loss, out.loss, 1e-5)
    assert_close("dlogits", ours, whole.grad, 1e-5 if dtype == torch.float32 else 8e-3)


@on_the_cpu
@every_backend
@pytest.mark.parametrize("inplace", [False, True])
def test_a_slice_without_tokens_is_zero(inplace, backend):
    """Its columns are apart, and contiguous() leaves them so: a tensor without elements counts as contiguous."""
    logits = torch.ones(3, 1, 22, requires_grad=True)
    nothing = torch.ones(3, 0)
    out = grpo_loss_from_logits(logits[:, :0, ::2], nothing.long(), torch.ones(3), nothing, backend=backend, inplace_backward=inplace)
    out.loss.backward()
    assert out.loss == 0 and not logits.grad.any()


@on_the_cpu
@every_backend
def test_loss_from_logits_errors_and_empty_batches(backend):
    p = make_problem(B=3, T=4, V=11, dtype=torch.float32)
    z, positional, keywords = logits_problem(p)
    good = dict(zip(("logits", "completion_ids", "advantages", "mask"), (z, *positional), strict=True), **keywords)
    for wrong, error, said in (
        (dict(logits=None), TypeError, "logits.*NoneType"), (dict(logits=z.long()), TypeError, "logits.*int64"),
        (dict(logits=z[0]), ValueError, r"logits.*\[B, T, V\].*\[4, 11\]"),
        (dict(logits=z[..., :0]), ValueError, r"logits.*\[3, 4, 0\]"),
        (dict(completion_ids=positional[0] + 11), ValueError, "token ids.*V = 11"),
        (dict(mask=p.mask[:2]), ValueError, r"mask.*\[3, 4\].*\[2, 4\]"),
        (dict(config=GRPOLossConfig(beta=1.0), ref_logps=None), ValueError, "ref_logps.*beta"),
        (dict(backend="cudnn"), ValueError, "backend.*'cudnn'"), (dict(workspace_bytes=-1), ValueError, "workspace_bytes"),
    ):  # fmt: skip
        with pytest.raises(error, match=said):
            grpo_loss_from_logits(**{**good, **wrong})
    for shape in ((0, 4), (3, 0), (3, 4)):
        logits = torch.zeros(*shape, 11, requires_grad=True)
        out = grpo_loss_from_logits(logits, torch.zeros(shape, dtype=torch.long), torch.ones(shape[0]), torch.zeros(shape),
                                    config=PATHS["sequence"], ref_logps=torch.zeros(shape), backend=backend)  # fmt: skip
        out.loss.backward()
        assert out.loss == 0 and not logits.grad.any()
    bad = {**good, "completion_ids": torch.full((3, 4), 99), "kept_rows": p.kept_rows()}
    assert grpo_loss_from_logits(**bad, backend=backend).loss.isnan()
