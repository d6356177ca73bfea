"""TRL's own trainers, stock, patched and fused: the same losses, metrics and weights to rounding; and TRL's function not called."""

import math
import types
import warnings

import pytest
import torch
from support.cases import usually
from support.trl_runs import MODELS, OFF_POLICY, STOCK, assert_same, finish, grpo, rollouts, saved

trl = pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402
from peft import (  # noqa: E402
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
)
from support.tiny_trainer import DATA, digit_sum, tiny_model, weights  # noqa: E402
from transformers import (  # noqa: E402
    GenerationConfig,
    MinPLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from trl.kernels import chunked_logprob  # noqa: E402
from trl.trainer import utils  # noqa: E402

from grpo_kernels.integrations import trl as ours  # noqa: E402
from grpo_kernels.integrations.trl import FusedGRPOTrainer, FusedLogProbFunction, is_patched, patch_trl, unpatch_trl  # noqa: E402
from grpo_kernels.losses.objective import entropy_threshold, top_tokens  # noqa: E402
from grpo_kernels.trainer.demo import make_tokenizer  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def unpatched():
    yield
    unpatch_trl()


@pytest.fixture
def stock_raises(monkeypatch):
    """From here on TRL's own chunked function must not run."""

    def refuse(*args):
        raise AssertionError("TRL's own chunked function was called")

    monkeypatch.setattr(STOCK, "forward", staticmethod(refuse))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


class Ratios:
    """A sampler that differs from the trainer: importance ratios and its own log-probs, as vLLM's come."""

    shape = "token"

    def _compute_loss(self, model, inputs):
        ids = inputs["completion_ids"]
        noise = (ids * 7919 % 13).float() / 13 - 0.5
        ratio = (0.4 * noise).exp().where(inputs["completion_mask"] == 1, 1.0)
        inputs = {**inputs, "importance_sampling_ratio": ratio if self.shape == "token" else ratio[:, :1]}
        if inputs.get("old_per_token_logps") is not None:
            inputs["sampling_per_token_logps"] = (inputs["old_per_token_logps"] + 0.05 * noise).where(ids % 5 != 0, math.nan)
        self.use_vllm = self.vllm_importance_sampling_correction = True
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self.use_vllm = False


class SequenceRatios(Ratios):
    shape = "sequence"


class ToolMask:
    """Every third token came from a tool."""

    def _compute_loss(self, model, inputs):
        mask = torch.ones_like(inputs["completion_mask"])
        mask[:, 2::3] = 0
        return super()._compute_loss(model, {**inputs, "tool_mask": mask})


class PerToken:
    def _compute_loss(self, model, inputs):
        later = torch.linspace(0.5, 1.5, inputs["completion_ids"].shape[1])
        return super()._compute_loss(model, {**inputs, "advantages": inputs["advantages"][:, None] * later})


OPTIONS = {
    "on-policy": {},
    "off-policy with KL": OFF_POLICY,
    "no bias correction": {**OFF_POLICY, "use_bias_correction_kl": False, "loss_type": "grpo"},
    "gspo": {**OFF_POLICY, "importance_sampling_level": "sequence", "loss_type": "grpo", "epsilon": 1e-3},
    "cispo": {**OFF_POLICY, "loss_type": "cispo", "epsilon_high": 1.01},
    "sapo": {**OFF_POLICY, "loss_type": "sapo"},
    "vespo": {**OFF_POLICY, "loss_type": "vespo"},
    "bnpo": {**OFF_POLICY, "loss_type": "bnpo", "delta": 1.05},
    "dr_grpo": {**OFF_POLICY, "loss_type": "dr_grpo"},
    "luspo": {**OFF_POLICY, "loss_type": "luspo", "importance_sampling_level": "sequence"},
    "evaluation": dict(evaluate=True, per_device_eval_batch_size=4, max_steps=2, beta=0.05),
    "accumulation": dict(gradient_accumulation_steps=2, loss_type="grpo", per_device_train_batch_size=4),
    "shorter last window": dict(gradient_accumulation_steps=4, max_steps=-1, num_train_epochs=1, per_device_train_batch_size=4,
                                steps_per_generation=1),
    "several steps per generation": dict(gradient_accumulation_steps=2, steps_per_generation=4, per_device_train_batch_size=4),
    "entropy bonus": dict(entropy_coef=0.1, loss_type="dapo", gradient_accumulation_steps=2, per_device_train_batch_size=4),
    "adaptive entropy": dict(use_adaptive_entropy=True, entropy_coef=0.1, entropy_target=3.0, entropy_coef_delta=0.02, loss_type="grpo"),
    "entropy quantile": {**OFF_POLICY, "top_entropy_quantile": 0.3, "entropy_coef": 0.05},
    "off-policy mask": {**OFF_POLICY, "off_policy_mask_threshold": 1e-4},
    "importance ratios": {**OFF_POLICY, "mixin": Ratios, "off_policy_mask_threshold": 0.01},
    "sequence ratios": {**OFF_POLICY, "mixin": SequenceRatios, "loss_type": "grpo"},
    "vespo with ratios": {**OFF_POLICY, "mixin": Ratios, "loss_type": "vespo"},
    "tool tokens": {**OFF_POLICY, "mixin": ToolMask},
    "all masked": dict(mask_truncated_completions=True, generation_kwargs={"eos_token_id": 1, "suppress_tokens": [1]}, beta=0.05),
    "lora": {**OFF_POLICY, "peft": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")},
    "float32 head": dict(cast_lm_head_to_fp32=True),
    "a trained copy of the head": {**OFF_POLICY, "peft": LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")},
    "prompt tuning": {**OFF_POLICY, "peft": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "gradient_checkpointing": True},
    "prefix tuning": {**OFF_POLICY, "peft": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)},
    "checkpointing": {**OFF_POLICY, "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "autocast": {**OFF_POLICY, "bf16": True, "gradient_checkpointing": True, "tolerance": 2e-3},
    "bfloat16 model": dict(bf16=True, model_init_kwargs={"dtype": "bfloat16"}, cast_lm_head_to_fp32=True, beta=0.05, tolerance=2e-3),
    "evaluation between steps": dict(eval_strategy="steps", eval_steps=1, evaluate=True, per_device_eval_batch_size=2, num_generations_eval=2, max_steps=2),
    "a reference that follows": {**OFF_POLICY, "sync_ref_model": True, "ref_model_sync_steps": 1},
    "advantages per token": {**OFF_POLICY, "mixin": PerToken, "loss_type": "grpo"},
    "compiled": {**OFF_POLICY, "torch_compile": True, "torch_compile_backend": "eager", "max_steps": 2},
}  # fmt: skip

USUAL = ("off-policy with KL", "gspo", "accumulation", "entropy quantile", "importance ratios", "lora", "checkpointing", "autocast", "evaluation", "all masked")


@pytest.mark.parametrize("name", usually(OPTIONS, *USUAL))
def test_stock_patched_and_fused_runs_are_the_same(name, folder, request):
    if name == "compiled" and not hasattr(utils, "_use_triton"):
        pytest.skip("TRL 1.15 runs its Triton kernel on the CPU too, in the interpreter, which cannot be traced")
    model, options = saved(folder), dict(OPTIONS[name])
    tolerance = options.pop("tolerance", 2e-4)
    stock = grpo(trl.GRPOTrainer, folder, model, **options)
    request.getfixturevalue("stock_raises")
    fused = grpo(FusedGRPOTrainer, folder, model, **options)
    patch_trl()
    patched = grpo(trl.GRPOTrainer, folder, model, **options)
    assert_same(stock, fused, tolerance)
    assert_same(stock, patched, tolerance)
    moved = (stock[1] - weights(tiny_model())).abs().max() if "peft" not in options else 1
    assert moved > 1e-3 or name == "all masked"
    assert any("loss" in key for key in stock[0]) and any("entropy" in key for key in stock[0])


@pytest.mark.parametrize("name", MODELS)
def test_architectures(name, folder, request):
    """Softcap, logit scale, bias, tied heads, and the auxiliary loss of a mixture of experts."""
    model = saved(folder, name, **MODELS[name])
    options = dict(max_steps=2, num_iterations=2, gradient_accumulation_steps=2, per_device_train_batch_size=4)
    stock = grpo(trl.GRPOTrainer, folder, model, **options)
    request.getfixturevalue("stock_raises")
    assert_same(stock, grpo(FusedGRPOTrainer, folder, model, **options))
    patch_trl()
    assert_same(stock, grpo(trl.GRPOTrainer, folder, model, **options))
    assert ("aux_loss" in stock[0]) == (name == "mixtral")


def test_resumed_runs_are_the_same(folder, request):
    """From one stock checkpoint, the entropy controller's state included."""
    model, options = saved(folder), {**OFF_POLICY, "use_adaptive_entropy": True, "entropy_target": 4.0, "entropy_coef_delta": 0.02}
    checkpoint = folder / "resumed" / "checkpoint-2"
    grpo(trl.GRPOTrainer, folder, model, **options, output_dir=str(checkpoint.parent), save_strategy="steps", save_steps=2)
    stock = grpo(trl.GRPOTrainer, folder, model, **options, resume=str(checkpoint))
    request.getfixturevalue("stock_raises")
    assert_same(stock, grpo(FusedGRPOTrainer, folder, model, **options, resume=str(checkpoint)))
    assert stock[0]["step"][:3] == [1, 2, 3] and stock[0]["entropy_coef"][-1] > 0


class FarTool:
    """The tool wrote what the policies held for all but impossible."""

    def _compute_loss(self, model, inputs):
        mask = torch.ones_like(inputs["completion_mask"])
        mask[:, 2::3] = 0
        far = {name: inputs[name].where(mask == 1, -200.0) for name in ("old_per_token_logps", "ref_per_token_logps")}
        return super()._compute_loss(model, {**inputs, **far, "tool_mask": mask})


def test_tool_tokens_of_no_probability_leave_the_metrics_finite(folder):
    near = grpo(FusedGRPOTrainer, folder, saved(folder), mixin=ToolMask, **OFF_POLICY)
    assert_same(near, grpo(FusedGRPOTrainer, folder, saved(folder), mixin=FarTool, **OFF_POLICY))
    assert all(math.isfinite(x) for x in near[0]["kl"] + near[0]["loss"])


# ---- the tie rule of the entropy quantile


def draw_entropies(name, g):
    """(entropies [B, T], mask): quantized so that many are exactly equal, ragged, a row without a token."""
    B, T = int(torch.randint(1, 9, (), generator=g)), int(torch.randint(1, 40, (), generator=g))
    entropies = 3 * torch.rand(B, T, generator=g)
    mask = torch.arange(T) < torch.randint(0, T + 1, (B, 1), generator=g)
    if name == "ties":
        entropies = (entropies * 4).round() / 4
    if name == "all equal":
        entropies = torch.full((B, T), float(entropies[0, 0]))
    if name == "confident":
        entropies = (entropies - 2).clamp(min=0)
    return entropies, mask & (name != "nothing kept")


@pytest.mark.parametrize("name", ["distinct", "ties", "all equal", "confident", "nothing kept"])
def test_the_entropy_quantile_keeps_the_tokens_that_trl_keeps(name):
    """By TRL's own method, bit for bit: >= the quantile of the kept tokens, interpolated in float32."""
    alone = types.SimpleNamespace(pad_across_processes=lambda x, **_: x, gather=lambda x: x)
    g, tied = torch.Generator().manual_seed(0), 0
    for _ in range(60):
        entropies, mask = draw_entropies(name, g)
        for quantile in (0.0, 1e-9, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 1 - 1e-9, 1.0):
            theirs = trl.GRPOTrainer.get_high_entropy_mask(types.SimpleNamespace(accelerator=alone), entropies, mask.long(), 1 - quantile)
            m = mask.float()
            threshold = entropy_threshold(entropies, m, quantile)
            assert torch.equal(top_tokens(entropies, m, threshold), theirs.float()), (quantile, entropies, mask)
            tied += int((mask & (entropies == threshold)).sum() > 1)
            assert quantile < 1 or torch.equal(theirs, mask)  # there TRL does not ask for a mask
            assert quantile > 0 or torch.equal(theirs, mask & (entropies == entropies.where(mask, -1).max()))
    assert (tied > 100) == (name in ("ties", "all equal", "confident")), tied


class Recorded:
    """Keeps what TRL's own rule was given and said."""

    def get_high_entropy_mask(self, entropies, mask, threshold):
        kept = super().get_high_entropy_mask(entropies, mask, threshold)
        self.seen.append((self.ids, entropies.detach().clone(), mask.bool(), kept))
        return kept

    def _compute_loss(self, model, inputs):
        self.ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        return super()._compute_loss(model, inputs)


@pytest.mark.parametrize("seed, quantile", [(4, 0.2), (0, 0.5)])
def test_only_tokens_of_one_context_change_sides_of_the_entropy_quantile(seed, quantile, folder):
    """Two completions with the same tokens so far have the same distribution: rounding alone says which entropy is larger."""
    model, runs = saved(folder, hidden_size=64, intermediate_size=128, num_hidden_layers=2), []
    for kind in (trl.GRPOTrainer, FusedGRPOTrainer):
        runs.append([])
        grpo(kind, folder, model, mixin=type("Kept", (Recorded,), {"seen": runs[-1]}), seed=seed, top_entropy_quantile=quantile, max_steps=5,
             num_iterations=2, beta=0.05, per_device_train_batch_size=16, num_generations=8)  # fmt: skip
    for (ids, entropies, mask, theirs), (same_ids, rounded, _, ours) in zip(*runs, strict=True):
        assert torch.equal(ids, same_ids)
        assert ((entropies - rounded).abs() <= 1e-6 * entropies)[mask].all()
        prompt = ids.shape[1] - entropies.shape[1]
        for row, column in (theirs != ours).nonzero().tolist():
            alike = (ids[:, : prompt + column] == ids[row, : prompt + column]).all(1) & mask[:, column]
            assert alike.sum() > 1 and theirs[alike, column].all() and not ours[alike, column].all()
        if not torch.equal(theirs, ours):
            return  # from here on the weights differ


# ---- what stock TRL refuses


def test_an_adapter_on_the_head(folder, stock_raises):
    """Trained: its weights move, and the log-probs of the next step see it."""
    adapter = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    model = saved(folder)
    with pytest.raises(ValueError, match="lm_head"):
        grpo(trl.GRPOTrainer, folder, model, peft=adapter)
    data = Dataset.from_list(DATA)
    args = trl.GRPOConfig(
        output_dir=str(folder / "out"), use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True, max_steps=3,
        logging_steps=1, per_device_train_batch_size=8, num_generations=4, max_completion_length=6, learning_rate=1e-2, beta=0.05,
        num_iterations=2, gradient_checkpointing=False,
    )  # fmt: skip
    t = FusedGRPOTrainer(model=model, reward_funcs=digit_sum, args=args, train_dataset=data, peft_config=adapter, processing_class=make_tokenizer())
    t.train()
    head = t.accelerator.unwrap_model(t.model).get_output_embeddings()
    assert head.lora_B["default"].weight.abs().max() > 1e-3 and not head.base_layer.weight.requires_grad
    ids = torch.randint(2, 32, (2, 7))
    labels = ids.clone()
    labels[:, :3] = -100
    t.model.eval()
    with torch.no_grad():
        output = t.model(input_ids=ids, labels=labels, fused_lm_head=True)
        logps = (t.model(input_ids=ids).logits / t.temperature).log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(output.log_probs[:, 2:], logps[:, 2:], rtol=2e-5, atol=2e-5)
    with pytest.raises(ValueError, match="cast_lm_head_to_fp32"):
        grpo(FusedGRPOTrainer, folder, model, peft=adapter, cast_lm_head_to_fp32=True)


ADAPTERS = {
    "ia3": IA3Config(target_modules=["q_proj", "lm_head"], feedforward_modules=[], task_type="CAUSAL_LM"),
    "loha": LoHaConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"),
    "oft": OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"),
    "adalora": AdaLoraConfig(target_modules=["lm_head"], total_step=10, task_type="CAUSAL_LM"),
    "dora": LoraConfig(target_modules=["lm_head"], use_dora=True, task_type="CAUSAL_LM"),
    "rows": TrainableTokensConfig(target_modules=["lm_head"], token_indices=[2, 3], task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_other_adapters_on_the_head_are_refused(name, folder):
    """Their first logits are those of the bare head, so that comparing logits does not show them."""
    with pytest.raises(NotImplementedError, match="an adapter on the output layer"):
        grpo(FusedGRPOTrainer, folder, saved(folder), peft=ADAPTERS[name])


def test_an_option_out_of_range_is_refused_at_construction(folder):
    with pytest.raises(ValueError, match=r"delta must be > 0 or None, got 0\.0"):
        FusedGRPOTrainer(
            model=saved(folder), reward_funcs=digit_sum, args=trl.GRPOConfig(output_dir=str(folder / "out"), use_cpu=True, bf16=False, delta=0.0),
            train_dataset=Dataset.from_list(DATA), processing_class=make_tokenizer(),
        )  # fmt: skip


class Warmed:
    def token_temperature(self, inputs):
        return torch.linspace(0.5, 1.5, inputs["completion_ids"].shape[1]).expand_as(inputs["completion_ids"])


class Constant:
    def token_temperature(self, inputs):
        return torch.full(inputs["completion_ids"].shape, 0.9)


def test_log_probs_at_a_per_token_temperature(folder):
    model = saved(folder)
    plain = grpo(FusedGRPOTrainer, folder, model)
    assert_same(plain, grpo(FusedGRPOTrainer, folder, model, mixin=Constant))
    warmed = grpo(FusedGRPOTrainer, folder, model, mixin=Warmed)
    assert (warmed[1] - plain[1]).abs().max() > 1e-3 and warmed[0]["entropy"][0] != plain[0]["entropy"][0]


# ---- the sampling mask


def by_masks(masks, length):
    """[B, C, V] bool; all True behind the end of a completion, and without masks."""
    if masks is None:
        return torch.ones((), dtype=torch.bool)
    return torch.stack([torch.nn.functional.pad(mask.to_mask(32), (0, 0, 0, length - mask.positions), value=True) for mask in masks])


class Checked:
    """Holds every log-prob and entropy of a run against full logits of which `left` says what the sampler had left."""

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        self.seen.append(output.get("sampling_mask"))
        logps, _ = self.expected(self.model, output, sampled=True)
        kept = output["completion_mask"] == 1
        for name in ("old", "ref"):  # the reference is the policy that training starts from
            if f"{name}_per_token_logps" in output and (name == "old" or self.state.global_step == 0):
                torch.testing.assert_close(output[f"{name}_per_token_logps"][kept], logps[kept], rtol=1e-5, atol=1e-5)
        return output

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        self.scored = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        return self.scored

    def _compute_loss(self, model, inputs):
        exact = self.expected(model, inputs, sampled=self.state.global_step == 0)  # later this is not the policy that sampled
        loss = super()._compute_loss(model, inputs)
        kept = inputs["completion_mask"] * inputs.get("tool_mask", 1) == 1
        for ours, theirs in zip(self.scored[:2], exact, strict=True):
            torch.testing.assert_close(ours.detach()[kept], theirs[kept], rtol=1e-5, atol=1e-5)
        self.checked.append(int(kept.sum()))
        return loss

    @torch.no_grad()
    def expected(self, model, inputs, sampled):
        """(log-probs, entropies) [B, C], float32."""
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        length = inputs["completion_ids"].shape[1]
        scores = model(input_ids=ids, attention_mask=attention).logits[:, -length - 1 : -1] / self.temperature
        left = self.left(scores, inputs) if sampled else by_masks(inputs["sampling_mask"], length)
        log_p = scores.masked_fill(~left, -math.inf).log_softmax(-1)
        entropies = -(log_p.exp() * log_p.masked_fill(~left, 0)).sum(-1)
        return log_p.gather(-1, ids[:, -length:, None]).squeeze(-1), entropies

    def left(self, scores, inputs):
        for warper in self.warpers:
            scores = torch.stack([warper(None, own) for own in scores])
        return scores.isfinite() | (inputs.get("tool_mask", torch.ones(())) == 0).unsqueeze(-1)


class CheckedRollouts(Checked):
    def left(self, scores, inputs):
        return by_masks(inputs.get("sampling_mask"), scores.shape[1])


def checked_run(folder, kind=Checked, warpers=(), mixin=(), **options):
    """(logs, masks of each generation, tokens of each micro-batch): TRL shuffles and splits eight completions into pairs."""
    seen, checked = [], []
    kind = type("Kept", (*mixin, kind), {"warpers": warpers, "seen": seen, "checked": checked})
    defaults = dict(num_iterations=2, beta=0.05, max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    logs, _ = grpo(FusedGRPOTrainer, folder, saved(folder, initializer_range=0.3), mixin=kind, **{**defaults, **options})
    assert len(checked) >= 4 and all(checked)
    return logs, seen


TRUNCATED = {
    "top_p": (dict(top_p=0.6), [TopPLogitsWarper(0.6)]),
    "top_k and min_p": (dict(top_k=6, min_p=0.3), [TopKLogitsWarper(6), MinPLogitsWarper(0.3)]),
    "typical_p": (dict(generation_kwargs={"typical_p": 0.5}), [TypicalLogitsWarper(0.5)]),
    "one token": (dict(top_k=1), [TopKLogitsWarper(1)]),
}


@pytest.mark.parametrize("name", TRUNCATED)
def test_log_probs_are_over_what_the_sampler_left(name, folder):
    """Trained, old and reference, so that the ratio before the first update is 1."""
    options, warpers = TRUNCATED[name]
    logs, seen = checked_run(folder, warpers=warpers, **options)
    (masks,) = seen
    sizes = torch.cat([mask.lengths() for mask in masks])
    assert len(masks) == 8 and sizes.min() > 0 and sizes.max() < 32 and (sizes == 1).all() == (name == "one token")
    assert logs["clip_ratio/region_mean"][0] == 0 and logs["kl"][0] < 1e-6
    whole = [sizes.float().mean(), (sizes == 1).float().mean(), sizes[sizes > 1].sum() / len(sizes) / 32]
    names = ("mean_size", "single_share", "computed_share")
    assert [logs[f"sampling_mask/{name}"][0] for name in names] == pytest.approx([x.item() for x in whole], rel=1e-5)


def test_what_generate_fills_in_is_a_truncation(folder, monkeypatch):
    """top_k None is 50 to generate; 4 here, where the vocabulary has 32 tokens."""
    defaults = GenerationConfig._get_default_generation_params() | {"top_k": 4}
    monkeypatch.setattr(GenerationConfig, "_get_default_generation_params", staticmethod(lambda: defaults))
    _, (masks,) = checked_run(folder, warpers=[TopKLogitsWarper(4)], top_k=None)
    assert all((mask.lengths() == 4).all() for mask in masks)


def test_a_sampling_mask_after_updates_and_in_evaluation(folder):
    """The set stays that of the policy that sampled."""
    options = dict(max_steps=3, evaluate=True, per_device_eval_batch_size=8, top_p=0.6)
    logs, seen = checked_run(folder, warpers=[TopPLogitsWarper(0.6)], **options)
    assert len(seen) == 4 and all(len(masks) == 8 for masks in seen) and logs["clip_ratio/region_mean"][1] > 0
    assert {"sampling_mask/mean_size", "eval_sampling_mask/mean_size"} <= logs.keys()


def test_a_sampling_mask_under_an_adapter(folder):
    """The reference is the model without it."""
    adapter = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    checked_run(folder, warpers=[TopPLogitsWarper(0.6)], top_p=0.6, peft=adapter)


class Tools:
    """Every second completion calls a tool, which writes two tokens, and goes on; by TRL's own loop over calls."""

    def train(self, *args, **kwargs):
        self.tools = self._standalone_tools = [look]
        return super().train(*args, **kwargs)

    def _tool_call_loop(self, prompts, prompt_ids, completion_ids, completions, *others):
        call = [{"type": "function", "function": {"name": "look", "arguments": {}}}]
        messages = [[{"role": "assistant", "content": "", "tool_calls": call if i % 2 else None}] for i in range(len(prompts))]
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
        mask, _, ids, *others = super()._tool_call_loop(prompts, prompt_ids, completion_ids, messages, *others)
        return mask, self.processing_class.batch_decode(ids), ids, *others

    def _get_tool_suffix_ids(self, messages):
        return [7, 8]


def look():
    return "seen"


def test_a_sampling_mask_over_calls_of_tools(folder, monkeypatch):
    """Each turn has its own; tokens of tools have none."""
    monkeypatch.setattr(ours.grpo_module, "parse_response", lambda *args, **kwargs: {"role": "assistant", "content": ""})
    _, seen = checked_run(folder, warpers=[TopPLogitsWarper(0.6)], mixin=(Tools,), top_p=0.6, max_completion_length=12)
    assert any((mask.lengths() == 0).sum() == 2 and mask.lengths()[-1] > 0 for mask in seen[0])


def test_position_numbers_come_back_one_a_token(folder, monkeypatch):
    """A TRL that drops the lists of log-probs, or cuts them otherwise than the completions, is another TRL."""
    for numbers in (None, [[1, 2], [3]]):
        with pytest.raises(RuntimeError, match=r"is not one that grpo_kernels knows: .*of \[2, 2\]"):
            ours._numbers(numbers, [[5, 6], [7, 8]])
    generate = trl.GRPOTrainer._generate

    def without(self, prompts):
        found = list(generate(self, prompts))
        return *found[:4], None, *found[5:]

    monkeypatch.setattr(trl.GRPOTrainer, "_generate", without)
    with pytest.raises(RuntimeError, match="is not one that grpo_kernels knows"):
        grpo(FusedGRPOTrainer, folder, saved(folder), top_p=0.6, max_steps=1)


def test_without_a_sampling_mask_the_run_is_that_of_trl(folder):
    """False keeps none; True keeps empty ranges where nothing is truncated, which change nothing."""
    model, options = saved(folder), dict(top_p=0.6, **OFF_POLICY)
    stock = grpo(trl.GRPOTrainer, folder, model, **options)
    assert_same(stock, grpo(FusedGRPOTrainer, folder, model, more={"keep_sampling_mask": False}, **options))
    assert (grpo(FusedGRPOTrainer, folder, model, **options)[1] - stock[1]).abs().max() > 1e-3
    stock = grpo(trl.GRPOTrainer, folder, model, **OFF_POLICY)
    logs, weights = grpo(FusedGRPOTrainer, folder, model, more={"keep_sampling_mask": True}, **OFF_POLICY)
    assert set(logs.pop("sampling_mask/mean_size")) == {32} and set(logs.pop("sampling_mask/single_share")) == {0}
    assert set(logs.pop("sampling_mask/computed_share")) == {1}
    assert_same(stock, (logs, weights))


@pytest.mark.parametrize("keep", [None, False])
@pytest.mark.parametrize("env", [False, True])
@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
def test_the_sampling_mask_of_a_rollout_func(keep, env, folder):
    """Not handed to the reward functions, and dropped when it is not wanted."""
    names = set()

    def reward(completion_ids, **columns):
        names.update(columns)
        return digit_sum(completion_ids=completion_ids, **columns)

    more = {"rollout_func": rollouts(env=env), "keep_sampling_mask": keep, "reward_funcs": reward}
    logs, (masks,) = checked_run(folder, CheckedRollouts, more=more)
    assert "sampling_mask" not in names and "answer" in names and (masks is None) == (keep is False)
    assert ("sampling_mask/mean_size" in logs) == (keep is None)
    if keep is None:
        lengths = [mask.lengths() for mask in masks]
        assert [len(own) for own in lengths] == [2, 3, 4, 5] * 2 and not lengths[1].any()
        assert all((own[0] > 0) and (own[1] > 0) == (not env) for i, own in enumerate(lengths) if i != 1)
        sampled = torch.cat([own[[t != 1 or not env for t in range(len(own))]] for own in lengths])
        assert logs["sampling_mask/mean_size"][0] == pytest.approx(sampled.where(sampled > 0, 32).float().mean().item())


@pytest.mark.parametrize("keep", [None, False])
@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
def test_a_truncated_sampler_that_returns_no_mask(keep, folder, recwarn):
    """One warning, over two rollouts and an evaluation."""
    warnings.simplefilter("always")  # Python would say it once by itself
    more = {"rollout_func": rollouts(lambda found: None), "keep_sampling_mask": keep}
    logs, _ = grpo(FusedGRPOTrainer, folder, saved(folder), more=more, top_p=0.6, generation_kwargs={"typical_p": 0.9}, evaluate=True)
    said = [str(one.message) for one in recwarn if "no sampling mask" in str(one.message)]
    assert len(said) == (keep is None) and not any("sampling_mask" in name for name in logs)
    assert all(s.startswith("sampling leaves tokens out (top_p 0.6, typical_p 0.9)") and "keep_sampling_mask=False" in s for s in said)


@pytest.mark.parametrize("option", ["use_vllm", "use_transformers_continuous_batching"])
def test_samplers_without_a_mask(option, folder, monkeypatch, recwarn):
    """None is no truncation to them: they fill nothing in."""
    warnings.simplefilter("always")
    monkeypatch.setattr(trl.GRPOTrainer, "_generate", lambda self, prompts: ([], [], None, [], None, {}, None, None))
    for cuts, count in ((dict(top_k=None), 0), (dict(top_k=5), 1)):
        args = trl.GRPOConfig(output_dir=str(folder / "out"), use_cpu=True, bf16=False, report_to="none", **cuts)
        t = FusedGRPOTrainer(saved(folder), digit_sum, args=args, train_dataset=Dataset.from_list(DATA), processing_class=make_tokenizer())
        setattr(t, option, True)
        t._generate([]), t._generate([])
        said = [str(one.message) for one in recwarn if "no sampling mask" in str(one.message)]
        assert len(said) == count and all("(top_k 5)" in text for text in said)


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
def test_wrong_sampling_masks_are_named(folder):
    output = rollouts()(["1+1="] * 8, None)
    found, ids = output["sampling_mask"], output["completion_ids"]
    for given, error in (
        (found[1:], r"sampling_mask must be a list of 8 \(token_ids, offsets\), one a completion, got 7 of them"),
        ({}, "sampling_mask must be a list of 8.*got dict"),
        ([(found[0][0][: found[0][1][1]], found[0][1][:-1]), *found[1:]], "completion 0 must have 3 offsets, one more than it has tokens, got 2"),
        ([(found[0][0][1:], found[0][1]), *found[1:]], "sampling_mask of completion 0: offsets .*must rise from 0"),
        ([*found[:2], ([], [1]), *found[3:]], "sampling_mask of completion 2: offsets"),
    ):
        with pytest.raises(ValueError, match=error):
            ours._masks_of_rollouts(given, ids, None)
    with pytest.raises(TypeError, match="sampling_mask of completion 4: token_ids .* must be integers"):
        ours._masks_of_rollouts([*found[:4], ([0.5], [0, 1]), *found[5:]], ids, None)
    sampled = [[1] * len(own) for own in ids]
    for env_mask, error in (
        ([*sampled[:3], sampled[3][:-1], *sampled[4:]], "env_mask of completion 3 must have 5 entries, one a token, got 4"),
        (sampled[1:], "env_mask must be a list of 8 lists of 0 and 1, one a completion, got 7 of them"),
    ):
        with pytest.raises(ValueError, match=error):
            ours._masks_of_rollouts(found, ids, env_mask)
    for change, error in (
        (lambda found: None, "sampling_mask must be a list of 8.*got NoneType"),
        (lambda found: [([1, 2], [0, 1, 2]), *found[1:]], "must be among support.ids"),
    ):
        more = {"rollout_func": rollouts(change), "keep_sampling_mask": True}
        with pytest.raises(ValueError, match=error):
            grpo(FusedGRPOTrainer, folder, saved(folder), more=more, max_steps=1)


def test_a_sampling_mask_that_nothing_returns_is_refused(folder):
    with pytest.raises(ValueError, match="keep_sampling_mask must be None or False with use_transformers_continuous_batching"):
        grpo(FusedGRPOTrainer, folder, saved(folder), more={"keep_sampling_mask": True}, use_transformers_continuous_batching=True)
    with pytest.raises(TypeError, match="keep_sampling_mask must be True, False or None, got 1"):
        grpo(FusedGRPOTrainer, folder, saved(folder), more={"keep_sampling_mask": 1})


# ---- the other trainers


def supervised(folder, model, packed=False):
    rows = Dataset.from_list([{"prompt": d["prompt"], "completion": d["answer"]} for d in DATA])
    args = trl.SFTConfig(
        output_dir=str(folder / "out"), use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True, max_steps=3,
        logging_steps=1, per_device_train_batch_size=4, learning_rate=0.3, optim="sgd", gradient_checkpointing=False, packing=packed,
    )  # fmt: skip
    return finish(trl.SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=make_tokenizer()))


def preferred(folder, model, **options):
    rows = Dataset.from_list([{"prompt": d["prompt"], "chosen": d["answer"], "rejected": str(i)} for i, d in enumerate(DATA)])
    args = trl.DPOConfig(
        output_dir=str(folder / "out"), use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True, max_steps=3,
        logging_steps=1, per_device_train_batch_size=4, learning_rate=0.3, optim="sgd", gradient_checkpointing=False, **options,
    )  # fmt: skip
    return finish(trl.DPOTrainer(model=model, args=args, train_dataset=rows, processing_class=make_tokenizer()))


def leave_one_out(folder, model):
    args = trl.RLOOConfig(
        output_dir=str(folder / "out"), use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True, max_steps=2,
        logging_steps=1, per_device_train_batch_size=8, num_generations=4, max_completion_length=6, learning_rate=0.3, optim="sgd", beta=0.05,
        gradient_checkpointing=False,
    )  # fmt: skip
    data = Dataset.from_list(DATA)
    return finish(trl.RLOOTrainer(model=model, reward_funcs=digit_sum, args=args, train_dataset=data, processing_class=make_tokenizer()))


def unpaired(folder, model):
    rows = Dataset.from_list([{"prompt": d["prompt"], "completion": d["answer"], "label": i % 2 == 0} for i, d in enumerate(DATA)])
    args = trl.KTOConfig(
        output_dir=str(folder / "out"), use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True, max_steps=2,
        logging_steps=1, per_device_train_batch_size=4, learning_rate=0.3, optim="sgd", gradient_checkpointing=False,
    )  # fmt: skip
    return finish(trl.KTOTrainer(model=model, args=args, train_dataset=rows, processing_class=make_tokenizer()))


@pytest.mark.parametrize("run", [supervised, preferred, leave_one_out, unpaired])
def test_patched_runs_of_the_other_trainers_are_the_same(run, folder, request):
    model = saved(folder)
    stock = run(folder, model)
    request.getfixturevalue("stock_raises")
    patch_trl()
    assert_same(stock, run(folder, model))


def test_dpo_with_every_output(folder, request):
    """WPO weights need log sum p^2; the mean logits are logged."""
    model = saved(folder)
    stock = preferred(folder, model, use_weighting=True)
    request.getfixturevalue("stock_raises")
    patch_trl()
    assert_same(stock, preferred(folder, model, use_weighting=True))
    assert any("logits" in name for name in stock[0])


# ---- the function


@pytest.mark.cover("dtype")
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_five_outputs_and_gradients(softcap, with_bias, autocast, dtype):
    torch.manual_seed(0)
    hidden, weight = torch.randn(37, 16).to(dtype), torch.randn(611, 16).to(dtype)
    bias, ids = torch.randn(611).to(dtype) if with_bias else None, torch.randint(0, 611, (37,))
    ids[::3] = (hidden.float() @ weight.float().T + (bias.float() if with_bias else 0)).argmax(-1)[::3]
    g, e = torch.randn(37), torch.randn(37)
    results = []
    for function in (STOCK, FusedLogProbFunction):
        inputs = [x if x is None else x.detach().clone().requires_grad_() for x in (hidden, weight, bias)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = function.apply(inputs[0], inputs[1], inputs[2], ids, 0.7, 256, softcap, 1.3)
        (g * out[0] + e * out[1]).sum().backward()
        results.append([*out[:4], *(x.grad for x in inputs if x is not None)])
        top = out[4]
    tolerance = 0.1 if autocast or dtype == torch.bfloat16 else 2e-5
    for stock, mine in zip(*results, strict=True):
        assert stock.dtype == mine.dtype and stock.shape == mine.shape
        assert (stock.float() - mine.float()).abs().max() <= tolerance * stock.float().abs().max()
    assert top.dtype == torch.bool and 0 < top.sum() < 37
    assert FusedLogProbFunction.apply(hidden, weight, bias, ids, 1.0, 256, None, 1.0, ("log_probs",))[1:] == (None,) * 4


def test_dtypes_that_differ_meet_in_that_of_hidden():
    hidden, weight, ids = torch.randn(5, 8), torch.randn(50, 8).bfloat16(), torch.randint(0, 50, (5,))
    stock, mine = (f.apply(hidden, weight, None, ids, 1.0, 64)[0] for f in (STOCK, FusedLogProbFunction))
    torch.testing.assert_close(mine, stock, rtol=1e-5, atol=1e-5)


# ---- patching


def test_patching_is_undone_and_twice_is_once():
    before = utils._ChunkedLogProbFunction, getattr(utils, "_use_triton", None), trl.kernels.ChunkedLogProbFunction
    assert not is_patched()
    unpatch_trl()
    patch_trl()
    patch_trl()
    assert is_patched() and trl.kernels.ChunkedLogProbFunction is FusedLogProbFunction
    unpatch_trl()
    assert not is_patched()
    assert before == (utils._ChunkedLogProbFunction, getattr(utils, "_use_triton", None), trl.kernels.ChunkedLogProbFunction)


def test_another_function_is_refused(monkeypatch):
    class Other(STOCK):
        @staticmethod
        def forward(ctx, hidden, weight, targets):
            pass

    monkeypatch.setattr(chunked_logprob, "ChunkedLogProbFunction", Other)
    monkeypatch.setattr(ours, "_found", ours._arguments())
    with pytest.raises(RuntimeError, match=f"{trl.__version__}.*not one that grpo_kernels knows"):
        patch_trl()
    assert not is_patched()


class Halved(trl.GRPOTrainer):
    """On-policy the value of this loss is the same zero as TRL's own."""

    def _compute_loss(self, model, inputs):
        return super()._compute_loss(model, inputs) * 0.5


class Shifted(trl.GRPOTrainer):
    def _compute_loss(self, model, inputs):
        return super()._compute_loss(model, inputs) + 0.1


class Detached(trl.GRPOTrainer):
    def _compute_loss(self, model, inputs):
        return super()._compute_loss(model, inputs).detach()


class OtherLogProbs:
    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        logps, *others = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        return logps * 0.9, *others


class OtherModel:
    """Scores without TRL's function, as a trainer that makes its own logits does."""

    def _compute_loss(self, model, inputs):
        return model(input_ids=inputs["completion_ids"]).logits.mean()


@pytest.mark.parametrize(
    "kind, difference, name",
    [
        (Halved, "gradient in the log-probs", "Halved._compute_loss"),
        (Shifted, "the fused one", "Shifted._compute_loss"),
        (Detached, "gradient", "Detached._compute_loss"),
        (OtherLogProbs, "gradient in the log-probs", "OtherLogProbs._get_per_token_logps_and_entropies"),
        (type("Bypassing", (OtherModel, trl.GRPOTrainer), {}), "does not call", "OtherModel._compute_loss"),
    ],
)
def test_a_subclass_with_another_loss_is_told_so(kind, difference, name, folder):
    """And not to install the TRL that it has."""
    bases = (FusedGRPOTrainer, kind) if issubclass(kind, trl.GRPOTrainer) else (kind, FusedGRPOTrainer)
    with pytest.raises(RuntimeError, match=difference) as caught:
        grpo(types.new_class("Mine", bases), folder, saved(folder), loss_type="grpo")
    words = str(caught.value)
    assert words.startswith("Mine does not train") and f"It overrides {name};" in words and "patch_trl" in words
    assert "install" not in words and trl.__version__ not in words


class OwnLoss:
    def _compute_loss(self, model, inputs):
        ids, mask = (torch.cat([inputs[f"{part}_{name}"] for part in ("prompt", "completion")], 1) for name in ("ids", "mask"))
        kept, advantages = inputs["completion_mask"], inputs["advantages"].view(-1, 1)
        logps = self._get_per_token_logps_and_entropies(model, ids, mask, kept.shape[1])[0]
        return -(advantages * logps * kept).sum() / kept.sum()


class Doubled:
    def _compute_loss(self, model, inputs):
        return super()._compute_loss(model, inputs) * 2


@pytest.mark.parametrize("mixin", [OwnLoss, Doubled])
def test_what_a_subclass_makes_of_the_loss_is_trained_as_on_stock(mixin, folder):
    """It is not checked: docs/integrations.md says so."""
    runs = [grpo(trainer, folder, saved(folder), mixin=mixin) for trainer in (trl.GRPOTrainer, FusedGRPOTrainer)]
    assert_same(*runs)


class Logs(FusedGRPOTrainer):
    """Overrides what makes no loss."""

    def log(self, *args, **kwargs):
        super().log(*args, **kwargs)


@pytest.mark.parametrize("trainer", [FusedGRPOTrainer, Logs])
def test_a_trl_with_another_loss_is_refused(trainer, folder, monkeypatch):
    theirs = trl.GRPOTrainer._compute_loss
    monkeypatch.setattr(trl.GRPOTrainer, "_compute_loss", lambda self, model, inputs: theirs(self, model, inputs) * 0.5)
    with pytest.raises(RuntimeError, match=f"TRL .{trl.__version__}. is not one that grpo_kernels knows.*gradient in the log-probs"):
        grpo(trainer, folder, saved(folder), loss_type="grpo")


def test_a_trainer_without_the_seam_is_refused(folder, monkeypatch):
    monkeypatch.delattr(ours.grpo_module, "add_fused_lm_head")
    with pytest.raises(RuntimeError, match="add_fused_lm_head"):
        grpo(FusedGRPOTrainer, folder, saved(folder))
