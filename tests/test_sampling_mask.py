"""The tokens that truncated sampling left: recorded in generate, and what the trainer makes of them."""

import pytest
import torch
from test_trainer import tiny_model
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import TopKLogitsWarper

from grpo_kernels import linear_logprobs
from grpo_kernels.integrations.sampling_mask import recorded_support
from grpo_kernels.integrations.transformers import lm_head
from grpo_kernels.trainer.rollout import completion_mask

pytestmark = pytest.mark.usefixtures("one_thread")
EOS = [1, 3, 4, 5, 6]
CUTS = {
    "top_k": dict(top_k=4),
    "top_p": dict(top_p=0.8),
    "min_p": dict(min_p=0.1),
    "all of them, colder": dict(top_k=12, top_p=0.9, min_p=0.05, temperature=0.7),
    "one token": dict(top_k=1),
    "nothing": dict(),
}


def peaked_model():
    """Of `tiny_model`, whose own distributions are next to uniform."""
    model = tiny_model().eval()
    with torch.no_grad():
        lm_head(model).weight.mul_(15)
    return model


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
