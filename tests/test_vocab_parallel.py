"""A vocabulary sharded over two and four gloo processes: everything equals one process, bits repeat, and no rank waits for ever."""

import math

import pytest
import torch
import torch.distributed as dist
from support.cases import usually
from support.problems import Problem, make_problem, run
from support.vocab_shards import SHARDS, V, sharded, spawn

from grpo_kernels import GRPOLossConfig, fused_linear_grpo_loss, linear_logprobs, reference
from grpo_kernels.backends.statistics import finalize, merged
from grpo_kernels.distributed import counted, reduce_metrics
from grpo_kernels.integrations.verl import linear_cross_entropy

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")


def problems():
    """name -> (problem, workspace_bytes): all losses at both levels, and every option of the head."""
    for loss in LOSSES:
        for level in ("token", "sequence"):
            config = GRPOLossConfig(loss_type=loss, importance_sampling_level=level, beta=0.05, max_completion_length=9, epsilon_high=1.3)
            yield f"{loss} {level}", make_problem(V=V, config=config, bias=True), 2**20
    small = 4000  # several tiles, and rows that do not fit the stash
    yield "tiles", make_problem(B=6, V=V, lora=True, bias=True, banned=3), small
    yield "on-policy", make_problem(V=V, on_policy=True), small
    yield "temperature", make_problem(V=V, temperature=True, config=GRPOLossConfig(softcap=5.0, logit_scale=0.7)), small
    yield "entropy", make_problem(V=V, config=GRPOLossConfig(entropy_coef=0.1)), 2**20
    yield "stash", make_problem(B=6, V=V, lora=True, config=GRPOLossConfig(loss_type="vespo", softcap=6.0)), 2**20
    yield "recomputed", make_problem(B=6, V=V, lora=True, config=GRPOLossConfig(loss_type="vespo", entropy_coef=0.1, softcap=6.0)), small
    yield "quantile", make_problem(V=V, config=GRPOLossConfig(top_entropy_quantile=0.4)), 2**20
    for loss in ("gspo", "geo_mean", "dppo_kl", "clip_cov", "kl_cov"):  # which tokens are marked is the same on all ranks
        options = dict(clip_cov_ratio=0.1, clip_cov_lb=-1.0, kl_cov_ratio=0.3, importance_sampling_mode="token_mask")
        yield loss, make_problem(V=V, sampling=True, on_policy=loss == "kl_cov", config=GRPOLossConfig(loss_type=loss, **options)), 2**20
    nothing = make_problem(V=V, bias=True)
    nothing.mask[:] = False
    yield "all masked", nothing, 2**20


def compared(rank, world):
    """[(name, quantity, error, scale)] of what differs from one process by more than rounding."""
    wrong = []
    for name, p, budget in problems():
        for backend in ("torch", "cpu"):
            alone = run(fused_linear_grpo_loss, p, backend=backend, workspace_bytes=budget)
            q, own = sharded(p, rank, world)
            ours, again = (run(fused_linear_grpo_loss, q, backend=backend, workspace_bytes=budget, vocab_parallel_group=dist.group.WORLD)
                           for _ in range(2))  # fmt: skip
            for quantity, x in ours.flat().items():
                truth = alone.flat()[quantity]
                truth = truth[own] if quantity.split()[-1] in ("weight", "bias", "lora_b") else truth
                error, scale = (x - truth).abs().max() if x.numel() else torch.zeros(()), max(1e-3, float(truth.abs().max()))
                if not error <= 1e-9 * scale or not torch.equal(x, again.flat()[quantity]):
                    wrong.append((name, backend, quantity, float(error), scale))
    return wrong


@pytest.mark.parametrize("world", usually([1, 2, 4], 2))
def test_everything_equals_one_process(world, tmp_path):
    assert spawn(tmp_path, world, compared) == [[]] * world


def differences(p, rank, sizes, group, **more):
    """Quantities of a sharded call that are not those of one process."""
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    parts = {name: None if getattr(p, name) is None else getattr(p, name)[own] for name in ("weight", "bias", "lora_b")}
    wrong = []
    for backend in ("torch", "cpu"):
        alone = run(fused_linear_grpo_loss, p, backend=backend, **more).flat()
        ours = run(fused_linear_grpo_loss, Problem(**{**vars(p), **parts}), backend=backend, vocab_parallel_group=group, **more).flat()
        for quantity, x in ours.items():
            truth = alone[quantity][own] if quantity.split()[-1] in ("weight", "bias", "lora_b") else alone[quantity]
            if x.shape != truth.shape or not torch.allclose(x, truth, rtol=1e-9, atol=1e-12):
                wrong.append((backend, quantity))
    return wrong


def other_layouts(rank, world):
    """Interleaved subgroups of four; a rank without a row, in three plans; kept_rows; meshes with a replica and with an empty shard."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    two = GRPOLossConfig(loss_type="vespo", entropy_coef=0.1)
    wrong = []
    p = make_problem(seed=rank % 2, V=V, lora=True, bias=True, config=two if rank % 2 else GRPOLossConfig())
    wrong += differences(p, rank // 2, SHARDS[2], groups[rank % 2], workspace_bytes=4000)
    for config, budget in ((GRPOLossConfig(entropy_coef=0.1), 4000), (two, 4000), (two, 2**20)):
        p = make_problem(V=V, lora=True, bias=True, config=config)
        wrong += differences(p, rank, (20, 18, 15, 0), dist.group.WORLD, workspace_bytes=budget)
        wrong += differences(p, rank, SHARDS[4], dist.group.WORLD, workspace_bytes=budget, kept_rows=p.kept_rows())
    for vocab, mesh, placements in ((V, init_device_mesh("cpu", (2, 2)), [Replicate(), Shard(0)]), (9, init_device_mesh("cpu", (4,)), [Shard(0)])):
        p = make_problem(V=vocab)
        truth = run(fused_linear_grpo_loss, p)
        positional, keywords, _ = p.arguments()
        weight = distribute_tensor(positional[1].detach(), mesh, placements).requires_grad_()
        out = fused_linear_grpo_loss(positional[0], weight, *positional[2:], **keywords)
        out.loss.backward()
        pairs = ((out.loss, truth.loss), (weight.grad.full_tensor(), truth.gradients["weight"]), (positional[0].grad, truth.gradients["hidden"]))
        wrong += [(vocab, i) for i, (x, y) in enumerate(pairs) if not torch.allclose(x.detach(), y, rtol=1e-9, atol=1e-12)]
    return wrong


def test_subgroups_meshes_kept_rows_and_a_rank_without_rows(tmp_path):
    assert spawn(tmp_path, 4, other_layouts) == [[]] * 4


def half_precision(rank, world):
    """bf16: no worse than one process, against float64."""
    found = []
    for config in (GRPOLossConfig(), GRPOLossConfig(loss_type="vespo")):
        p = make_problem(B=6, T=9, D=32, V=V, dtype=torch.bfloat16, config=config)
        truth, alone = run(fused_linear_grpo_loss, p, dtype=torch.float64), run(fused_linear_grpo_loss, p)
        q, own = sharded(p, rank, world)
        ours = run(fused_linear_grpo_loss, q, vocab_parallel_group=dist.group.WORLD)
        for name, x in ours.gradients.items():
            exact, plain = truth.gradients[name], alone.gradients[name]
            exact, plain = (exact[own], plain[own]) if name == "weight" else (exact, plain)
            found.append((name, float((x.double() - exact).norm() / exact.norm()), float((plain.double() - exact).norm() / exact.norm())))
    return found


def test_bf16_is_as_exact_as_one_process(tmp_path):
    for found in spawn(tmp_path, 2, half_precision):
        for name, ours, alone in found:
            assert ours <= 2 * alone + 1e-3, (name, ours, alone)


def log_probs(rank, world):
    """Differentiable outputs, a frozen head, no gradient at all; bytes counted."""
    p = make_problem(B=4, T=6, D=16, V=V, bias=True, lora=True, all_masked_sequence=False)
    q, own = sharded(p, rank, world)
    results = {}
    for name, needs in (("all", ("hidden", "weight", "bias", "lora_a", "lora_b")), ("frozen", ("hidden",)), ("none", ())):
        outputs = []
        for problem, group in ((p, None), (q, dist.group.WORLD)):
            positional, keywords, leaves = problem.arguments(needs=needs)
            with counted() as bytes:
                out = linear_logprobs(positional[0], positional[1], positional[2], mask=positional[4], bias=keywords["bias"],
                                      lora=keywords["lora"], vocab_parallel_group=group)  # fmt: skip
                if needs:
                    (out.logps * torch.linspace(-1, 1, 6) + (0.1 * out.entropy if name == "all" else 0)).sum().backward()
            gradients = [leaves[n].grad for n in needs]
            outputs.append([out.logps.detach(), out.entropy.detach(), *gradients])
        for i, n in enumerate(needs):
            outputs[0][2 + i] = outputs[0][2 + i][own] if n in ("weight", "bias", "lora_b") else outputs[0][2 + i]
        error = max(float((a - b).abs().max()) for a, b in zip(*outputs, strict=True))
        results[name] = error, bytes, p.kept
    return results


def test_log_probs_and_the_bytes_of_the_formula(tmp_path):
    for results in spawn(tmp_path, 2, log_probs):
        for name, (error, bytes, kept) in results.items():
            assert error < 1e-10, name
            assert bytes["statistics"] == 32 * kept
            trained = kept  # no weight of the loss is zero
            assert bytes.get("dH", 0) == (0 if name == "none" else trained * 16 * 8), name
            assert ("dA" in bytes) == (name == "all")
            assert bytes.get("rows", 0) == (kept if name == "all" else 0)
            assert bytes["sizes"] == 128 + 24


def sequence_parallel(rank, world):
    """Hidden states sharded by sequences: the loss of all, the gradient of one's own; packed ones by tokens."""
    found = []
    for config, budget in ((GRPOLossConfig(), 3000), (GRPOLossConfig(loss_type="vespo", entropy_coef=0.1), 3000), (GRPOLossConfig(loss_type="vespo"), 2**20)):
        p = make_problem(B=4, V=V, config=config, lora=True)
        truth = run(fused_linear_grpo_loss, p)
        q, own = sharded(p, rank, world)
        positional, keywords, leaves = q.arguments()
        part = leaves["hidden"].detach()[2 * rank : 2 * rank + 2].clone().requires_grad_()
        with counted() as bytes:
            out = fused_linear_grpo_loss(part, *positional[1:], **keywords, vocab_parallel_group=dist.group.WORLD, sequence_parallel=True,
                                         workspace_bytes=budget)  # fmt: skip
            out.loss.backward()
        errors = [(out.loss - truth.loss).abs(), (part.grad - truth.gradients["hidden"][2 * rank : 2 * rank + 2]).abs().max()]
        errors += [(leaves["weight"].grad - truth.gradients["weight"][own]).abs().max(), (leaves["lora_a"].grad - truth.gradients["lora_a"]).abs().max()]
        rows = p.mask.numel()
        found.append((float(max(errors)), bytes["dH"] == rows * 16 * 8, bytes["hidden"] == rows * 16 * 8 // world and bytes["sizes"] == 280))
    return found


def test_sequence_parallel_hidden_states(tmp_path):
    for found in spawn(tmp_path, 2, sequence_parallel):
        for error, scattered, gathered in found:
            assert error < 1e-10 and scattered and gathered


def verl_call(rank, world):
    """As Megatron calls it: hidden's gradient is left for its own reduction to add up."""
    p = make_problem(V=V)
    truth, (q, own) = linear_logprobs, sharded(p, rank, world)
    results = []
    for function, problem, group in ((truth, p, None), (linear_cross_entropy, q, dist.group.WORLD)):
        positional, _, leaves = problem.arguments()
        if group is None:
            logps, entropy = (x.flatten() for x in function(*positional[:3]))
        else:
            logps, entropy = function(*positional[:3], 1.0, "none", group)
        (logps.sum() + entropy.square().sum()).backward()
        results.append([logps.detach(), entropy.detach(), leaves["hidden"].grad, leaves["weight"].grad])
    results[0][3] = results[0][3][own]
    dist.all_reduce(results[1][2])
    return max(float((a - b).abs().max()) for a, b in zip(*results, strict=True))


def test_verls_function_over_a_sharded_vocabulary(tmp_path):
    assert max(spawn(tmp_path, 2, verl_call)) < 1e-10


def temperatures(rank, world):
    """Gradients of a temperature, and lse, one process's beside the sharded one's; a rank of three holds no row of the vocabulary."""
    out = []
    for config in (GRPOLossConfig(), GRPOLossConfig(entropy_coef=0.3, softcap=5.0)):
        p = make_problem(V=V, bias=True, temperature=True, config=config)
        for q, group in ((p, None), (sharded(p, rank, world)[0], dist.group.WORLD)):
            positional, keywords, _ = q.arguments()
            keywords["temperature"] = keywords["temperature"].clone().requires_grad_()
            loss = fused_linear_grpo_loss(*positional, **keywords, vocab_parallel_group=group, workspace_bytes=4000).loss
            hidden, weight, ids, _, mask = positional
            logps, entropy, lse = linear_logprobs(hidden, weight, ids, mask=mask, temperature=keywords["temperature"],
                                                  vocab_parallel_group=group, return_lse=True)  # fmt: skip
            (loss + (logps * entropy).sum() + lse.square().sum()).backward()
            out.append([keywords["temperature"].grad, hidden.grad, lse.detach()])
    return out


@pytest.mark.parametrize("world", usually([2, 3], 3))
def test_a_temperature_and_lse_over_a_sharded_vocabulary(world, tmp_path):
    for one, ours, one_entropy, ours_entropy in spawn(tmp_path, world, temperatures):
        assert all(x.any() for x in one + one_entropy)
        torch.testing.assert_close([ours, ours_entropy], [one, one_entropy], rtol=1e-9, atol=1e-12)


def dtensors(rank, world):
    """A weight in Shard(0) brings its group; every gradient is a DTensor of the same layout. Other layouts are refused."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))
    p = make_problem(V=V, bias=True)
    truth = run(fused_linear_grpo_loss, p)
    positional, keywords, _ = p.arguments()
    hidden, weight = (x.detach() for x in positional[:2])
    hidden = distribute_tensor(hidden, mesh, [Replicate()]).requires_grad_()
    weight = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    bias = distribute_tensor(keywords["bias"].detach(), mesh, [Shard(0)]).requires_grad_()
    out = fused_linear_grpo_loss(hidden, weight, *positional[2:], **{**keywords, "bias": bias})
    out.loss.backward()
    errors = [(out.loss - truth.loss).abs()]
    for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        assert isinstance(x.grad, DTensor) and x.grad.placements == x.placements
        errors.append((x.grad.full_tensor() - truth.gradients[name]).abs().max())
    messages = []
    for other in (distribute_tensor(positional[1].detach(), mesh, [Shard(1)]), positional[1]):
        try:
            fused_linear_grpo_loss(hidden, other, *positional[2:], **keywords)
        except (TypeError, ValueError) as error:
            messages.append(str(error))
    return float(max(errors)), messages


def test_dtensor_weights(tmp_path):
    for error, messages in spawn(tmp_path, 2, dtensors):
        assert error < 1e-10
        assert "Shard(0)" in messages[0] and "weight must be a DTensor" in messages[1]


def one_pass_bytes(rank, world):
    p = make_problem(B=6, V=V, zero_advantages=True)
    q, _ = sharded(p, rank, world)
    with counted() as bytes:
        run(fused_linear_grpo_loss, q, vocab_parallel_group=dist.group.WORLD, workspace_bytes=3000)
    live = int((p.mask.bool() & (p.advantages != 0).unsqueeze(1)).sum())
    return bytes, p.kept, live


def test_one_pass_exchanges_statistics_once_and_dh_of_what_trains(tmp_path):
    for bytes, kept, live in spawn(tmp_path, 2, one_pass_bytes):
        assert bytes["statistics"] == 32 * kept and bytes["dH"] == live * 16 * 8 and live < kept


def refused(rank, world):
    """Errors of each kind, and afterwards a call that works: nobody is left behind in a collective."""
    p = make_problem(V=V)
    q, _ = sharded(p, rank, world)
    messages = []

    def attempt(problem, **more):
        try:
            run(fused_linear_grpo_loss, problem, vocab_parallel_group=dist.group.WORLD, **more)
            messages.append("no error")
        except (TypeError, ValueError, RuntimeError) as error:
            messages.append(f"{type(error).__name__}: {error}")

    attempt(q, backend="gpu" if rank == 1 else "auto")  # one rank's own mistake
    bad = Problem(**vars(q))
    bad.completion_ids = torch.full_like(bad.completion_ids, V)  # everybody's, found in the data
    attempt(bad)
    other = Problem(**vars(q))
    other.mask = torch.zeros_like(q.mask) if rank == 0 else q.mask  # what must be the same is not
    attempt(other)
    attempt(q, workspace_bytes=10**6 + rank)
    attempt(q)

    # each of these made one rank wait for the other, or both abort
    odd = rank == 1
    attempt(q, backend="cuda" if odd else "auto")
    positional, keywords, _ = q.arguments()
    packed = Problem(**{**vars(q), **{name: getattr(q, name).flatten(0, 1) for name in ("hidden", "completion_ids", "mask", "old_logps")}})
    packed.ref_logps, packed.cu_seqlens = None, torch.arange(0, p.mask.numel() + 1, p.mask.shape[1], dtype=torch.int32)
    packed.cu_seqlens[-1] -= int(odd)
    attempt(packed)
    attempt(q, kept_rows=q.kept_rows()[: -9 if odd else None])
    attempt(q.with_config(loss_type="vespo" if odd else "grpo"))
    attempt(Problem(**{**vars(q), "old_logps": None if odd else q.old_logps}))
    shorter = Problem(**{**vars(q), "hidden": q.hidden[:, : -1 if odd else None]})
    attempt(shorter, sequence_parallel=True)
    attempt(Problem(**{**vars(q), "config": None if odd else q.config}))
    try:
        linear_logprobs(*positional[:3], vocab_parallel_group=dist.group.WORLD, temperature=0.0 if odd else 1.0)
    except (ValueError, RuntimeError) as error:
        messages.append(f"{type(error).__name__}: {error}")

    def together(problem, function=fused_linear_grpo_loss, **changes):
        try:
            run(function, problem.with_config(**changes), data_parallel_group=dist.group.WORLD)
            messages.append("no error")
        except (ValueError, RuntimeError) as error:
            messages.append(f"{type(error).__name__}: {error}")

    ids = Problem(**{**vars(p), "completion_ids": torch.full_like(p.completion_ids, V) if odd else p.completion_ids})
    for function in (fused_linear_grpo_loss, reference.grpo_loss):
        for changes in (dict(top_entropy_quantile=0.5), dict(loss_type="bnpo"), dict(entropy_coef=0.1)):
            together(ids, function, **changes)
    together(p, loss_type="bnpo")
    attempt(q)
    return messages


def test_a_rank_that_raises_leaves_nobody_waiting(tmp_path):
    first, second = spawn(tmp_path, 2, refused)
    assert first[0].startswith("RuntimeError") and "rank 1 " in first[0] and second[0].startswith("ValueError") and "backend" in second[0]
    for messages in (first, second):
        assert "token ids must be in" in messages[1]
        assert "must be the same on all ranks" in messages[2] and "kept: rank 0: 0, rank 1:" in messages[2]
        assert "workspace_bytes must be the same" in messages[3] and "rank 1: 1000001" in messages[3]
        assert messages[4] == messages[-1] == messages[-2] == "no error"
    late = list(zip(first[5:-2], second[5:-2], strict=True))
    for ours, theirs in (late[0], late[1], late[6], late[7]):
        assert ours.startswith("RuntimeError: rank 1 of vocab_parallel_group refused") and "refused" not in theirs
    for (ours, theirs), name in zip(late[2:6], ("length of kept_rows", "config and reference", "which tensors are given", "shape of hidden"), strict=True):
        assert ours == theirs and ours.startswith(f"ValueError: {name} must be the same"), (ours, theirs)
    assert "backend 'cuda'" in late[0][1] and "cu_seqlens" in late[1][1] and "GRPOLossConfig" in late[6][1] and "temperature" in late[7][1]
    assert len(late) == 8 + 6
    for ours, theirs in late[8:]:
        assert ours.startswith("RuntimeError: rank 1 of data_parallel_group refused") and "token ids" in theirs


def averaged(rank, world):
    """Two ranks of two sequences, one of which keeps nothing on rank 1."""
    mask = torch.ones(2, 4) if rank == 0 else torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]])
    first = {"kl": torch.tensor(1.0 + rank), "clip_ratio/low_min": torch.tensor(0.2 + rank), "clip_ratio/high_max": torch.tensor(0.2 + rank)}
    second = {"kl": torch.tensor(1.0 if rank == 0 else math.nan)}
    config = GRPOLossConfig()
    with counted() as bytes:
        results = reduce_metrics(first, mask, config), reduce_metrics(second, mask * (rank == 0), config), reduce_metrics(second, mask * 0, config)
    return [{k: float(v) for k, v in r.items()} for r in results], bytes


def test_metrics_of_all_ranks_count_tokens(tmp_path):
    for (first, second, third), bytes in spawn(tmp_path, 2, averaged):
        assert first["kl"] == pytest.approx((8 * 1 + 1 * 2) / 9)
        assert first["clip_ratio/low_min"] == pytest.approx(0.2) and first["clip_ratio/high_max"] == pytest.approx(1.2)
        assert second == {"kl": 1.0} and third == {"kl": 0.0} and set(bytes) == {"metrics"}


def whole_and_part(rank, **options):
    """Eight sequences, and half of them; the second half keeps less, and the last of the first and of the second half nothing."""
    config = GRPOLossConfig(beta=0.05, max_completion_length=6, epsilon=0.3, **options)
    p = make_problem(B=8, T=6, V=V, config=config)
    p.mask[4:, 2:], p.mask[3] = False, False
    own = slice(4 * rank, 4 * rank + 4)
    names = ("hidden", "completion_ids", "advantages", "mask", "old_logps", "ref_logps")
    return p, Problem(**{**vars(p), **{name: getattr(p, name)[own] for name in names}})


def data_parallel(rank, world):
    """[(options, quantity)] of what two ranks' batches do not give as one: gradients as DDP takes their mean, and metrics."""
    wrong = []
    options = [dict(loss_type=loss, importance_sampling_level=level) for loss in LOSSES for level in ("token", "sequence")]
    options += [dict(loss_type=loss, entropy_coef=0.1, top_entropy_quantile=q) for loss in ("grpo", "dapo", "bnpo") for q in (1.0, 0.5)]
    for option in options:
        for function in (fused_linear_grpo_loss, reference.grpo_loss):
            p, part = whole_and_part(rank, **option)
            one = run(function, p)
            part.num_items = p.kept / world
            ours = run(function, part, data_parallel_group=dist.group.WORLD)
            gradient = ours.gradients["weight"]
            dist.all_reduce(gradient)
            if not torch.allclose(gradient / world, one.gradients["weight"], rtol=1e-9, atol=1e-12):
                wrong.append((option, function.__name__, "gradient"))
            metrics = reduce_metrics(ours.metrics, part.mask, p.config)
            wrong += [(option, name, float(x), float(one.metrics[name])) for name, x in metrics.items() if not torch.allclose(x, one.metrics[name], rtol=1e-9)]
        alone = run(fused_linear_grpo_loss, Problem(**{**vars(part), "num_items": None}))
        policy_loss = reduce_metrics(alone.metrics, part.mask, p.config, shares=False)["policy_loss"]
        if option.get("top_entropy_quantile", 1.0) == 1 and not torch.allclose(policy_loss, one.metrics["policy_loss"], rtol=1e-9):
            wrong.append((option, "own divisors"))
    p, part = whole_and_part(rank, loss_type="bnpo")
    p.mask[:], p.mask[0, 0] = False, True
    part.mask = p.mask[4 * rank : 4 * rank + 4]
    gradient = run(fused_linear_grpo_loss, part, data_parallel_group=dist.group.WORLD).gradients["weight"]
    dist.all_reduce(gradient)
    one_token = torch.allclose(gradient / world, run(fused_linear_grpo_loss, p).gradients["weight"], rtol=1e-9, atol=1e-12)
    return wrong, one_token


def test_ranks_with_different_batches_are_one_process(tmp_path):
    assert spawn(tmp_path, 2, data_parallel) == [([], True)] * 2


def test_merged_statistics():
    """Of parts of a row, in any number, as of the whole; parts of -inf and a part without the target among them."""
    torch.manual_seed(0)
    z = torch.randn(5, 40, dtype=torch.float64) * 5
    z[:, 10:20] = -math.inf
    z[4] = -math.inf
    z[4, 3] = 1.0
    target = torch.tensor([0, 25, 39, 12, 3])

    def statistics(first, end):
        part = z[:, first:end]
        peak = part.amax(1)
        x = (part - peak.masked_fill(peak.isinf(), 0.0).unsqueeze(1)).exp()
        inside = (target >= first) & (target < end)
        column = (target - first).clamp(0, end - first - 1).unsqueeze(1)
        at = torch.where(inside, part.gather(1, column).squeeze(1), -math.inf)
        others = x.sum(1) - torch.where(inside, x.gather(1, column).squeeze(1), 0.0)
        moment = (x * (part - peak.unsqueeze(1))).where(x != 0, 0.0).sum(1)
        return torch.stack([peak, others, moment, at], 1)

    parts = [statistics(a, b) for a, b in ((0, 10), (10, 20), (20, 21), (21, 40))]
    whole = statistics(0, 40)
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        out = parts[order[0]]
        for i in order[1:]:
            out = merged(out, parts[i])
        for a, b in zip(finalize(out), finalize(whole), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, equal_nan=True)
    poisoned = parts[0].clone()
    poisoned[0, 0] = math.nan
    assert merged(poisoned, parts[3])[0, :3].isnan().all()
