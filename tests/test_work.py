"""The matrix products that a call runs, added up from a profiler trace and compared with design.md's counts, exactly.

One product of [N, D] with [D, V] is 2 N V D operations, with N the kept rows; the counts are in units of N V D. V and D are
primes, so that a product of the wrong rows, or one too many, leaves no multiple of V D.
"""


import pytest
import torch
from support.operations import operations
from support.problems import make_problem

from grpo_kernels import GRPOLossConfig, available_backends, fused_linear_grpo_loss, linear_logprobs

V, D = 211, 13
BACKENDS = [name for name in ("torch", "cpu") if available_backends()[name] is None]
every_backend = pytest.mark.parametrize("backend", BACKENDS)

TOKEN = GRPOLossConfig()
SEQUENCE = GRPOLossConfig(loss_type="sapo", importance_sampling_level="sequence")  # no clipping: every sequence trains


def units(problem, rows, *, needs=("hidden", "weight"), grad=True, scale=1.0, **more):
    """Operations of one forward and backward in units of rows * V * D; exact division is part of the claim."""
    positional, keywords, _ = problem.arguments(needs=needs)

    def call():
        with torch.set_grad_enabled(grad):
            loss = fused_linear_grpo_loss(*positional, **keywords, **more).loss
            if loss.requires_grad:
                (loss * scale).backward()

    total = operations(call)
    if rows == 0:
        return total
    assert total % (V * D) == 0, f"{total} operations are no multiple of V D"
    return total / (rows * V * D)


def problem(config=TOKEN, **more):
    return make_problem(D=D, V=V, dtype=torch.float32, config=config, sampling=True,
                        **{"B": 4, "T": 5, "zero_advantages": False, **more})  # fmt: skip


def live_rows(p):
    return int((p.mask & (p.advantages != 0)[:, None]).sum())


def test_the_counter_counts():
    a, b = torch.zeros(3, 5), torch.zeros(5, 7)
    assert operations(lambda: a @ b) == 2 * 3 * 5 * 7
    assert operations(lambda: torch.zeros(3, 7).addmm_(a, b)) == 2 * 3 * 5 * 7
    assert operations(lambda: torch.mm(a, b, out=torch.zeros(3, 7))) == 2 * 3 * 5 * 7
    assert operations(lambda: torch.addmm(torch.zeros(7), a, b)) == 2 * 3 * 5 * 7
    assert operations(lambda: torch.nn.functional.linear(a, b.T, torch.zeros(7))) == 2 * 3 * 5 * 7


@pytest.mark.cover("backend")
@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("workspace", [1, 4000, 20_000, None])
def test_one_pass_is_6_whatever_the_workspace(workspace, dtype, backend):
    p = problem()
    p.dtype = dtype
    more = dict(workspace_bytes=workspace, backend=backend)
    assert units(p, p.kept, **more) == 6
    assert units(p, p.kept, scale=0.25, **more) == 6
    assert units(p, p.kept, kept_rows=p.kept_rows(), **more) == 6
    on_policy = problem(GRPOLossConfig(importance_sampling_level="sequence", loss_type="grpo"), on_policy=True)
    assert units(on_policy, on_policy.kept, **more) == 6


@pytest.mark.cover("config")
@every_backend
@pytest.mark.parametrize(
    "config",
    [GRPOLossConfig(beta=0.1), GRPOLossConfig(entropy_coef=0.1), GRPOLossConfig(loss_type="cispo"),
     GRPOLossConfig(loss_type="sapo"), GRPOLossConfig(loss_type="luspo", delta=2.2), GRPOLossConfig(softcap=5.0)],
    ids=["kl", "entropy", "cispo", "sapo", "luspo", "softcap"],
)  # fmt: skip
def test_every_one_pass_loss_is_6(config, backend):
    p = problem(config, bias=True)
    assert units(p, p.kept, needs=("hidden", "weight", "bias"), backend=backend) == 6


@every_backend
def test_masked_rows_cost_nothing(backend):
    assert units(problem(masked=0.7), problem(masked=0.7).kept, backend=backend) == 6
    p = problem()
    p.mask = torch.zeros_like(p.mask)
    for config in (TOKEN, SEQUENCE):
        p.config = config
        assert units(p, 0, backend=backend) == 0
        assert units(p, 0, backend=backend, needs=("hidden",)) == 0


@pytest.mark.cover("backend")
@every_backend
@pytest.mark.parametrize("workspace", [1, 10_000, None])
@pytest.mark.parametrize("per_token", [False, True])
def test_rows_that_train_nothing_are_2(per_token, workspace, backend):
    p = problem(per_token_advantages=per_token)
    A = p.advantages if per_token else p.advantages[:, None]
    A[1 if not per_token else slice(None), slice(None) if not per_token else slice(3, None, 3)] = 0.0
    live = int((p.mask & (A != 0)).sum())
    assert 0 < live < p.kept
    more = dict(workspace_bytes=workspace, backend=backend)
    assert units(p, 1, **more) == 6 * live + 2 * (p.kept - live)
    # a KL or an entropy bonus trains every kept row
    assert units(p.with_config(beta=0.1), p.kept, **more) == 6
    assert units(p.with_config(entropy_coef=0.1), p.kept, **more) == 6
    p.advantages = torch.zeros_like(p.advantages)
    assert units(p, p.kept, **more) == 2


@every_backend
def test_a_factor_of_zero_trains_nothing(backend):
    p = problem(ratio="token")
    p.importance_sampling_ratio[:, ::2] = 0.0
    live = int((p.mask & (p.importance_sampling_ratio != 0)).sum())
    assert 0 < live < p.kept and units(p, 1, backend=backend) == 6 * live + 2 * (p.kept - live)


@pytest.mark.cover("backend")
@every_backend
@pytest.mark.parametrize("workspace", [1, 10_000, None])
@pytest.mark.parametrize("config", [TOKEN, SEQUENCE, GRPOLossConfig(loss_type="vespo"), GRPOLossConfig(beta=0.1)],
                         ids=["token", "sequence", "vespo", "kl"])  # fmt: skip
def test_a_frozen_head_is_4(config, workspace, backend):
    p = problem(config)
    assert units(p, p.kept, needs=("hidden",), workspace_bytes=workspace, backend=backend) == 4
    assert units(p, p.kept, needs=("hidden",), workspace_bytes=workspace, backend=backend, scale=-2.0) == 4


@pytest.mark.cover("backend")
@every_backend
@pytest.mark.parametrize("workspace", [1, 10_000, None])
def test_frozen_hidden_states_are_4(workspace, backend):
    p = problem()
    assert units(p, p.kept, needs=("weight",), workspace_bytes=workspace, backend=backend) == 4
    assert units(problem(bias=True), p.kept, needs=("bias",), workspace_bytes=workspace, backend=backend) == 2


@pytest.mark.exhaustive_in_the_interpreter
@pytest.mark.cover
@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_phases_are_6_within_the_stash_and_8_beyond(dtype, backend):
    for config in (SEQUENCE, GRPOLossConfig(loss_type="vespo"), GRPOLossConfig(top_entropy_quantile=1e-9, entropy_coef=0.1)):
        p = problem(config, B=8, T=12)
        p.dtype = dtype
        trained = p.kept
        if config.top_entropy_quantile < 1:
            p = p.with_config(beta=0.1)  # every kept row then has a gradient
        assert units(p, trained, backend=backend) == 6
        assert units(p, trained, workspace_bytes=1, backend=backend) == 8
        rows = p.kept * V * dtype.itemsize
        counts = [units(p, trained, workspace_bytes=int(factor * rows), backend=backend) for factor in (0.5, 1.5, 3.5)]
        assert counts == sorted(counts, reverse=True) and any(6 < count < 8 for count in counts)


@every_backend
def test_frozen_hidden_states_in_two_phases(backend):
    p = problem(SEQUENCE)
    assert units(p, p.kept, needs=("weight",), backend=backend) == 4
    assert units(p, p.kept, needs=("weight",), backend=backend, workspace_bytes=1) == 6


@pytest.mark.cover("backend")
@every_backend
@pytest.mark.parametrize("config", [TOKEN, SEQUENCE], ids=["token", "sequence"])
@pytest.mark.parametrize("workspace", [1, 10_000, None])
def test_without_a_gradient_it_is_2(workspace, config, backend):
    p = problem(config)
    assert units(p, p.kept, grad=False, workspace_bytes=workspace, backend=backend) == 2
    assert units(p, p.kept, needs=(), workspace_bytes=workspace, backend=backend) == 2


@every_backend
def test_sequences_that_train_nothing_at_sequence_level_are_2(backend):
    p = problem(SEQUENCE)
    p.advantages[1] = p.advantages[3] = 0.0
    live = live_rows(p)
    assert 0 < live < p.kept
    assert units(p, 1, backend=backend) == 6 * live + 2 * (p.kept - live)
    assert units(p, 1, backend=backend, workspace_bytes=1) == 8 * live + 2 * (p.kept - live)
    assert units(p, 1, backend=backend, needs=("hidden",)) == 4 * live + 2 * (p.kept - live)
    # a clipped sequence has no gradient either, which the second phase sees before it computes
    p = p.with_config(loss_type="dapo", epsilon=0.99, epsilon_high=50.0)
    assert units(p, 1, backend=backend, workspace_bytes=1) == 8 * live + 2 * (p.kept - live)
    p.old_logps[0] -= 6.0
    p.advantages[0] = 1.0
    clipped = int(p.mask[0].sum())
    assert units(p, 1, backend=backend, workspace_bytes=1) == 8 * (live - clipped) + 2 * (p.kept - live + clipped)


@every_backend
@pytest.mark.parametrize("workspace", [1, None])
def test_linear_logprobs(workspace, backend):
    p = problem()
    for needs, loss, expected in (
        (("hidden", "weight"), lambda o: o.logps.sum() + o.entropy.sum(), {1: 8, None: 6}),
        (("hidden", "weight"), lambda o: o.logps.sum(), {1: 8, None: 6}),
        (("hidden",), lambda o: o.logps.sum(), {1: 4, None: 4}),
        ((), lambda o: o.logps.sum(), {1: 2, None: 2}),
        (("hidden", "weight"), lambda o: (o.logps * 0).sum(), {1: 2, None: 2}),
    ):
        _, _, leaves = p.arguments(needs=needs)

        def call(leaves=leaves, loss=loss):
            out = linear_logprobs(leaves["hidden"], leaves["weight"], p.completion_ids, mask=p.mask, backend=backend,
                                  workspace_bytes=workspace)  # fmt: skip
            value = loss(out)
            if value.requires_grad:
                value.backward()

        assert operations(call) / (p.kept * V * D) == expected[workspace], (needs, expected)


@every_backend
def test_rows_without_a_gradient_are_dropped_from_the_second_phase(backend):
    p = problem()
    _, _, leaves = p.arguments()
    weights = torch.zeros(p.mask.shape)
    weights[1:3] = 1.0
    live = int(p.mask[1:3].sum())

    def call():
        out = linear_logprobs(leaves["hidden"], leaves["weight"], p.completion_ids, mask=p.mask, workspace_bytes=1, backend=backend)
        (out.logps * weights).sum().backward()

    assert operations(call) == (2 * p.kept + 6 * live) * V * D


@every_backend
def test_an_adapter_adds_its_own_products_only(backend):
    """Rank r: never V D of a merged head; r (V + D) per row and product instead."""
    r = 3
    for config, workspace in ((TOKEN, None), (TOKEN, 1), (SEQUENCE, None), (SEQUENCE, 1)):
        p = problem(config, lora=True)
        rows = p.kept
        head = {(SEQUENCE, 1): 8}.get((config, workspace), 6)
        positional, keywords, _ = p.arguments(needs=("hidden", "weight", "lora_a", "lora_b"))
        total = operations(lambda a=positional, k=keywords, w=workspace: fused_linear_grpo_loss(
            *a, **k, backend=backend, workspace_bytes=w).loss.backward())  # fmt: skip
        adapter = total - head * rows * V * D
        passes = head // 2
        assert 0 < adapter <= 2 * rows * r * (V + 2 * D) * passes, (config, workspace)
