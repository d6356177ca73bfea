"""The log-prob of each token that transformers' generate draws, by the kernels of the loss.

    with sampled_logprobs(model) as sampler:
        sequences = model.generate(input_ids, attention_mask=attention, generation_config=config)   [B, P + T]
    logps = sampler.log_probs(mask)                     mask [B, T], True up to and including the end -> [B, T] float32

Inside of the block the output layer makes its logits by the product of the loss's head, and each token is scored as soon as it is
drawn, from the raw logits of its step: by the row kernels, with the temperature, softcap and logit scale of training. From the
same logits comes the same log-prob as in `linear_logprobs`, bit by bit. Whether a body that reads its cache makes the hidden
states of one that sees the whole row is up to the body: attention sums in another order there.

Under truncated sampling the log-prob is over the tokens that were left, which the recorder of `recorded_support` has noted:

    with recorded_support(model) as recorder, sampled_logprobs(model, support=recorder) as sampler:

Nothing of the size [B, V] outlives its step.
"""

import contextlib

import torch

from .. import backends
from ..backends.statistics import Scored, Tile, new_statistics
from ..checks import check_head, check_options, kind
from ..engine.fixed_order import batch_invariance, fixed_logits
from ..engine.products import accumulation_dtype, adapted, tile_dtype, write_logits
from ..extras import needs
from ..logprobs import linear_logprobs
from ..losses.config import GRPOLossConfig, LogitTransform
from .transformers import causal_lm, lm_head

with needs("train", __name__):
    from transformers import StoppingCriteria


@torch.no_grad()
def linear_logits(hidden, weight, bias=None, lora=None, *, backend="auto"):
    """Logits by the product of the loss's head, without gradient: ``hidden @ weight.T + scale * (hidden @ A.T) @ B.T + bias``.

    Args:
        hidden: [.., D].
        weight: [V, D] of the same dtype (under autocast both are cast).
        bias: [V] or None.
        lora: (A [r, D], B [V, r], scale) or None.
        backend: whose row kernels will read them.

    Returns:
        [.., V] in the dtype in which the loss holds logits: float32 where a product of 16-bit operands can write it, else hidden's.

    Raises:
        TypeError, ValueError: as `linear_logprobs`.
    """
    hidden, weight, bias, lora = check_head(hidden, weight, bias, lora, None)
    rows, vocab = hidden.reshape(-1, hidden.shape[-1]), weight.shape[0]
    dtype = tile_dtype(rows, backends.resolve(backend, rows.device, rows.dtype, vocab))
    out = torch.empty(rows.shape[0], vocab, dtype=dtype, device=rows.device)
    with torch.autocast(rows.device.type, enabled=False):
        fixed = fixed_logits(batch_invariance(None, rows), rows)
        a, b, scale = (None, None, 1.0) if lora is None else lora
        write_logits(rows, weight, out, None if a is None else adapted(rows, a, fixed), b, scale, fixed)
    if bias is not None:
        out += bias.to(dtype)
    return out.view(*hidden.shape[:-1], vocab)


def score_rows(logits, tokens, transform, bias=None, backend="auto"):
    """Log-probs of tokens from raw logits, by the row kernels.

    Args:
        logits: [R, V], before scale, softcap and temperature.
        tokens: [R] int64; one outside of [0, V) has a log-prob of -inf.
        transform: a `LogitTransform`: logit_scale, softcap and temperature.
        bias: [V] or None, added to the logits.
        backend: as in `linear_logprobs`.

    Returns:
        `Scored`: logps, lse and entropy, [R] float32 (float64 for float64).
    """
    acc, device = accumulation_dtype(logits.dtype), logits.device
    kernels = backends.kernels(backends.resolve(backend, device, logits.dtype, logits.shape[1]))
    stats = new_statistics(len(logits), acc, device)
    scored = Scored(*torch.empty(3, len(logits), dtype=acc, device=device))
    kernels.statistics(Tile(logits, tokens, transform, None if bias is None else bias.to(acc).contiguous()), stats)
    kernels.close(stats, scored)
    return scored


class SampledLogProbs(StoppingCriteria):
    """Scores each token right behind its draw, and stops nothing."""

    def __init__(self, support, backend):
        self._support, self._backend = support, backend
        self.begin(1.0)

    def begin(self, temperature):
        """Of a call of generate."""
        self._temperature = temperature
        self._steps, self._step, self._checked = [], None, False

    def logits(self, hidden, head):
        """What the output layer returns for hidden [B, n, D]; remembers the last position of each row."""
        hidden, weight, bias, lora = check_head(hidden.to(head.weight.device), head.weight, head.bias, head.lora, None)
        raw = linear_logits(hidden, weight, None, lora, backend=self._backend)
        # copies: a model may scale in place what it is returned, and a whole prompt's logits must not stay for the last one's sake
        last, states = (x[:, -1].clone(memory_format=torch.contiguous_format) for x in (raw, hidden))
        self._step = last, states, head._replace(weight=weight, bias=bias, lora=lora)
        return raw if bias is None else raw + bias.to(raw.dtype)

    def check(self, _, inputs, output):
        """A forward hook of the model: refuses an architecture whose logits are not what its head and configuration say."""
        if self._checked or self._step is None:
            return
        raw, _, head = self._step
        ours = head.logit_scale * (raw if head.bias is None else raw + head.bias).float()
        ours = ours if head.softcap is None else head.softcap * torch.tanh(ours / head.softcap)
        theirs = output.logits[:, -1].float()
        # in bf16 they differ by some 1e-2 of their norm at most
        if ours.shape != theirs.shape or (ours - theirs.to(ours.device)).norm() > 0.02 * theirs.norm():
            raise NotImplementedError(
                "sampled_logprobs needs logits that are made from last hidden states, output layer, logit_scale, logits_scaling "
                "and final_logit_softcapping alone"
            )
        self._checked = True

    def __call__(self, input_ids, scores, **kwargs):
        raw, states, head = self._step
        tokens = input_ids[:, -1].to(raw.device).contiguous()
        options = dict(temperature=self._temperature, logit_scale=head.logit_scale, softcap=head.softcap)
        transform = LogitTransform(**options)
        logps = score_rows(raw, tokens, transform, head.bias, self._backend).logps
        if self._support is not None and (cut := self._support.last()).ids.numel():
            rows = cut.lengths().nonzero().squeeze(1)
            if head.weight.untyped_storage().size() == 0:
                raise NotImplementedError("support must be None for a sharded model, whose output layer is gone by then")
            with torch.autocast(raw.device.type, enabled=False):  # all is cast already
                over = linear_logprobs(
                    states[rows], head.weight, tokens[rows], bias=head.bias, lora=head.lora, backend=self._backend,
                    support=cut.take(rows).to(raw.device), **options,
                )  # fmt: skip
            logps[rows] = over.logps
        self._steps.append(logps)
        self._step = None
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def log_probs(self, mask):
        """Of the completions of the last call of generate.

        Args:
            mask: [B, T] bool or 0/1, False behind the end of a completion; T at most what was generated where it is True.

        Returns:
            [B, T] float32 (float64 for a float64 head) on the device of the mask, 0 where it is False.

        Raises:
            ValueError: the mask has other rows than were sampled, or is True where nothing was.
            RuntimeError: generate has not run inside of the block.
            TypeError: the mask is no tensor [B, T].
        """
        if not self._steps:
            raise RuntimeError("sampled_logprobs has seen no sampled token: run generate (not generate_batch) inside of its block")
        if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
            raise TypeError(f"mask must be a tensor [B, T], got {kind(mask)}")
        found, mask = torch.stack(self._steps, 1).to(mask.device), mask.bool()
        if len(found) != len(mask):
            raise ValueError(f"mask must have a row for each of {len(found)} sampled completions, got {len(mask)}")
        T = found.shape[1]
        if mask[:, T:].any():
            raise ValueError(f"mask must be False where nothing was sampled, from place {T} of {mask.shape[1]} on, got True")
        found = torch.nn.functional.pad(found, (0, max(0, mask.shape[1] - T)))[:, : mask.shape[1]]
        return found.where(mask, 0.0)


@contextlib.contextmanager
def sampled_logprobs(model, *, temperature=None, support=None, head_in_float32=False, backend="auto"):
    """A `SampledLogProbs` of what generate of ``model`` draws inside of the block; see the module.

    Args:
        model: a causal LM of transformers, or one under PEFT or DDP. It is left as it was, after an exception too.
        temperature: that of training, which the logits are divided by; None is that of the call, 1 where it does not sample.
        support: the recorder of `recorded_support`, entered first: log-probs are over what the truncation left.
        head_in_float32: run the head in float32 and outside of autocast, as `fuse_lm_head` has it.
        backend: as in `linear_logprobs`.

    Raises:
        TypeError: it has no generate of transformers, or ``support`` is no recorder.
        RuntimeError: the model is inside of such a block already.
        ValueError: an option is not legal; or, from generate: beam search, whose rows change places, assisted generation, guidance.
        NotImplementedError: from generate, this architecture makes its logits otherwise.
    """
    owner = causal_lm(model)
    if not hasattr(owner, "_get_stopping_criteria"):
        raise TypeError(f"model must be a causal LM of transformers with a method generate, got {type(model).__name__}")
    if "_get_candidate_generator" in vars(owner):
        raise RuntimeError("model must not be inside of another block of sampled_logprobs: a token is scored once")
    if support is not None and not hasattr(support, "last"):
        raise TypeError(f"support must be the recorder of recorded_support, got {kind(support)}")
    check_options(GRPOLossConfig() if temperature is None else GRPOLossConfig(temperature=temperature), None, backend)
    layer, criteria = owner.get_output_embeddings(), owner._get_stopping_criteria
    sampled = SampledLogProbs(support, backend)

    def forward(hidden):
        head = lm_head(owner, torch.float32 if head_in_float32 else None)
        if not head_in_float32:
            return sampled.logits(hidden, head)
        with torch.autocast(hidden.device.type, enabled=False):
            return sampled.logits(hidden.float(), head)

    def make_and_score(generation_config, *args, **kwargs):
        found = criteria(generation_config, *args, **kwargs)
        if getattr(generation_config, "is_assistant", False):
            return found
        if (generation_config.num_beams or 1) > 1:
            raise ValueError(f"num_beams must be 1 with sampled_logprobs, got {generation_config.num_beams}")
        if generation_config.guidance_scale not in (None, 1):  # whose processor runs the model a second time
            raise ValueError(f"guidance_scale must be None with sampled_logprobs, got {generation_config.guidance_scale}")
        own = generation_config.temperature if generation_config.do_sample else None
        sampled.begin(float(temperature or own or 1.0))
        found.append(sampled)
        return found

    def refuse(*args, **kwargs):
        raise ValueError("assistant_model and prompt_lookup_num_tokens must be None with sampled_logprobs: one token a step")

    with contextlib.ExitStack() as stack:
        compiled = torch.compiler.disable(forward)  # a compiled graph would not remember the logits
        for thing, name, value in ((layer, "forward", compiled), (owner, "_get_stopping_criteria", make_and_score),
                                   (owner, "_get_candidate_generator", refuse)):  # fmt: skip
            stack.enter_context(_replaced(thing, name, value))
        stack.callback(owner.register_forward_hook(sampled.check).remove)
        yield sampled


@contextlib.contextmanager
def _replaced(thing, name, value):
    """An attribute of this instance, for the block."""
    before = {name: vars(thing)[name]} if name in vars(thing) else {}
    setattr(thing, name, value)
    try:
        yield
    finally:
        delattr(thing, name)
        vars(thing).update(before)
