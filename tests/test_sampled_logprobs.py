"""Log-probs taken as tokens are drawn, by the bits of training: transformers' generate, vLLM's sampler."""

from typing import NamedTuple

import pytest
import torch
from support.peaked_model import CUTS, EOS, peaked_model
from support.tiny_trainer import tiny_model
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    GraniteConfig,
    GraniteForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from grpo_kernels import linear_logprobs
from grpo_kernels.backends import native
from grpo_kernels.integrations.sampling import linear_logits, sampled_logprobs
from grpo_kernels.integrations.sampling_mask import recorded_support
from grpo_kernels.integrations.transformers import fuse_lm_head, is_fused, lm_head
from grpo_kernels.integrations.vllm import use_row_kernels
from grpo_kernels.trainer.rollout import completion_mask

pytestmark = pytest.mark.usefixtures("one_thread")
SAME_BITS_WHATEVER_THE_ROWS = native.why_unavailable() is None
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])


@pytest.fixture(autouse=True)
def batch_invariant(monkeypatch):
    """torch.mm sums in an order that depends on the number of rows."""
    monkeypatch.setenv("GRPO_KERNELS_BATCH_INVARIANT", "1")


def position_wise(model, dtype=torch.float32):
    """A model whose layers add nothing: the hidden state of a token is its own, with a cache and without."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "dense.weight", "fc2.weight")):
                p.zero_()
            elif name == "lm_head.bias":
                p.normal_()
        lm_head(model).weight.mul_(15)
    return model.eval().to(dtype)


def drawn(model, B=6, P=3, T=8, seed=0, dtype=torch.float32, recorder=None, generate=None, scorer=(), **options):
    """(log-probs as drawn, sequences, mask)."""
    given = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0) | options
    config = GenerationConfig(max_new_tokens=T, eos_token_id=EOS, pad_token_id=0, **given)
    torch.manual_seed(seed)
    prompts = torch.randint(7, 32, (B, P))
    with sampled_logprobs(model, support=recorder, **dict(scorer)) as sampler:
        sequences = (generate or model.generate)(prompts, attention_mask=torch.ones_like(prompts), generation_config=config)
    mask, _ = completion_mask(sequences[:, P:], EOS)
    return sampler.log_probs(mask), sequences, mask


def states(model, sequences, T):
    with torch.no_grad():
        return model.get_decoder()(sequences, attention_mask=torch.ones_like(sequences))[0][:, -T - 1 : -1]


def trained(model, sequences, mask, by_step, temperature=1.0, support=None):
    """What `linear_logprobs` says of hidden states of the whole rows: a call for each step, or one for all."""
    T, head = mask.shape[1], lm_head(model)
    hidden, ids = states(model, sequences, T), sequences[:, -T:]
    options = dict(temperature=temperature, bias=head.bias, lora=head.lora, logit_scale=head.logit_scale, softcap=head.softcap)
    with torch.no_grad():
        if not by_step:
            return linear_logprobs(hidden, head.weight, ids, mask=mask, support=support, **options).logps
        steps = [linear_logprobs(hidden[:, t], head.weight, ids[:, t], **options).logps for t in range(T)]
    return torch.stack(steps, 1).where(mask, 0.0)


MODELS = {
    "plain": dict(),
    "softcap": dict(config=Gemma2Config, model=Gemma2ForCausalLM, num_key_value_heads=2, head_dim=8, final_logit_softcapping=3.0),
    "scale": dict(config=GraniteConfig, model=GraniteForCausalLM, logits_scaling=4.0),
    "bias": dict(config=PhiConfig, model=PhiForCausalLM),
    "wide": dict(vocab_size=4000),
}


@pytest.mark.cover("name")
@DTYPES
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [dict(), dict(temperature=0.7, num_return_sequences=2), dict(use_cache=False)], ids=["plain", "many", "no cache"])
def test_a_token_has_the_bits_of_training_as_it_is_drawn(name, options, dtype):
    model = position_wise(tiny_model(**MODELS[name]), dtype)
    found, sequences, mask = drawn(model, **options)
    assert found.dtype == torch.float32 and found.shape == mask.shape and not found[~mask].any()
    assert (name == "wide" or (~mask).sum() > 0) and found[mask].min() < -0.5 and len(mask) == 6 * options.get("num_return_sequences", 1)
    wanted = trained(model, sequences, mask, by_step=True, temperature=options.get("temperature", 1.0))
    assert torch.equal(found, wanted)
    if SAME_BITS_WHATEVER_THE_ROWS:
        assert torch.equal(found, trained(model, sequences, mask, by_step=False, temperature=options.get("temperature", 1.0)))


@DTYPES
@pytest.mark.parametrize("name", ["top_k", "top_p", "all of them, colder"])
def test_over_what_truncation_left(name, dtype):
    model = position_wise(tiny_model(), dtype)
    with recorded_support(model) as recorder:
        found, sequences, mask = drawn(model, recorder=recorder, **CUTS[name])
    support, temperature = recorder.support(mask), CUTS[name].get("temperature", 1.0)
    wanted = trained(model, sequences, mask, False, temperature, support)
    assert torch.equal(found, wanted) and not torch.equal(found, trained(model, sequences, mask, True, temperature))


def test_a_row_that_kept_the_vocabulary_beside_rows_that_did_not():
    model = position_wise(tiny_model())
    with torch.no_grad():
        model.lm_head.weight[:, :] *= 0.1
    with recorded_support(model) as recorder:
        found, sequences, mask = drawn(model, recorder=recorder, min_p=0.75)
    support = recorder.support(mask)
    assert (support.lengths()[mask.flatten()] > 0).any()
    torch.testing.assert_close(found, trained(model, sequences, mask, False, support=support), rtol=0, atol=1e-6)


def test_a_temperature_of_training_and_a_head_in_float32():
    model = position_wise(tiny_model(), torch.bfloat16)
    found, sequences, mask = drawn(model, temperature=0.5, scorer=dict(temperature=1.3, head_in_float32=True))
    head = lm_head(model, torch.float32)
    steps = [linear_logprobs(h.float(), head.weight, ids, temperature=1.3).logps
             for h, ids in zip(states(model, sequences, mask.shape[1]).unbind(1), sequences[:, 3:].unbind(1), strict=True)]  # fmt: skip
    assert torch.equal(found, torch.stack(steps, 1).detach().where(mask, 0.0))


def test_under_autocast_the_head_is_that_of_training_under_autocast():
    model = position_wise(tiny_model())
    with torch.autocast("cpu", torch.bfloat16):
        found, sequences, mask = drawn(model)
        wanted = trained(model, sequences, mask, by_step=True)
    assert torch.equal(found, wanted) and not torch.equal(found, trained(model, sequences, mask, by_step=True))


def test_adapters_and_wrappers():
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(position_wise(tiny_model(tie_word_embeddings=False)), lora).eval()
    found, sequences, mask = drawn(model)
    assert torch.equal(found, trained(model.get_base_model(), sequences, mask, by_step=True))
    with model.disable_adapter():
        bare = trained(model.get_base_model(), sequences, mask, by_step=True)
    assert (found - bare).abs().max() > 1e-3
    wrapped = torch.nn.parallel.DistributedDataParallel.__new__(torch.nn.parallel.DistributedDataParallel)
    torch.nn.Module.__init__(wrapped)
    wrapped.module = model
    again, _, _ = drawn(wrapped, generate=model.generate)
    assert torch.equal(again, found)


def test_a_model_that_makes_logits_of_the_whole_prompt():
    model = position_wise(tiny_model())
    own = model.forward
    model.forward = lambda *args, logits_to_keep=0, **kwargs: own(*args, **kwargs)
    found, sequences, mask = drawn(model)
    torch.testing.assert_close(found, trained(model, sequences, mask, by_step=True), rtol=0, atol=1e-6)


def test_the_tokens_are_those_that_the_model_alone_would_draw():
    model = peaked_model()
    with torch.no_grad():
        prompts = torch.randint(7, 32, (4, 3), generator=torch.Generator().manual_seed(1))
        config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=6, eos_token_id=EOS, pad_token_id=0)
        runs = []
        for ours in (False, True):
            torch.manual_seed(3)
            with sampled_logprobs(model) if ours else torch.no_grad():
                runs.append(model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=config))
    assert torch.equal(*runs)


@pytest.mark.parametrize("kind", [dict(), dict(config=Qwen2Config, model=Qwen2ForCausalLM, num_key_value_heads=2)], ids=["llama", "qwen2"])
def test_attention_over_a_cache_is_off_by_rounding_alone(kind):
    model = peaked_model(**kind)
    found, sequences, mask = drawn(model, T=20)
    assert (found - trained(model, sequences, mask, by_step=False)).abs().max() < 2e-5


def test_the_model_is_left_as_it_was():
    model = fuse_lm_head(peaked_model())
    layer, before = model.lm_head, dict(vars(model))
    hooks = len(model._forward_hooks)
    drawn(model)
    with pytest.raises(ZeroDivisionError), sampled_logprobs(model):
        assert "forward" in vars(layer)
        1 / 0  # noqa: B018
    assert vars(model) == before and "forward" not in vars(layer) and len(model._forward_hooks) == hooks and is_fused(model)
    layer.forward = own = layer.forward
    drawn(model)
    assert vars(layer)["forward"] is own


def test_what_cannot_be_scored_is_refused():
    model = peaked_model()
    for options, match in ((dict(num_beams=2), "num_beams must be 1"), (dict(prompt_lookup_num_tokens=2), "prompt_lookup_num_tokens must be None"),
                           (dict(guidance_scale=1.5), "guidance_scale must be None")):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            drawn(model, B=1, **options)
    with pytest.raises(TypeError, match="got Linear"), sampled_logprobs(torch.nn.Linear(1, 1)):
        pass
    with pytest.raises(ValueError, match="temperature must be > 0"), sampled_logprobs(model, temperature=0.0):
        pass
    with sampled_logprobs(model), pytest.raises(RuntimeError, match="inside of another block"), sampled_logprobs(model):
        pass
    with pytest.raises(TypeError, match="support must be the recorder of recorded_support, got bool"), sampled_logprobs(model, support=True):
        pass
    with sampled_logprobs(model) as sampler, pytest.raises(RuntimeError, match="no sampled token"):
        sampler.log_probs(torch.ones(1, 1))
    with sampled_logprobs(model) as sampler:
        model.generate(torch.full((1, 3), 9), max_new_tokens=1, do_sample=False, eos_token_id=None, pad_token_id=0)
        for wrong, named in ((None, "NoneType"), (torch.ones(1), "torch.float32")):
            with pytest.raises(TypeError, match=rf"mask must be a tensor \[B, T\], got {named}"):
                sampler.log_probs(wrong)
    prompts = torch.full((2, 3), 9)
    with sampled_logprobs(model) as sampler:
        out = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert (sampler.log_probs(torch.ones(2, 4)) < 0).all() and out.shape == (2, 7)
    with pytest.raises(ValueError, match="mask must have a row for each of 2 .*got 3"):
        sampler.log_probs(torch.ones(3, 4))
    with pytest.raises(ValueError, match="where nothing was sampled, from place 4 of 5 on"):
        sampler.log_probs(torch.ones(2, 5))
    assert sampler.log_probs(torch.ones(2, 5) * (torch.arange(5) < 2)).shape == (2, 5)


def test_an_architecture_that_makes_its_logits_otherwise_is_refused():
    model = peaked_model()
    own = model.forward

    def halved(*args, **kwargs):
        found = own(*args, **kwargs)
        found.logits = found.logits / 2
        return found

    model.forward = halved
    with pytest.raises(NotImplementedError, match="sampled_logprobs needs logits that are made"):
        drawn(model)


def test_linear_logits_are_the_plain_ones():
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias, a, b = (torch.randn(*shape, generator=g) for shape in ((2, 5, 8), (33, 8), (33,), (2, 8), (33, 2)))
    wanted = hidden @ weight.T + 0.5 * hidden @ a.T @ b.T + bias
    torch.testing.assert_close(linear_logits(hidden, weight.requires_grad_(), bias, (a, b, 0.5)), wanted, rtol=1e-5, atol=1e-5)
    half = linear_logits(hidden.bfloat16(), weight.bfloat16(), bias, (a.bfloat16(), b.bfloat16(), 0.5))
    assert half.dtype == torch.bfloat16 and (half - wanted).norm() < 0.02 * wanted.norm() and not half.requires_grad


# ---- vLLM ----


class LogprobsTensors(NamedTuple):
    logprob_token_ids: torch.Tensor  # [R, 1 + k] int32: the sampled token, then the likeliest
    logprobs: torch.Tensor  # [R, 1 + k]
    selected_token_ranks: torch.Tensor  # [R]


class Sampler(torch.nn.Module):
    """What of vLLM's V1 sampler makes log-probs: its modes, the order of its steps, the names and dtypes of what it returns."""

    def __init__(self, logprobs_mode="raw_logprobs"):
        super().__init__()
        self.logprobs_mode = logprobs_mode

    def forward(self, logits, temperature, num_logprobs):
        logits = logits.to(torch.float32)
        raw = self.compute_logprobs(logits) if self.logprobs_mode == "raw_logprobs" else logits.clone()
        sampled = logits.div_(temperature).softmax(-1).multinomial(1).squeeze(1)
        return sampled.to(torch.int32), self.gather_logprobs(raw, num_logprobs, token_ids=sampled)

    @staticmethod
    def compute_logprobs(logits):
        return logits.log_softmax(dim=-1, dtype=torch.float32)

    @staticmethod
    def gather_logprobs(logprobs, num_logprobs, token_ids):
        assert token_ids.dtype == torch.int64
        values, ids = logprobs.topk(num_logprobs, dim=-1)
        own = logprobs.gather(-1, token_ids.unsqueeze(-1))
        ids = torch.cat([token_ids.unsqueeze(-1), ids], 1).to(torch.int32)
        return LogprobsTensors(ids, torch.cat([own, values], 1), (logprobs >= own).sum(-1))


@pytest.mark.parametrize("num_logprobs", [0, 3])
def test_vllms_sampler_reports_the_bits_of_training(num_logprobs):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(7, 16, generator=g), torch.randn(5000, 16, generator=g)
    sampler = Sampler("raw_logits")
    use_row_kernels(sampler, temperature=0.8)
    torch.manual_seed(0)
    logits = linear_logits(hidden, weight)
    ids, found = sampler(logits.clone(), 0.8, num_logprobs)
    wanted = linear_logits(hidden, weight).div(0.8).log_softmax(-1)
    tokens = found.logprob_token_ids.long()
    torch.testing.assert_close(found.logprobs, wanted.gather(1, tokens), rtol=1e-5, atol=1e-5)
    assert torch.equal(tokens[:, 0], ids.long()) and found.logprobs.shape == (7, 1 + num_logprobs)
    plain = LogprobsTensors(*Sampler.gather_logprobs(wanted, num_logprobs, ids.long()))
    assert torch.equal(found.selected_token_ranks, plain.selected_token_ranks) and torch.equal(tokens, plain.logprob_token_ids.long())
    # rows of the identity have these very logits as their products
    exact = linear_logprobs(torch.eye(7), logits.T.contiguous(), ids.long(), temperature=0.8).logps
    assert torch.equal(found.logprobs[:, 0], exact)
    again = found.logprobs[:, 1:][tokens[:, 1:] == tokens[:, :1]]
    assert torch.equal(again, found.logprobs[:, 0][(tokens[:, 1:] == tokens[:, :1]).any(1)])
    del sampler.gather_logprobs
    assert torch.equal(sampler.gather_logprobs(logits, 0, ids.long()).logprobs[:, 0], logits.gather(1, ids.long().unsqueeze(1))[:, 0])


def test_a_sampler_that_is_not_vllms_is_refused():
    with pytest.raises(ValueError, match="logprobs_mode must be 'raw_logits', .*got 'raw_logprobs'"):
        use_row_kernels(Sampler())
    with pytest.raises(TypeError, match="sampler must be .*got Linear"):
        use_row_kernels(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="temperature must be > 0"):
        use_row_kernels(Sampler("raw_logits"), temperature=0.0)
