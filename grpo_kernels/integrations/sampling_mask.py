"""What truncated sampling left of the vocabulary at every step of transformers' generate: the support of each sampled token.

    with recorded_support(model) as recorder:
        sequences = model.generate(input_ids, attention_mask=attention, generation_config=config)   [B, P + T]
    support = recorder.support(mask)                      mask [B, T], True up to and including the end -> TokenSupport of [B, T]

``support`` goes to `fused_linear_grpo_loss` and `linear_logprobs` beside the T completion tokens. A position has an empty range,
the whole vocabulary, where the mask is False and where the sampler left every token.

The recorder runs behind every other processor: temperature, top-k, top-p, min-p, penalties, and what the call brings. generate puts
a ``logits_processor`` of the call in front of the truncation, so the method that makes its list is overridden for the block.
A token is left when its score is finite. Penalties move scores and leave every token: they are no part of a support.

Kept are int32 ids of the rows that were truncated and have not ended, 4 bytes a token that was left, on the device of the scores;
nothing of the size [B, V] outlives its step. The block may hold several calls of generate; `support` is then that of the last.
"""

import contextlib

import torch

from ..extras import needs
from ..support import TokenSupport

with needs("train", __name__):
    from transformers import GenerationConfig, LogitsProcessor


# an option of GenerationConfig, and whether a value of it leaves the least likely tokens out. Those that ban a few tokens alone
# (bad_words_ids, min_new_tokens, ...) leave supports next to as large as the vocabulary, dearer than the vocabulary itself.
_TRUNCATES = {
    "top_k": lambda k: k > 0,
    "top_p": lambda p: p < 1,
    "min_p": lambda p: p > 0,
    "top_h": lambda h: True,
    "typical_p": lambda p: p < 1,
    "epsilon_cutoff": lambda e: 0 < e < 1,
    "eta_cutoff": lambda e: 0 < e < 1,
}


def truncations(options) -> dict:
    """Those of the ``options`` of a sampling by which tokens are left out because they are unlikely."""
    return {name: options[name] for name, cuts in _TRUNCATES.items() if options.get(name) is not None and cuts(options[name])}


def filled_in(options) -> dict:
    """The ``options`` of a call of generate as it reads them: where one is missing or None its own default counts, 50 for top_k."""
    defaults = getattr(GenerationConfig, "_get_default_generation_params", dict)()  # transformers 4 keeps None
    return defaults | {name: value for name, value in options.items() if value is not None}


def mask_metrics(support: TokenSupport, mask: torch.Tensor, vocab: int) -> dict[str, torch.Tensor]:
    """Means over the kept tokens of ``mask`` [B, T], nan where there is none: see docs/metrics.md."""
    sizes = support.lengths().view_as(mask)[mask]
    sizes = sizes.where(sizes > 0, vocab)
    single = sizes == 1
    return {
        "sampling_mask/mean_size": sizes.float().mean(),
        "sampling_mask/single_share": single.float().mean(),
        "sampling_mask/computed_share": sizes.masked_fill(single, 0).float().mean() / vocab,
    }


class SupportRecorder(LogitsProcessor):
    """Notes which tokens have a finite score at each step of a call of generate, and changes none."""

    supports_continuous_batching = False

    def __init__(self):
        self.begin(0, None)

    def begin(self, prompt_length, eos_ids):
        """Of a call of generate: the columns of its prompt, and the tokens [n] that end a sequence or None."""
        self._prompt_length, self._eos_ids = prompt_length, eos_ids
        self._rows, self.vocab = None, None  # of the scores
        self._steps = {}  # place in the completion -> (ids int32, row after row; their number in each row [B])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        left = scores.isfinite()
        whole = left.all(1)
        written = input_ids[:, self._prompt_length :]
        if self._eos_ids is not None:
            whole |= torch.isin(written, self._eos_ids.to(written.device)).any(1)  # an ended row goes on with padding
        left &= ~whole.unsqueeze(1)
        self._rows, self.vocab = scores.shape
        # by place and not by call: assisted generation comes back to the places whose candidates it has rejected
        self._steps[written.shape[1]] = left.nonzero()[:, 1].int(), left.sum(1)
        return scores

    def last(self) -> TokenSupport:
        """Of the step that was seen last, a position for each row of the scores."""
        if not self._steps:
            raise RuntimeError("recorded_support has seen no sampled token of this model")
        return TokenSupport.from_lengths(*next(reversed(self._steps.values())))

    def support(self, mask: torch.Tensor) -> TokenSupport:
        """Of the completions of the last call of generate.

        Args:
            mask: [B, T] bool or 0/1, False behind the end of a completion; T at most what was generated where it is True.

        Returns:
            `TokenSupport` of the flattened [B, T] on the device of the mask; ids int32.

        Raises:
            ValueError: the mask has other rows than were sampled, or is True where nothing was.
            RuntimeError: generate has not run inside of the block.
        """
        if self._rows is None:
            raise RuntimeError("recorded_support has seen no sampled token: run generate of this model inside of its block")
        B, T = mask.shape
        if self._rows != B:
            raise ValueError(f"mask must have a row for each of {self._rows} sampled completions, got {B}")
        mask = mask.bool()
        missing = [t for t in range(T) if t not in self._steps]
        if mask[:, missing].any():
            raise ValueError(f"mask must be False where nothing was sampled, from place {missing[0]} of {T} on, got True")
        device, nothing = mask.device, (torch.zeros(0, dtype=torch.int32), torch.zeros(B, dtype=torch.int64))
        # step after step, and an empty range behind them, which masked positions get
        steps = [*(self._steps.get(t, nothing) for t in range(T)), (nothing[0], nothing[1].new_zeros(1))]
        ids, lengths = (torch.cat([x.to(device) for x in parts]) for parts in zip(*steps, strict=True))
        by_step = TokenSupport.from_lengths(ids, lengths)
        row, place = torch.arange(B, device=device).unsqueeze(1), torch.arange(T, device=device)
        return by_step.take((place * B + row).where(mask, B * T).flatten())


@contextlib.contextmanager
def recorded_support(model):
    """A `SupportRecorder` of what generate of ``model`` samples from inside of the block.

    Args:
        model: a causal LM of transformers, or one under PEFT or DDP.

    Raises:
        TypeError: it has no generate of transformers.
        ValueError: inside of the block, from generate: beam search, whose rows change places, or ``generate_batch``, whose engine
            calls processors, in a captured graph on a GPU, without a word on which request a row belongs to.
    """
    owner = model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model
    owner = owner.get_base_model() if hasattr(owner, "get_base_model") else owner
    make, own = getattr(owner, "_get_logits_processor", None), vars(owner).get("_get_logits_processor")
    if make is None:
        raise TypeError(f"model must be a causal LM of transformers with a method generate, got {type(model).__name__}")
    recorder = SupportRecorder()

    def make_and_record(generation_config, input_ids_seq_length=None, *args, **kwargs):
        processors = make(generation_config, input_ids_seq_length, *args, **kwargs)
        if getattr(generation_config, "is_assistant", False):  # drafts of the model's own first layers, which it samples anew
            return processors
        if input_ids_seq_length is None:
            raise ValueError("recorded_support needs generate: generate_batch does not tell which request a row of scores is of")
        if (generation_config.num_beams or 1) > 1:
            raise ValueError(f"num_beams must be 1 with recorded_support, got {generation_config.num_beams}")
        recorder.begin(input_ids_seq_length, getattr(generation_config, "_eos_token_tensor", None))
        processors.append(recorder)
        return processors

    owner._get_logits_processor = make_and_record
    try:
        yield recorder
    finally:
        if own is None:
            del owner._get_logits_processor
        else:
            owner._get_logits_processor = own
