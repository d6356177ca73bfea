"""Calls of liger's fused loss and of ours with the same arguments."""

import functools
import inspect
import random

import pytest
import torch

from grpo_kernels import GRPOLossConfig, reference
from grpo_kernels.integrations.liger import LigerFusedLinearGRPOLoss
from support.problems import make_problem

peer = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss")
Theirs = functools.partial(peer.LigerFusedLinearGRPOLoss, compiled=False)
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
PAIRS = [(t, level) for t in CLIPPED for level in ("token", "sequence")] + [(t, "token") for t in ("cispo", "sapo", "vespo")]
LEAVES = ("_input", "lin_weight", "bias")
B, T, D, V, DRAWS = 4, 12, 16, 307, 36
GRID = dict(
    beta=[0.0, 0.3, 0.3, -0.1], use_bias_correction_kl=[False, True], delta=[None, 1.1, 2.2], epsilon_low=[0.2, 0.25],
    epsilon_high=[0.2, 0.28, 1.25], temperature=[1.0, 0.7], chunk_size=[1, 3], sapo_temperature_pos=[1.0, 0.7],
    sapo_temperature_neg=[1.05, 2.3], vespo_k_pos=[2.0, 1.3], vespo_lambda_pos=[3.0, 1.1], vespo_k_neg=[3.0, 0.4],
    vespo_lambda_neg=[2.0, 0.9], max_completion_length=[T, 29],
    bias=[False, True], on_policy=[False, False, True], reference=["logps", "logps", "input", "input and bias", "own"],
    ratio=[None, "[B, T]", "[B, 1]", "[B]"], num_items=[None, 47, 0.3, torch.tensor(31), torch.tensor(0.5)],
    mask=[torch.bool, torch.int64, torch.float32], frozen=[(), (), ("lin_weight",), ("_input", "bias")], scale=[1.0, -0.5],
)  # fmt: skip
OPTIONS = inspect.signature(LigerFusedLinearGRPOLoss).parameters.keys()


@functools.cache
def draws(loss_type, level):
    """DRAWS settings in which every value of every option comes up equally often, whatever the seed."""
    rng = random.Random(f"{loss_type} {level}")
    decks = {name: (values * DRAWS)[:DRAWS] for name, values in GRID.items()}
    for deck in decks.values():
        rng.shuffle(deck)
    return [dict(zip(decks, hand, strict=True)) for hand in zip(*decks.values(), strict=True)]


@functools.cache
def problem_of(seed, loss_type, level, temperature=1.0, bias=False, on_policy=False, full_mask=False):
    config = GRPOLossConfig(loss_type=loss_type, importance_sampling_level=level, temperature=temperature,
                            max_completion_length=T)  # fmt: skip
    masked = dict(masked=0.0, all_masked_sequence=False) if full_mask else {}
    return make_problem(seed, B=B, T=T, D=D, V=V, dtype=torch.float32, config=config, bias=bias, on_policy=on_policy,
                        zero_advantages=seed % 3 == 0, **masked)  # fmt: skip


class Call:
    """One call by liger's names: options of the constructor and tensors of the forward."""

    def __init__(self, seed, loss_type, level, *, full_mask=False, **setting):
        s = {**draws(loss_type, level)[seed % DRAWS], **setting}
        self.problem = p = problem_of(seed, loss_type, level, s["temperature"], s["bias"], s["on_policy"], full_mask)
        self.options = {name: value for name, value in s.items() if name in OPTIONS}
        self.options.update(loss_type=loss_type, importance_sampling_level=level, use_ref_model=s["reference"] != "own")
        self.frozen, self.scale = s["frozen"], s["scale"]
        self.tensors = dict(
            _input=p.hidden, lin_weight=p.weight, selected_token_ids=p.completion_ids, attention_mask=p.mask.to(s["mask"]),
            advantages=p.advantages, bias=p.bias, old_per_token_logps=p.old_logps, num_items_in_batch=s["num_items"],
        )  # fmt: skip
        g = torch.Generator().manual_seed(seed)
        if s["reference"] == "logps":
            self.tensors["ref_per_token_logps"] = p.ref_logps
        elif s["reference"] != "own":
            self.tensors["ref_input"] = p.hidden + 0.1 * torch.randn(B, T, D, generator=g)
            self.tensors["ref_weight"] = p.weight + 0.1 * torch.randn(V, D, generator=g)
            self.tensors["ref_bias"] = torch.randn(V, generator=g) if s["reference"] == "input and bias" else None
        if s["ratio"]:
            ratio = 0.4 + torch.rand(*{"[B, T]": (B, T), "[B, 1]": (B, 1), "[B]": (B,)}[s["ratio"]], generator=g)
            ratio[1] = 0.0 if s["ratio"] == "[B]" else ratio[1]
            # liger's vespo adds up what stands at masked positions too; 1 there, as trainers leave it, adds nothing
            self.tensors["vllm_is_ratio"] = ratio if s["ratio"] != "[B, T]" else ratio.where(p.mask.bool(), 1.0)

    def run(self, which, dtype=torch.float32, **changes):
        """{"loss", "metric 0", ..., "gradient of _input", ...} of a class called with these options and tensors."""
        tensors = {n: x.to(dtype) if isinstance(x, torch.Tensor) and x.dtype == torch.float64 else x
                   for n, x in {**self.tensors, **changes}.items()}  # fmt: skip
        needs = [n for n in LEAVES if tensors[n] is not None and n not in self.frozen]
        for name in needs:
            tensors[name] = tensors[name].clone().requires_grad_()
        loss, metrics = which(**self.options)(**tensors)
        (loss * self.scale).backward()
        assert isinstance(metrics, tuple) and len(metrics) == (2 if self.options["beta"] != 0 else 1)
        for metric in metrics:
            assert metric.shape == () and not metric.requires_grad
        out = {f"metric {i}": x for i, x in enumerate(metrics)}
        return {"loss": loss.detach(), **out, **{f"gradient of {n}": tensors[n].grad for n in needs}}

    def run_reference(self):
        """Loss and gradients of the specification, in float64."""
        o, t = self.options, {n: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
                              for n, x in self.tensors.items()}  # fmt: skip
        own = {n: o[n] for n in GRPOLossConfig.__dataclass_fields__ if n in o}
        config = GRPOLossConfig(**{**own, "epsilon": o["epsilon_low"], "beta": o["beta"] if o["use_ref_model"] else 0.0})
        ref = t.get("ref_per_token_logps")
        if "ref_input" in t:
            z = t["ref_input"] @ t["ref_weight"].T + (0.0 if t["ref_bias"] is None else t["ref_bias"])
            ref = (z / o["temperature"]).log_softmax(-1).gather(-1, t["selected_token_ids"].unsqueeze(-1)).squeeze(-1)
        ratio, items = t.get("vllm_is_ratio"), t["num_items_in_batch"]
        leaves = {n: t[n].clone().requires_grad_() for n in LEAVES if t[n] is not None and n not in self.frozen}
        t.update(leaves)
        out = reference.grpo_loss(
            t["_input"], t["lin_weight"], t["selected_token_ids"], t["advantages"], t["attention_mask"], bias=t["bias"],
            old_logps=t["old_per_token_logps"], ref_logps=ref, num_items=None if items is None else torch.as_tensor(items),
            importance_sampling_ratio=ratio.unsqueeze(1) if ratio is not None and ratio.dim() == 1 else ratio, config=config,
        )  # fmt: skip
        (out.loss * self.scale).backward()
        return {"loss": out.loss.detach(), **{f"gradient of {n}": x.grad for n, x in leaves.items()}}

    @property
    def liger_reduces_luspo_rightly(self):
        """Its mean over B * T positions is right where every term is one number per sequence."""
        kl = self.options["beta"] != 0 and self.options["use_ref_model"]
        ratio = self.tensors.get("vllm_is_ratio")
        per_token = self.options["importance_sampling_level"] == "token" or kl or (ratio is not None and ratio.shape == (B, T))
        return not per_token or bool(self.tensors["attention_mask"].all())


def assert_equal(ours, theirs, hint, tolerance=2e-5, slack=0.0):
    """No element is off by more than ``tolerance`` times the largest; the loss, a sum that cancels, not by more than that of
    itself or of the largest gradient, and ``slack``."""
    assert ours.keys() == theirs.keys(), hint
    sizes = {name: x.abs().max().item() for name, x in theirs.items()}
    sizes["loss"] = max((size for name, size in sizes.items() if not name.startswith("metric")), default=0.0)
    for name, truth in theirs.items():
        assert ours[name].shape == truth.shape, f"{hint} {name}"
        error, allowed = (ours[name].double() - truth.double()).abs().max().item(), tolerance * sizes[name]
        assert error <= allowed + slack * (name == "loss"), f"{hint} {name}: {error:.3e} of {sizes[name]:.3e}"
