"""Both heads' vocabulary shared by gloo processes: divergences, losses, entropies and gradients are those of one process, bits repeat,
and no rank waits for ever."""

import math

import pytest
import torch
import torch.distributed as dist
from support.cases import usually
from support.vocab_shards import SHARDS, V, spawn

from grpo_kernels import GRPOLossConfig, fused_linear_distillation_loss, fused_linear_grpo_loss, linear_divergence

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

B, T, D, E = 4, 7, 16, 11
KINDS = {"forward_kl": {}, "reverse_kl": {}, "jsd": {"beta": 0.3}}
SMALL = 4000  # several tiles, and rows that do not fit the stash
ROWS = ("weight", "bias", "lora_b", "teacher_weight", "teacher_bias", "ref_weight", "ref_bias")  # of the vocabulary


def part(tensors, rank, world):
    """The same arguments with this rank's rows of the vocabulary."""
    sizes = SHARDS[world]
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    return {n: x[own] if n in ROWS and x is not None else x for n, x in tensors.items()}, own


def arguments(seed=0, bias=True, banned=5, lora=False, close=False):
    """Fresh tensors; both heads ban the last columns, the teacher more of them; ``close``: it is nearly the student."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, std=1.0):
        return torch.randn(*shape, generator=g, dtype=torch.float64) * std

    t = dict(hidden=normal(B, T, D), weight=normal(V, D, std=2 * D**-0.5), teacher_hidden=normal(B, T, E),
             teacher_weight=normal(V, E, std=2 * E**-0.5), bias=None, teacher_bias=None)  # fmt: skip
    if close:
        t["teacher_hidden"], t["teacher_weight"] = t["hidden"] + normal(B, T, D, std=1e-4), t["weight"].clone()
    elif bias:
        t["bias"], t["teacher_bias"] = normal(V), normal(V)
        for x in (t["bias"], t["teacher_bias"]):
            x[V - banned :] = -math.inf
        t["bias"][:3] = -math.inf if banned else 0.0  # the first rank's
        t["teacher_bias"][:3] = -math.inf if banned else 0.0
    if lora:
        t["lora_a"], t["lora_b"] = normal(3, D, std=D**-0.5), normal(V, 3)
    t["mask"] = torch.rand(B, T, generator=g) < 0.7
    t["mask"][-1] = False
    t["weights"] = (normal(B, T)).where(torch.rand(B, T, generator=g) < 0.7, 0.0)
    t["g"] = normal(B, T).where(torch.rand(B, T, generator=g) < 0.7, 0.0)
    return t


def compute(function, tensors, needs, **options):
    """[(name, value or gradient)] of one call."""
    t = dict(tensors)
    leaves = {n: t[n].clone().requires_grad_() for n in needs if t.get(n) is not None}
    t |= leaves
    g, weights, lora = t.pop("g"), t.pop("weights"), (t.pop("lora_a", None), t.pop("lora_b", None), 0.5)
    positional = [t.pop(n) for n in ("hidden", "weight", "teacher_hidden", "teacher_weight")]
    if function is fused_linear_distillation_loss:
        options = {**options, "weights": weights}
    out = function(*positional, **t, lora=None if lora[0] is None else lora, **options)
    scalar = out.loss if hasattr(out, "loss") else (out.divergence * g).sum()
    if leaves:
        (1.3 * scalar).backward()
    found = [(name, value.detach()) for name, value in out._asdict().items()]
    return found + [(f"gradient of {n}", x.grad) for n, x in leaves.items()]


LEAVES = ("hidden", "weight", "bias", "lora_a", "lora_b")
SETTINGS = {
    "all": (dict(), LEAVES, {}),
    "tiles": (dict(lora=True), LEAVES, dict(workspace_bytes=SMALL)),
    "transforms": (dict(banned=0), LEAVES, dict(softcap=5.0, logit_scale=0.7, teacher_softcap=8.0, teacher_logit_scale=1.3, temperature=0.8)),
    "frozen head": (dict(), ("hidden",), {}),
    "frozen hidden": (dict(bias=False), ("weight",), dict(workspace_bytes=SMALL)),
    "no gradient": (dict(), (), {}),
    "nearly equal": (dict(close=True), LEAVES, {}),
}


def different(name, alone, ours, own, scale=1e-9):
    wrong = []
    for (quantity, truth), (_, x) in zip(alone, ours, strict=True):
        truth = truth[own] if quantity.removeprefix("gradient of ") in ROWS else truth
        size = max(float(truth.abs().max()) if truth.numel() else 0.0, 1e-6)
        if x.shape != truth.shape or not (x - truth).abs().le(scale * size).all():
            wrong.append((name, quantity, float((x - truth).abs().max()), size))
    return wrong


def compared(rank, world):
    """[(setting, quantity, error, size)] of what differs from one process by more than rounding, or from call to call at all."""
    wrong = []
    for setting, (draw, needs, options) in SETTINGS.items():
        tensors = arguments(**draw)
        own_tensors, own = part(tensors, rank, world)
        for kind, more in KINDS.items():
            for function in (linear_divergence, fused_linear_distillation_loss):
                name, options_ = f"{setting} {kind} {function.__name__}", {**options, **more, "kind": kind}
                alone = compute(function, tensors, needs, **options_)
                ours, again = (compute(function, own_tensors, needs, **options_, vocab_parallel_group=dist.group.WORLD) for _ in range(2))
                wrong += different(name, alone, ours, own)
                wrong += [(name, quantity, "bits") for (quantity, x), (_, y) in zip(ours, again, strict=True) if not torch.equal(x, y)]
                values = dict(alone)["divergence"]
                if not (values.isfinite().all() and (values[tensors["mask"]] > 0).all()):
                    wrong.append((name, "the problem itself"))
    return wrong


@pytest.mark.parametrize("world", usually([2, 3], 2))
def test_everything_equals_one_process(world, tmp_path):
    """Of three ranks the last has no row of the vocabulary."""
    assert spawn(tmp_path, world, compared) == [[]] * world


def banned_by_one(rank, world):
    """A column that the teacher alone bans makes KL(p || q) inf on all ranks, whoever has it; the others stay finite."""
    found = {}
    for column in (1, V - 2):
        tensors = arguments(banned=0)
        tensors["teacher_bias"][column] = -math.inf
        own_tensors, own = part(tensors, rank, world)
        for kind, more in KINDS.items():
            ours = dict(compute(linear_divergence, own_tensors, (), kind=kind, **more, vocab_parallel_group=dist.group.WORLD))
            alone = dict(compute(linear_divergence, tensors, (), kind=kind, **more))
            kept = ours["divergence"][tensors["mask"]]
            torch.testing.assert_close(ours["divergence"], alone["divergence"], rtol=1e-9, atol=1e-12)
            found[column, kind] = bool(kept.isinf().all()), bool(kept.isfinite().all())
    return found


def test_a_column_that_the_teacher_alone_bans(tmp_path):
    for found in spawn(tmp_path, 3, banned_by_one):
        for (_, kind), (infinite, finite) in found.items():
            assert (infinite, finite) == ((True, False) if kind == "reverse_kl" else (False, True)), kind


def sequence_parallel(rank, world):
    """Both hidden states sharded by sequences: the loss of all, the gradient of one's own."""
    errors = []
    tensors = arguments(lora=True)
    own_tensors, own = part(tensors, rank, world)
    mine = slice(B // world * rank, B // world * (rank + 1))
    for kind, more in KINDS.items():
        for function in (linear_divergence, fused_linear_distillation_loss):
            for budget in (SMALL, 2**20):
                options = dict(kind=kind, workspace_bytes=budget, **more)
                alone = dict(compute(function, tensors, LEAVES, **options))
                split = {**own_tensors, **{n: tensors[n][mine] for n in ("hidden", "teacher_hidden")}}
                ours = dict(compute(function, split, LEAVES, **options, vocab_parallel_group=dist.group.WORLD, sequence_parallel=True))
                alone["gradient of hidden"] = alone["gradient of hidden"][mine]
                errors += different(f"{kind} {function.__name__} {budget}", list(alone.items()), list(ours.items()), own)
    return errors


def test_sequence_parallel_hidden_states(tmp_path):
    assert spawn(tmp_path, 2, sequence_parallel) == [[]] * 2


def exact_kl(rank, world):
    """The exact KL inside of the GRPO loss, in one pass and in two phases."""
    wrong = []
    for loss, coef, budget in (("dapo", 0.0, SMALL), ("grpo", 0.0, 2**20), ("vespo", 0.0, SMALL), ("cispo", 0.1, 2**20)):
        tensors = arguments(lora=True)
        g = torch.Generator().manual_seed(5)
        ids = torch.randint(3, V - 5, (B, T), generator=g)  # of no banned column
        advantages = torch.randn(B, generator=g, dtype=torch.float64)
        old = torch.rand(B, T, generator=g, dtype=torch.float64) - 4
        config = GRPOLossConfig(loss_type=loss, beta=0.3, kl_estimator="exact", entropy_coef=coef, epsilon_high=1.3)
        results = []
        for t, group in ((tensors, None), (part(tensors, rank, world)[0], dist.group.WORLD)):
            leaves = {n: t[n].clone().requires_grad_() for n in LEAVES}
            out = fused_linear_grpo_loss(
                leaves["hidden"], leaves["weight"], ids, advantages, t["mask"], bias=leaves["bias"], old_logps=old, config=config,
                lora=(leaves["lora_a"], leaves["lora_b"], 0.5), ref_hidden=t["teacher_hidden"], ref_weight=t["teacher_weight"],
                ref_bias=t["teacher_bias"], vocab_parallel_group=group, workspace_bytes=budget,
            )  # fmt: skip
            out.loss.backward()
            results.append([("loss", out.loss.detach()), ("logps", out.logps), ("kl", out.metrics["kl"]),
                            *((f"gradient of {n}", x.grad) for n, x in leaves.items())])  # fmt: skip
        wrong += different(f"{loss} {coef}", *results, part(tensors, rank, world)[1])
        wrong += [] if dict(results[0])["kl"] > 0 else [(loss, "no KL")]
    return wrong


@pytest.mark.parametrize("world", usually([2, 3], 2))
def test_the_exact_kl_of_a_grpo_loss(world, tmp_path):
    assert spawn(tmp_path, world, exact_kl) == [[]] * world


def dtensors(rank, world):
    """Both weights in Shard(0): they bring their group, and the student's gradient is a DTensor of the same layout."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mesh, tensors, errors = init_device_mesh("cpu", (world,)), arguments(bias=False), []
    for kind, more in KINDS.items():
        alone = dict(compute(fused_linear_distillation_loss, tensors, ("hidden", "weight"), kind=kind, **more))
        weight, teacher_weight = (distribute_tensor(tensors[n], mesh, [Shard(0)]) for n in ("weight", "teacher_weight"))
        hidden, weight = tensors["hidden"].clone().requires_grad_(), weight.requires_grad_()
        out = fused_linear_distillation_loss(hidden, weight, tensors["teacher_hidden"], teacher_weight, mask=tensors["mask"],
                                             weights=tensors["weights"], kind=kind, **more)  # fmt: skip
        (1.3 * out.loss).backward()
        assert isinstance(weight.grad, DTensor) and weight.grad.placements == weight.placements
        found = dict(loss=out.loss.detach(), divergence=out.divergence, entropy=out.entropy)
        found |= {"gradient of hidden": hidden.grad, "gradient of weight": weight.grad.full_tensor()}
        errors += different(kind, list(alone.items()), list(found.items()), slice(None))
    return errors


def test_dtensor_weights(tmp_path):
    assert spawn(tmp_path, 2, dtensors) == [[]] * 2


def refused(rank, world):
    """Errors of one rank or of all, each followed by a call that works: nobody is left behind in a collective."""
    tensors = part(arguments(), rank, world)[0]
    odd, messages = rank == 1, []

    def attempt(changes=None, function=linear_divergence, **options):
        try:
            compute(function, {**tensors, **(changes or {})}, LEAVES, **{"kind": "jsd", **options}, vocab_parallel_group=dist.group.WORLD)
            messages.append("no error")
        except (TypeError, ValueError, RuntimeError) as error:
            messages.append(f"{type(error).__name__}: {error}")

    fewer = tensors["teacher_weight"][: -1 if odd else None]
    for function in (linear_divergence, fused_linear_distillation_loss):
        attempt(dict(teacher_weight=fewer), function)
        attempt(dict(teacher_bias=tensors["teacher_bias"][:-1] if odd else tensors["teacher_bias"]), function)
        attempt(dict(teacher_hidden=tensors["teacher_hidden"][:, : -1 if odd else None]), function)
        attempt(dict(teacher_weight=tensors["teacher_weight"].float() if odd else tensors["teacher_weight"]), function)
        attempt(None, function)
    one_sided = len(messages)
    for function in (linear_divergence, fused_linear_distillation_loss):
        attempt(dict(teacher_bias=None if odd else tensors["teacher_bias"]), function)
        attempt(None, function, kind="forward_kl" if odd else "reverse_kl")
        attempt(None, function, beta=0.25 if odd else 0.5)
        attempt(None, function, teacher_softcap=3.0 if odd else None)
        attempt(dict(mask=torch.zeros_like(tensors["mask"]) if odd else tensors["mask"]), function)
        attempt(dict(teacher_hidden=tensors["teacher_hidden"][..., : -1 if odd else None]), function, sequence_parallel=True)
        attempt(None, function)
    return messages[:one_sided], messages[one_sided:]


def test_a_rank_that_raises_leaves_nobody_waiting(tmp_path):
    (first, first_all), (second, second_all) = spawn(tmp_path, 2, refused)
    named = ("teacher_weight must be [V, D']", "teacher_bias", "teacher_hidden must be", "teacher_weight must be torch.float64")
    for i, (mine, theirs) in enumerate(zip(first, second, strict=True)):
        if i % 5 == 4:
            assert mine == theirs == "no error"
        else:
            assert mine.startswith("RuntimeError: rank 1 of vocab_parallel_group refused"), mine
            assert named[i % 5] in theirs and "refused" not in theirs, theirs
    for i, (mine, theirs) in enumerate(zip(first_all, second_all, strict=True)):
        if i % 7 == 6:
            assert mine == theirs == "no error"
        else:
            wanted = {4: "", 5: "shape of teacher_hidden"}.get(i % 7, "ValueError: teacher") + " must be the same on all ranks"
            assert mine == theirs and wanted in mine, (mine, theirs)
