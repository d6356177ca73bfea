"""The tokens that truncated sampling left: recorded in generate, and what the trainer makes of them."""

import os
import re
import subprocess
import sys

import pytest
import torch
from support.documents import table
from support.peaked_model import CUTS, EOS, peaked_model
from support.tiny_trainer import DATA, config, model_inputs, next_micro_batches, trainer, weights
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import TopKLogitsWarper

from grpo_kernels import TokenSupport, linear_logprobs, objective
from grpo_kernels.integrations.sampling_mask import filled_in, mask_metrics, recorded_support
from grpo_kernels.integrations.transformers import lm_head
from grpo_kernels.trainer import dry_run, microbatch
from grpo_kernels.trainer.microbatch import joined
from grpo_kernels.trainer.rollout import completion_mask

pytestmark = pytest.mark.usefixtures("one_thread")


def sampled(model, cut, B=6, P=3, T=8, seed=0, **more):
    """(recorder, sequences, completion mask, scores [B, steps, V] behind all processors)."""
    options = dict(temperature=1.0, top_k=0, top_p=1.0) | cut
    config = GenerationConfig(do_sample=True, max_new_tokens=T, eos_token_id=EOS, pad_token_id=0, return_dict_in_generate=True,
                              output_scores=True, **options)  # fmt: skip
    torch.manual_seed(seed)
    prompts = torch.randint(7, 32, (B, P))
    with recorded_support(model) as recorder:
        found = model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=config, **more)
    mask, _ = completion_mask(found.sequences[:, P:], EOS)
    return recorder, found.sequences, mask, torch.stack(found.scores, 1)


def left_by(logits, top_k=0, top_p=1.0, min_p=0.0, temperature=1.0):
    """[.., V] bool, one position at a time by the definitions: at most k tokens, the fewest whose probability is at least p, ..."""
    allowed = torch.zeros(logits.shape, dtype=torch.bool).flatten(0, -2)
    for row, z in enumerate(logits.flatten(0, -2).double() / temperature):
        kept = z.argsort(descending=True).tolist()[: top_k or None]
        p = (z[kept] - z[kept].logsumexp(0)).exp()
        kept = kept[: int((p.cumsum(0) < top_p).sum()) + 1] if top_p < 1 else kept
        best = z[kept].max()
        allowed[row, [v for v in kept if (z[v] - best).exp() >= min_p]] = True
    return allowed.view(logits.shape)


def own_logits(model, sequences, T):
    with torch.no_grad():
        return model.eval()(sequences, attention_mask=torch.ones_like(sequences)).logits[:, -T - 1 : -1]


@pytest.mark.parametrize("name", CUTS)
def test_recorded_is_what_the_truncation_leaves(name):
    model = peaked_model()
    recorder, sequences, mask, _ = sampled(model, CUTS[name])
    T = mask.shape[1]
    support = recorder.support(mask)
    assert support.ids.dtype == torch.int32 and support.positions == mask.numel()
    assert 0 < (~mask).sum() < mask.numel() and not support.lengths()[~mask.flatten()].any()
    if name == "nothing":
        assert len(support.ids) == 0
        return
    wanted = left_by(own_logits(model, sequences, T), **CUTS[name])
    assert torch.equal(support.to_mask(32).view(*mask.shape, 32)[mask], wanted[mask])
    assert wanted[mask].gather(1, sequences[:, -T:][mask].unsqueeze(1)).all()


@pytest.mark.parametrize("name", CUTS)
def test_log_probs_over_it_are_the_samplers_own(name):
    model = peaked_model()
    recorder, sequences, mask, scores = sampled(model, CUTS[name])
    T = mask.shape[1]
    with torch.no_grad():
        hidden = model.model(sequences, attention_mask=torch.ones_like(sequences))[0][:, -T - 1 : -1]
    options = dict(mask=mask, temperature=CUTS[name].get("temperature", 1.0))
    ids, weight = sequences[:, -T:], lm_head(model).weight
    theirs = scores.log_softmax(-1).gather(2, ids.unsqueeze(2)).squeeze(2)
    ours = linear_logprobs(hidden, weight, ids, support=recorder.support(mask), **options).logps
    torch.testing.assert_close(ours[mask], theirs[mask], rtol=0, atol=1e-6)
    without = linear_logprobs(hidden, weight, ids, **options).logps
    assert ((theirs - without)[mask].abs().max() > 0.01) == (name != "nothing")


def test_a_processor_of_the_call_and_a_second_call():
    model = peaked_model()
    sampled(model, CUTS["top_p"], B=3)
    assert "_get_logits_processor" not in vars(model)
    recorder, _, mask, scores = sampled(model, dict(top_p=0.6), logits_processor=LogitsProcessorList([TopKLogitsWarper(3)]))
    found = recorder.support(mask).to_mask(32)[mask.flatten()]
    assert torch.equal(found, scores.isfinite()[mask]) and found.sum(1).max() <= 3 and found.sum(1).min() < 3


@pytest.mark.parametrize("seed", [0, 2, 3, 7])
def test_places_whose_candidates_were_rejected_are_recorded_anew(seed):
    model = peaked_model()
    recorder, sequences, mask, _ = sampled(model, dict(top_p=0.7), B=1, P=12, T=30, seed=seed, prompt_lookup_num_tokens=3)
    T = mask.shape[1]
    wanted = left_by(own_logits(model, sequences, T), top_p=0.7)
    assert torch.equal(recorder.support(mask).to_mask(32).view(1, T, 32)[mask], wanted[mask])
    assert len(recorder._steps) > T, "no candidate was rejected"


def test_rows_that_have_ended_take_no_memory():
    recorder, _, mask, _ = sampled(peaked_model(), dict(top_p=0.8))
    assert not mask.all() and sum(len(ids) for ids, _ in recorder._steps.values()) == len(recorder.support(mask).ids)


def test_what_cannot_be_recorded_is_refused():
    model = peaked_model()
    with pytest.raises(TypeError, match="model must be a causal LM .*got Linear"), recorded_support(torch.nn.Linear(1, 1)):
        pass
    with recorded_support(model) as recorder, pytest.raises(RuntimeError, match="no sampled token"):
        recorder.support(torch.ones(1, 1))
    with pytest.raises(ValueError, match="num_beams must be 1 with recorded_support, got 2"):
        sampled(model, dict(num_beams=2))
    assert "_get_logits_processor" not in vars(model)
    with recorded_support(model), pytest.raises(ValueError, match="recorded_support needs generate"):
        model._get_logits_processor(GenerationConfig())
    recorder, _, mask, _ = sampled(model, CUTS["top_k"])
    with pytest.raises(ValueError, match="mask must have a row for each of 6 .*got 5"):
        recorder.support(mask[1:])
    with pytest.raises(ValueError, match="where nothing was sampled, from place 8 of 10 on"):
        recorder.support(torch.ones(6, 10))


# ---- the trainer ----


@pytest.mark.parametrize(
    "options, kept",
    [
        (dict(), False),
        (dict(top_p=0.9), True),
        (dict(top_k=3), True),
        (dict(min_p=0.1), True),
        (dict(min_p=0.0, repetition_penalty=1.2), False),
        (dict(generation_kwargs={"typical_p": 0.9}), True),
        (dict(generation_kwargs={"eta_cutoff": 1e-3}), True),
        (dict(generation_kwargs={"min_new_tokens": 2}), False),
        (dict(generation_kwargs={"top_k": None}), True),  # generate then keeps 50
        (dict(generation_kwargs={"top_p": None, "typical_p": None}), False),
        (dict(top_p=0.9, generation_kwargs={"top_p": 1.0}), False),
        (dict(top_p=0.9, keep_sampling_mask=False), False),
        (dict(keep_sampling_mask=True), True),
        (dict(top_p=0.9, use_transformers_continuous_batching=True), False),
    ],
)
def test_the_mask_is_kept_where_sampling_is_truncated(tmp_path, options, kept):
    assert config(tmp_path, **options).keeps_sampling_mask == kept


def test_what_generate_fills_in_is_a_truncation(tmp_path, monkeypatch):
    """Its default of top_k cuts a vocabulary of 32 only where it is less than 50."""
    defaults = GenerationConfig._get_default_generation_params() | {"top_k": 3}
    monkeypatch.setattr(GenerationConfig, "_get_default_generation_params", staticmethod(lambda: defaults))
    (batch,) = next_micro_batches(trainer(tmp_path, peaked_model(), generation_kwargs={"top_k": None}))
    assert batch["support"].lengths()[batch["mask"].flatten()].unique().tolist() == [3]
    monkeypatch.delattr(GenerationConfig, "_get_default_generation_params")
    assert filled_in({"top_k": None, "top_p": 0.9}) == {"top_p": 0.9}


def test_continuous_batching_cannot_keep_it(tmp_path):
    with pytest.raises(ValueError, match="keep_sampling_mask must be False or None with use_transformers_continuous_batching"):
        config(tmp_path, keep_sampling_mask=True, use_transformers_continuous_batching=True)


@pytest.mark.parametrize("value", ["no", 1, 0, []])
def test_keep_sampling_mask_is_true_false_or_none(tmp_path, value):
    with pytest.raises(ValueError, match=re.escape(f"keep_sampling_mask must be True, False or None, got {value!r}")):
        config(tmp_path, keep_sampling_mask=value)


def masked_logps(t, model, batch, cut):
    """(log-probs, entropy) [B, T] over what the definitions of the truncation leave, through full logits."""
    T = batch["mask"].shape[1]
    logits = model(**model_inputs(batch)).logits[:, -T - 1 : -1].float()
    allowed = left_by(logits.detach(), **cut)
    log_p = (logits / t.loss_config.temperature).masked_fill(~allowed, -float("inf")).log_softmax(-1)
    entropy = -(log_p.exp() * log_p.masked_fill(~allowed, 0.0)).sum(-1)
    ids = batch["input_ids"][:, -T:, None]
    return log_p.gather(-1, ids).squeeze(-1).where(batch["mask"], 0.0), entropy.where(batch["mask"], 0.0)


def test_old_log_probs_are_the_samplers_own(tmp_path):
    cut = dict(top_p=0.9)
    for keep, far in ((None, False), (False, True)):
        t = trainer(tmp_path, peaked_model(), num_iterations=2, beta=0.1, keep_sampling_mask=keep, **cut)
        (batch,) = next_micro_batches(t)
        sampler, entropy = masked_logps(t, t.model, batch, cut)
        assert ((batch["old_logps"] - sampler)[batch["mask"]].abs().max() > 1e-2) == far
        if not far:
            torch.testing.assert_close(batch["old_logps"], sampler, rtol=0, atol=2e-6)
            torch.testing.assert_close(batch["ref_logps"], batch["old_logps"], rtol=0, atol=2e-6)  # the model has not moved yet
            _, output = t.compute_loss(t.model, batch, return_outputs=True)
            trains = (output.logps != 0).any(1)
            assert trains.sum() > 0
            torch.testing.assert_close(output.entropy[trains], entropy[trains], rtol=0, atol=5e-6)
        assert ("support" in batch) != far


PEFT = "a reference under PEFT"
MODES = {
    "on-policy": dict(cut=dict(top_p=0.7)),
    "packed": dict(cut=dict(top_p=0.7), padding_free=True, num_iterations=2),
    "all rows": dict(cut=dict(top_k=3), skip_untrained=False, entropy_coef=0.2, loss_type="grpo"),
    "packed, KL": dict(cut=dict(min_p=0.2, temperature=0.8), padding_free=True, beta=0.2, num_iterations=2),
    "accumulation": dict(cut=dict(top_p=0.7), gradient_accumulation_steps=2, per_device_train_batch_size=4, loss_type="bnpo"),
    PEFT: dict(cut=dict(top_p=0.7), beta=0.2),
}


@pytest.mark.parametrize("name", MODES)
def test_gradients_are_those_of_masked_logits(tmp_path, name):
    options = dict(MODES[name])
    cut = options.pop("cut")
    if name == PEFT:
        peft = pytest.importorskip("peft")
        options["peft_config"] = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    t = trainer(tmp_path, peaked_model(), **options, **cut)
    trained = [p for p in t.model.parameters() if p.requires_grad]
    for batch in next_micro_batches(t):
        assert batch["support"].positions == batch["mask"].numel() and batch["advantages"].abs().max() > 0.5
        t.model.train()
        ours = torch.autograd.grad(t.compute_loss(t.model, batch), trained)
        logps, entropy = masked_logps(t, t.model, batch, cut)
        tensors = {k: batch.get(k) for k in ("old_logps", "ref_logps", "num_items")}
        loss, _ = objective(logps, entropy, batch["advantages"], batch["mask"], **tensors, config=t.loss_config)
        exact = torch.autograd.grad(loss, trained)
        ours, exact = (torch.cat([g.flatten() for g in grads]) for grads in (ours, exact))
        assert (ours - exact).norm() <= 1e-4 * exact.norm() and exact.norm() > 1e-3
    if name == PEFT:
        with torch.no_grad(), t.model.disable_adapter():
            logits = t.model(**model_inputs(batch)).logits[:, -batch["mask"].shape[1] - 1 : -1]
        # over what was left to the policy, not over what the reference's own distribution would be cut to
        allowed = batch["support"].to_mask(32).view_as(logits)
        theirs = logits.masked_fill(~allowed, -float("inf")).log_softmax(-1)
        theirs = theirs.gather(-1, batch["input_ids"][:, -batch["mask"].shape[1] :, None]).squeeze(-1)
        assert (theirs - batch["ref_logps"])[batch["mask"]].abs().max() < 2e-6


def plan_of(t):
    return {line[:11].strip(): line[11:] for line in dry_run.describe(t)}


def test_logs_and_the_dry_run_speak_of_it(tmp_path):
    t = trainer(tmp_path, peaked_model(), top_k=3, max_steps=1, num_iterations=2, eval_dataset=DATA[:2], eval_strategy="steps", eval_steps=1)
    plan = plan_of(t)
    assert plan["sampling"] == "top_k 3; the loss is over the tokens that this leaves"
    # dH [8 x 6, 16], dW [32, 16] and 256 bytes a token are less than half a MiB
    assert re.search(r"tokens over the whole vocabulary; .*; over supports 0 MiB and 128 bytes a token in them$", plan["the loss"])
    assert re.search("in the body and at most .* in the head", plan["operations"])
    t.train()
    for log, prefix in zip(t.state.log_history, ("", "eval_"), strict=False):
        found = {name: value for name, value in log.items() if "sampling_mask/" in name}
        names = [prefix + row[0] for row in table("metrics.md", "Metrics of the sampling mask")[1:]]
        assert found == pytest.approx(dict(zip(names, [3.0, 0.0, 3 / 32], strict=True)))
    off = trainer(tmp_path, peaked_model(), top_k=3, keep_sampling_mask=False)
    plan = plan_of(off)
    assert plan["sampling"] == "top_k 3; the loss is over the whole vocabulary (keep_sampling_mask is off)"
    assert "vocabulary" not in plan["the loss"] and "supports" not in plan["the loss"] and "at most" not in plan["operations"]
    always = plan_of(trainer(tmp_path, peaked_model(), keep_sampling_mask=True))
    assert always["sampling"] == "no truncation; the loss is over the tokens that this leaves"
    assert "sampling" not in plan_of(trainer(tmp_path, peaked_model()))


def test_metrics_count_kept_tokens():
    support = TokenSupport.from_padded(torch.tensor([[3, -1, -1], [1, 2, -1], [-1, -1, -1], [0, 1, 2]]))
    mask = torch.tensor([[True, True], [True, False]])
    found = mask_metrics(support, mask, vocab=10)
    assert [x.item() for x in found.values()] == pytest.approx([(1 + 2 + 10) / 3, 1 / 3, (0 + 2 + 10) / 30])


def rows_of(batch, row):
    T = batch["mask"].shape[1]
    ids, offsets = batch["support"].ids, batch["support"].offsets.tolist()
    return [ids[offsets[i] : offsets[i + 1]].tolist() for i in range(row * T, (row + 1) * T)]


def test_batches_are_split_joined_and_taken_apart_by_rows():
    generator = torch.Generator().manual_seed(0)
    batches = []
    for B, T in ((3, 4), (2, 6)):
        mask = torch.rand(B, T, 9, generator=generator) < 0.3
        tokens = torch.ones(B, T, dtype=torch.bool)
        batches.append({"input_ids": torch.arange(B * (T + 2)).view(B, -1), "mask": tokens, "support": TokenSupport.from_mask(mask)})
    whole = joined(batches, 0)
    wanted = [[*rows_of(batches[0], i), [], []] for i in range(3)] + [rows_of(batches[1], i) for i in range(2)]
    assert [rows_of(whole, i) for i in range(5)] == wanted
    parts = microbatch.split(whole, 2)
    assert [rows_of(part, i) for part in parts for i in range(len(part["mask"]))] == wanted
    turned = microbatch.take(whole, torch.tensor([4, 0, 3]))
    assert [rows_of(turned, i) for i in range(3)] == [wanted[4], wanted[0], wanted[3]]


def test_a_run_resumed_amid_a_rollout_ends_in_the_same_bits(tmp_path):
    options = dict(top_p=0.8, num_iterations=3, beta=0.1, max_steps=5, save_strategy="steps", save_steps=2)
    whole = trainer(tmp_path / "whole", peaked_model(attention_dropout=0.1), **options)
    whole.train()
    resumed = trainer(tmp_path / "resumed", peaked_model(attention_dropout=0.1), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert torch.equal(weights(whole.model), weights(resumed.model))
    assert isinstance(resumed._rollout["support"], TokenSupport) and resumed._rollout_index == 1
    ids = [t._rollout["support"].ids for t in (whole, resumed)]
    assert torch.equal(*ids) and ids[0].dtype == torch.int32


DDP = """
import sys
sys.path.insert(0, {tests!r})
from support.peaked_model import peaked_model
from support.tiny_trainer import trainer, weights
import torch
import torch.distributed as dist
t = trainer({folder!r}, peaked_model(tie_word_embeddings=False), per_device_train_batch_size=4, top_p=0.7, beta=0.1, num_iterations=2,
            optim="sgd", lr_scheduler_type="constant", learning_rate=0.3, max_steps=1, save_strategy="steps", save_steps=1)
t.train()
torch.save([t._rollout, t.state.log_history[0], weights(t.accelerator.unwrap_model(t.model))], {folder!r} + f"/rank{{dist.get_rank()}}.pt")
"""


@pytest.mark.exhaustive(reason="three runs, ten seconds")
def test_two_processes_train_as_one_and_one_goes_on_from_their_checkpoint(tmp_path):
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29500 + os.getpid() % 2000), "WORLD_SIZE": "2"}
    environment |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    code = DDP.format(tests=os.path.dirname(__file__), folder=str(tmp_path))
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env={**environment, "RANK": str(r), "LOCAL_RANK": str(r)}, stderr=subprocess.PIPE)
        for r in range(2)
    ]
    for process in processes:
        errors = process.communicate()[1]
        assert process.returncode == 0, errors.decode()
    (left, log, after), (right, _, also) = (torch.load(tmp_path / f"rank{r}.pt", weights_only=False) for r in range(2))
    assert torch.equal(after, also)
    kept = torch.cat([part["support"].lengths()[part["mask"].flatten()] for part in (left, right)])
    assert log["sampling_mask/mean_size"] == pytest.approx(kept.float().mean().item())

    one = trainer(tmp_path, peaked_model(tie_word_embeddings=False), top_p=0.7, beta=0.1, num_iterations=2, optim="sgd",
                  lr_scheduler_type="constant", learning_rate=0.3, max_steps=2)  # fmt: skip
    whole = {k: v for k, v in joined([left, right], 0).items()}
    items = whole["mask"].sum()
    gradient = torch.autograd.grad(one.compute_loss(one.model, {**whole, "num_items": items}), list(one.model.parameters()))
    assert log["grad_norm"] == pytest.approx(torch.cat([g.flatten() for g in gradient]).norm().item(), rel=1e-4)
    one.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert [rows_of(one._rollout, i) for i in range(8)] == [rows_of(whole, i) for i in range(8)]
