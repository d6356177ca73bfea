"""Random calls of the fused loss, the paths through it and the backends that can run here."""

import random

import pytest

from grpo_kernels import GRPOLossConfig, available_backends, fused_linear_grpo_loss
from grpo_kernels.backends import triton
from support.problems import DEVICE, HEAD_LEAVES, draw_problem, make_problem, packed, run
from support.tolerance import assert_all_close

NAMES = ("torch", "cpu", "triton") if DEVICE == "cpu" else ("torch", "triton", "cuda")
BACKENDS = [name for name, reason in available_backends().items() if reason is None and name in NAMES]
on_the_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="its tensors are on the CPU")
WORKSPACES = (1, 700, 3000, 20_000, 300_000, None)

# one config for each way through the code: one pass on- and off-policy, two phases for each of their reasons
PATHS = {
    "one pass": GRPOLossConfig(beta=0.05, delta=2.2),
    "one pass, entropy": GRPOLossConfig(loss_type="cispo", entropy_coef=0.1, epsilon_high=2.1),
    "sapo": GRPOLossConfig(loss_type="sapo"),
    "sequence": GRPOLossConfig(loss_type="grpo", importance_sampling_level="sequence", beta=0.05),
    "vespo": GRPOLossConfig(loss_type="vespo"),
    "quantile": GRPOLossConfig(top_entropy_quantile=0.57, entropy_coef=-0.2),
    "off-policy mask": GRPOLossConfig(loss_type="bnpo", off_policy_mask_threshold=0.1),
}
every_path = pytest.mark.parametrize("config", PATHS.values(), ids=PATHS)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def interpreted(backend):
    """Milliseconds for a row, tens of them for a small tile."""
    return backend == "triton" and triton.interpreted()


def random_needs(rng, problem):
    """Mostly everything; sometimes a frozen head, frozen hidden states, one leaf alone, nothing."""
    rest = tuple(n for n in HEAD_LEAVES if n != "hidden")
    choices = [HEAD_LEAVES, HEAD_LEAVES, ("hidden",), rest, ("weight",), ("lora_a", "lora_b"), ("hidden", "lora_a"), ("bias",), ()]
    needs = rng.choice(choices)
    return tuple(n for n in needs if n in problem.leaves)


def draw_call(seed, dtype, backend):
    """(problem, which leaves need a gradient, keywords, gradient of the loss)."""
    rng = random.Random(seed * 7919)
    p = draw_problem(seed, dtype)
    more = dict(backend=backend, workspace_bytes=rng.choice(WORKSPACES))
    if rng.random() < 0.25:
        more["kept_rows"] = p.kept_rows()
    return p, random_needs(rng, p), more, rng.choice([1.0, 0.25, -3.0])


def assert_kept_rows_and_layouts_agree(config, backend):
    """A loss of padded, packed and given rows is one loss, and so are its gradients."""
    p = make_problem(B=5, T=9, V=41, config=config, sampling=True, ratio="token", garbage=True)
    plain = run(fused_linear_grpo_loss, p, backend=backend)
    given = run(fused_linear_grpo_loss, p, backend=backend, kept_rows=p.kept_rows())
    assert_all_close(given.flat(), plain.flat(), 1e-12)
    q = packed(p)
    flat = run(fused_linear_grpo_loss, q, backend=backend)
    again = run(fused_linear_grpo_loss, q, backend=backend, kept_rows=q.kept_rows())
    assert_all_close(again.flat(), flat.flat(), 1e-12)
    for result, kept in ((plain, p.mask), (flat, q.mask)):
        result.logps, result.entropy = result.logps[kept], result.entropy[kept]
        result.gradients["hidden"] = result.gradients["hidden"][kept]
    assert_all_close(flat.flat(), plain.flat(), 1e-11)
