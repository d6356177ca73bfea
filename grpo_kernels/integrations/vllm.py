"""vLLM's log-probs by the row kernels of the loss.

    llm = LLM(model, logprobs_mode="raw_logits", ...)
    use_row_kernels(sampler, temperature=1.0)               the `vllm.v1.sample.sampler.Sampler` of a worker's model runner

vLLM's own are a log_softmax over all columns at once. Here a row's statistics are those of fixed tiles of columns, and the sampled
token's log-prob is taken as training takes it. From the same logits it then has the same bits as `linear_logprobs`.

This replaces the sampler's log-probs and not the model's products: vLLM makes hidden states and logits by kernels of its own, and
rounds logits to the model's dtype. A softcap or a logit scale vLLM applies itself before the sampler sees a logit: log-probs of
such heads are equal up to rounding.

Written for the sampler of the V1 engine, vLLM 0.10.0 and newer: `Sampler.gather_logprobs(logprobs, num_logprobs, token_ids)`. It
has never run inside of vLLM; the tests run it in a stand-in of `Sampler` with the same methods. The sampler of vLLM's newer model
runner (`vllm.v1.worker.gpu.sample`) has no such method and is refused.
"""

import functools
import inspect

import torch

from ..checks import check_options
from ..losses.config import GRPOLossConfig, LogitTransform
from .sampling import score_rows


def use_row_kernels(sampler, *, temperature=1.0, backend="auto"):
    """Make a vLLM `Sampler` report the log-probs that training computes from the same logits.

    For the sampled token that is `linear_logprobs`'s; for the other tokens of ``SamplingParams.logprobs`` it is their logit over
    the temperature minus the row's lse. Token ids and ranks stay vLLM's. `del sampler.gather_logprobs` takes it back.

    Args:
        sampler: made with ``logprobs_mode="raw_logits"``; it is given raw logits, which no penalty or truncation has moved.
        temperature: that of training and of every request.
        backend: as in `linear_logprobs`.

    Raises:
        TypeError: it has no ``gather_logprobs(logprobs, num_logprobs, token_ids)``.
        ValueError: another ``logprobs_mode``; an option is not legal.
    """
    check_options(GRPOLossConfig(temperature=temperature), None, backend)
    gather = getattr(sampler, "gather_logprobs", None)
    if gather is None or list(inspect.signature(gather).parameters)[:3] != ["logprobs", "num_logprobs", "token_ids"]:
        raise TypeError(
            f"sampler must be vllm.v1.sample.sampler.Sampler, with gather_logprobs(logprobs, num_logprobs, token_ids), "
            f"got {type(sampler).__name__}"
        )
    if sampler.logprobs_mode != "raw_logits":
        raise ValueError(f"logprobs_mode must be 'raw_logits', so that its log-probs are made here, got {sampler.logprobs_mode!r}")
    sampler.gather_logprobs = functools.partial(_gathered, gather, LogitTransform(temperature=float(temperature)), backend)


@torch.no_grad()
def _gathered(gather, transform, backend, logprobs, num_logprobs, token_ids):
    """vLLM's `LogprobsTensors` with its values replaced; ``logprobs`` are raw logits [R, V]."""
    found = gather(logprobs, num_logprobs, token_ids)
    scored = score_rows(logprobs, token_ids, transform, backend=backend)
    others = found.logprobs / transform.temperature - scored.lse.unsqueeze(1)
    # the sampled token is the first, and may be among the likeliest once more: vLLM keeps the last entry of a token
    sampled = found.logprob_token_ids == token_ids.unsqueeze(1)
    return found._replace(logprobs=torch.where(sampled, scored.logps.unsqueeze(1), others))
