"""TRL's trainer on two ranks under DDP and FSDP2: stock, patched and fused runs are the same, and gradients are those of one
process with the joined batch, however many tokens each rank keeps."""

import functools
import itertools
import os

import pytest
import torch
from support.tolerance import assert_close
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

trl = pytest.importorskip("trl")

from accelerate import state  # noqa: E402
from datasets import Dataset  # noqa: E402
from support.cases import values_that_run  # noqa: E402
from support.ranks import join, launch, leave  # noqa: E402
from support.tiny_trainer import DATA, digit_sum, tiny_model, weights  # noqa: E402
from support.trl_runs import OFF_POLICY, STOCK, assert_same, grpo, rollouts, saved  # noqa: E402

from grpo_kernels import TokenSupport  # noqa: E402
from grpo_kernels.integrations.trl import FusedGRPOTrainer, patch_trl, unpatch_trl  # noqa: E402
from grpo_kernels.trainer.demo import make_tokenizer  # noqa: E402

RANKS = 2
SECONDS = 240  # a rank that waits for another one's collective is killed then

SMALL = dict(per_device_train_batch_size=4, num_generations=4)
RUNS = {
    "off-policy with KL": {**SMALL, **OFF_POLICY},
    "accumulation": {**SMALL, "gradient_accumulation_steps": 2, "loss_type": "grpo", "per_device_train_batch_size": 2},
    "entropy quantile": {**SMALL, **OFF_POLICY, "top_entropy_quantile": 0.3, "entropy_coef": 0.05},
    "adaptive entropy": {**SMALL, "use_adaptive_entropy": True, "entropy_coef": 0.1, "entropy_target": 3.0},
    "dr_grpo": {**SMALL, **OFF_POLICY, "loss_type": "dr_grpo"},
    "checkpointing and evaluation": {**SMALL, "gradient_checkpointing": True, "evaluate": True, "per_device_eval_batch_size": 2, "max_steps": 2},
}  # fmt: skip
SHARDED = {
    "sharded, one pass": {**SMALL, **OFF_POLICY},
    "sharded, two phases": {**SMALL, **OFF_POLICY, "top_entropy_quantile": 0.3},
    "sharded, checkpointing": {**SMALL, "gradient_checkpointing": True, "loss_type": "grpo", "max_steps": 2},
    "sharded, bfloat16": {**SMALL, **OFF_POLICY, "bf16": True, "epsilon": 0.2},
}
COMPARED = ("off-policy with KL", "sharded, bfloat16")  # their entropies

PER_RANK, PROMPT, LENGTH = 3, 4, 6
LOSSES = {
    "dapo": dict(beta=0.05),
    "grpo": dict(loss_type="grpo", beta=0.05),
    "dr_grpo": dict(loss_type="dr_grpo", delta=1.05),
    "cispo": dict(loss_type="cispo", epsilon_high=1.01),
    "entropy quantile": dict(top_entropy_quantile=0.4),
    "sequence": dict(loss_type="grpo", importance_sampling_level="sequence"),
}
KEPT = {"uneven": [[6, 4, 6], [1, 2, 0]], "none on rank 1": [[6, 1, 3], [0, 0, 0]]}


def joined(kept):
    """The micro-batches of all ranks as one; ``kept`` [RANKS][PER_RANK] says how many tokens count."""
    g = torch.Generator().manual_seed(3)
    n = RANKS * PER_RANK
    logps = -3.4 + 0.1 * torch.randn(n, LENGTH, generator=g)
    mask = torch.arange(LENGTH)[None] < torch.tensor(kept).flatten()[:, None]
    return {
        "prompt_ids": torch.randint(2, 32, (n, PROMPT), generator=g), "prompt_mask": torch.ones(n, PROMPT, dtype=torch.long),
        "completion_ids": torch.randint(2, 32, (n, LENGTH), generator=g), "completion_mask": mask.long(),
        "advantages": torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, 0.0]), "old_per_token_logps": logps,
        "ref_per_token_logps": logps + 0.1 * torch.randn(n, LENGTH, generator=g), "num_items_in_batch": mask.sum(),
    }  # fmt: skip


def part_of(inputs, rank):
    own = slice(rank * PER_RANK, (rank + 1) * PER_RANK)
    return {name: x[own] if x.dim() else x for name, x in inputs.items()}


def gradients(kind, folder, model, inputs, wrap=lambda model: model, **options):
    """(loss, {parameter: gradient}) of one micro-batch in training, the second of two so that reductions are seen to end."""
    args = trl.GRPOConfig(
        output_dir=str(folder / "out"), use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=4, num_generations=4,
        max_completion_length=LENGTH, temperature=0.9, **options,
    )  # fmt: skip
    t = kind(
        model=model, reward_funcs=digit_sum, args=args, train_dataset=Dataset.from_list(DATA), processing_class=make_tokenizer()
    )
    t.current_gradient_accumulation_steps = 1
    wrapped = wrap(t.model.train())
    for _ in range(2):
        t.model.zero_grad()
        loss = t._compute_loss(wrapped, inputs)
        loss.backward()
    return loss.detach(), {name: whole(p.grad).clone() for name, p in t.model.named_parameters()}


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded(model):
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPPERS = {"DDP": DistributedDataParallel, "FSDP2": sharded}


def use_fsdp():
    """From here on accelerate shards. It refuses that to a CPU alone (MULTI_CPU in AcceleratorState), so ours has another name."""
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
                      FSDP_TRANSFORMER_CLS_TO_WRAP="LlamaDecoderLayer", FSDP_RESHARD_AFTER_FORWARD="true",
                      ACCELERATE_TORCH_DEVICE="cpu")  # fmt: skip
    state.PartialState._prepare_backend = lambda self, *args: ("gloo", state.DistributedType.MULTI_XPU)


def refuse(*args):
    raise AssertionError("TRL's own chunked function was called")


def of_all_kinds(run):
    """{name: run(trainer)} of the stock trainer, the fused and the patched one; the latter two without TRL's function."""
    results = {"stock": run(trl.GRPOTrainer)}
    forward, STOCK.forward = STOCK.forward, staticmethod(refuse)
    try:
        results["fused"] = run(FusedGRPOTrainer)
        patch_trl()
        results["patched"] = run(trl.GRPOTrainer)
    finally:
        unpatch_trl()
        STOCK.forward = forward
    return results


def work(names, rank, folder, port):
    join(rank, port, RANKS, SECONDS)
    model = saved(folder)
    for loss, kept, wrapper in itertools.product(LOSSES, KEPT, WRAPPERS):
        inputs = part_of(joined(KEPT[kept]), rank)
        results = of_all_kinds(lambda kind: gradients(kind, folder, model, inputs, WRAPPERS[wrapper], **LOSSES[loss]))  # noqa: B023
        torch.save(results, folder / f"{loss}-{kept}-{wrapper}-{rank}")
    for name in names:
        options = {**RUNS, **SHARDED}[name]
        if name in SHARDED:
            use_fsdp()
        torch.save(of_all_kinds(lambda kind: grpo(kind, folder, model, **options)), folder / f"{name}-{rank}")  # noqa: B023
        expected = state.DistributedType.FSDP if name in SHARDED else state.DistributedType.MULTI_CPU
        assert state.AcceleratorState().distributed_type == expected
    leave()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, request):
    """Where both ranks left their results."""
    path = tmp_path_factory.mktemp("ranks")
    saved(path)
    names = values_that_run(request, "test_stock_patched_and_fused_runs_are_the_same_on_every_rank", "name")
    launch(functools.partial(work, sorted({*names, *COMPARED}, key=[*RUNS, *SHARDED].index)), path, RANKS, SECONDS)
    return path


@pytest.mark.exhaustive(reason="twenty seconds and more: every run on two processes")
@pytest.mark.parametrize("name", [*RUNS, *SHARDED])
def test_stock_patched_and_fused_runs_are_the_same_on_every_rank(name, folder):
    ranks = [torch.load(folder / f"{name}-{rank}") for rank in range(RANKS)]
    for kind in ("fused", "patched"):
        for result in ranks:
            assert_same(result["stock"], result[kind], 2e-2 if "bfloat16" in name else 2e-4)
    assert (ranks[0]["stock"][1] - weights(tiny_model())).abs().max() > 1e-3
    for kind in ranks[0]:
        assert torch.equal(ranks[0][kind][1], ranks[1][kind][1]), "the ranks drift apart"


@pytest.mark.exhaustive(reason="twenty seconds: needs the runs on two processes")
def test_log_probs_are_not_rounded_where_fsdp_casts_outputs(folder):
    """FSDP2 returns bfloat16 from a wrapped forward under bf16; stock TRL's entropies are some 1e-2 off there."""
    logs = [torch.load(folder / f"{name}-0") for name in COMPARED]
    exact, stock, fused = logs[0]["stock"][0], logs[1]["stock"][0], logs[1]["fused"][0]
    assert abs(fused["entropy"][0] - exact["entropy"][0]) < 1e-4 < abs(stock["entropy"][0] - exact["entropy"][0])


@pytest.mark.exhaustive(reason="twenty seconds: needs the runs on two processes")
@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_those_of_one_process_with_the_joined_batch(loss, kept, folder):
    value, truth = gradients(trl.GRPOTrainer, folder, saved(folder), joined(KEPT[kept]), **LOSSES[loss])
    assert all(gradient.abs().max() > 0 for gradient in truth.values())
    for wrapper in WRAPPERS:
        ranks = [torch.load(folder / f"{loss}-{kept}-{wrapper}-{rank}") for rank in range(RANKS)]
        for kind in ranks[0]:
            assert_close(f"{kind} loss", sum(r[kind][0] for r in ranks) / RANKS, value, 1e-5)
            for r in ranks:
                assert r[kind][1].keys() == truth.keys()
                for name, gradient in truth.items():
                    assert_close(f"{wrapper} {kind} {name}", r[kind][1][name], gradient, 1e-5)


def roll_out(rank, folder, port):
    """Rank 1 returns no masks, or those of a sampler that left every token."""
    join(rank, port, RANKS, SECONDS)
    for name, left in (("one", None), ("both", [None] * 4)):
        found = []
        sample = rollouts(lambda masks: found.append(masks) or masks if rank == 0 else left)  # noqa: B023
        logs, _ = grpo(FusedGRPOTrainer, folder, saved(folder), more={"rollout_func": sample}, max_steps=1, **SMALL)
        sizes = [TokenSupport.from_sequences([mask], 2 + i if mask is None else None).lengths() for masks in found for i, mask in enumerate(masks)]
        torch.save((logs, torch.cat(sizes) if sizes else None), folder / f"masks of {name}-{rank}")
    leave()


@pytest.mark.parametrize("name", ["one", "both"])
def test_a_sampling_mask_is_logged_over_all_ranks(name, folder_of_masks):
    """Where a rollout_func returned masks on one rank alone, the other neither waits nor counts."""
    (log, sizes), (other, _) = (torch.load(folder_of_masks / f"masks of {name}-{rank}") for rank in range(RANKS))
    sizes = torch.cat([sizes, torch.zeros(len(sizes) * (name == "both"), dtype=torch.int64)])
    expected = sizes.where(sizes > 0, 32).float().mean().item()
    assert log["sampling_mask/mean_size"] == other["sampling_mask/mean_size"] == pytest.approx([expected])


@pytest.fixture(scope="module")
def folder_of_masks(tmp_path_factory):
    path = tmp_path_factory.mktemp("masks")
    saved(path)
    launch(roll_out, path, RANKS, SECONDS)
    return path
