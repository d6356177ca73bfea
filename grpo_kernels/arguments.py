"""The public door: every argument of the public functions is checked here, once, and normalised for the rooms below.

Shapes, types, devices and combinations cost nothing to check. Values (token ids, mask, advantages, temperature) need a look
at the data: `value_flags` gathers every such check into one small tensor, so that a caller can read it, together with
its own counts, in a single host synchronisation.
"""

import math
import numbers
import sys
from dataclasses import dataclass
from itertools import pairwise

import torch

from .losses.config import GRPOLossConfig, QuantileOnly

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BACKENDS = ("auto", "torch", "cpu", "triton", "cuda")
_BAD_VALUES = (
    "mask must hold only 0 and 1, got other values at {} positions",
    "token ids must be in [0, V = {vocab}) where the mask is 1, got others at {} positions (completion_ids / token_ids)",
    "advantages must be finite where the mask is 1, got nan or inf at {} positions",
    "temperature must be > 0 and finite where the mask is 1, got others at {} positions",
    "cu_seqlens must rise from 0 to N without falling, got {} ends that do not",
)


@dataclass(frozen=True)
class LossArguments:
    """Checked arguments; under autocast hidden, weight, bias and lora are already in the autocast dtype."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    lora: tuple | None
    temperature: torch.Tensor | None
    advantages: torch.Tensor
    old_logps: torch.Tensor | None
    ref_logps: torch.Tensor | None
    importance_sampling_ratio: torch.Tensor | None
    sampling_logps: torch.Tensor | None
    num_items: object
    cu_seqlens: torch.Tensor | None


def check_loss_arguments(
    hidden, weight, completion_ids, advantages, mask, *, bias, old_logps, ref_logps, importance_sampling_ratio,
    sampling_logps, num_items, config, temperature, lora, vocab_parallel_group, cu_seqlens, kept_rows, workspace_bytes, backend,
    data_parallel_group,
) -> LossArguments:  # fmt: skip
    hidden, weight, bias, lora = check_head(hidden, weight, bias, lora, vocab_parallel_group)
    check_options(config, workspace_bytes, backend)
    tokens = _token_shape(hidden, cu_seqlens, dims=3)
    device = hidden.device
    loss = _check_per_token(
        tokens, device, completion_ids, advantages, mask, old_logps=old_logps, ref_logps=ref_logps,
        importance_sampling_ratio=importance_sampling_ratio, sampling_logps=sampling_logps, num_items=num_items,
        config=config, temperature=temperature, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    _check_kept_rows(kept_rows, mask)
    _check_data_parallel_group(data_parallel_group)
    return LossArguments(hidden=hidden, weight=weight, bias=bias, lora=lora, **loss)


def check_logits_arguments(
    logits, completion_ids, advantages, mask, *, config, kept_rows, data_parallel_group, workspace_bytes, backend, **tensors
):
    _tensor("logits", logits, None, FLOAT_DTYPES)
    check_options(config, workspace_bytes, backend)
    if logits.shape[-1:] == (0,):
        raise ValueError(f"logits must have a vocabulary of at least 1, got {list(logits.shape)}")
    tokens = _token_shape(logits, tensors["cu_seqlens"], dims=3, name="logits")
    loss = _check_per_token(tokens, logits.device, completion_ids, advantages, mask, config=config, **tensors)
    _check_kept_rows(kept_rows, mask)
    _check_data_parallel_group(data_parallel_group)
    return LossArguments(hidden=logits, weight=None, bias=None, lora=None, **loss)


def check_logprob_arguments(hidden, weight, token_ids, mask, bias, temperature, lora, vocab_parallel_group, workspace_bytes,
                            backend, config):  # fmt: skip
    hidden, weight, bias, lora = check_head(hidden, weight, bias, lora, vocab_parallel_group)
    check_options(config, workspace_bytes, backend)
    if hidden.dim() < 1:
        raise ValueError("hidden must be [..., D], got a 0-dim tensor")
    tokens, device = hidden.shape[:-1], hidden.device
    _tensor("token_ids", token_ids, device, (torch.int64,))
    _shape("token_ids", token_ids, tokens)
    if mask is not None:
        _check_mask(mask, tokens, device)
    if temperature is not None:
        _tensor("temperature", temperature, device, FLOAT_DTYPES)
        _shape("temperature", temperature, tokens)
    return hidden, weight, bias, lora


def check_head(hidden, weight, bias, lora, vocab_parallel_group):
    """Shapes and dtypes of the head; casts once under autocast."""
    _tensor("hidden", hidden, None, FLOAT_DTYPES)
    device = hidden.device
    _tensor("weight", weight, device, FLOAT_DTYPES)
    if hidden.dim() < 1:
        raise ValueError("hidden must be [..., D], got a 0-dim tensor")
    depth = hidden.shape[-1]
    fewest = 1 if vocab_parallel_group is None else 0  # a rank may hold none of the vocabulary's rows
    if weight.dim() != 2 or weight.shape[1] != depth or weight.shape[0] < fewest or depth < 1:
        raise ValueError(f"weight must be [V, D = {depth}] with V, D >= 1, got {list(weight.shape)}")
    vocab = weight.shape[0]
    if bias is not None:
        _tensor("bias", bias, device, FLOAT_DTYPES)
        _shape("bias", bias, (vocab,))
    check_group("vocab_parallel_group", vocab_parallel_group)
    if lora is not None:
        if not isinstance(lora, (tuple, list)) or len(lora) != 3:
            raise TypeError(f"lora must be a tuple (A [r, D], B [V, r], scale), got {kind(lora)}")
        a, b, scale = lora
        _tensor("lora A", a, device, FLOAT_DTYPES)
        _tensor("lora B", b, device, FLOAT_DTYPES)
        if a.dim() != 2 or a.shape[1] != depth:
            raise ValueError(f"lora A must be [r, D = {depth}], got {list(a.shape)}")
        _shape("lora B", b, (vocab, a.shape[0]))
        if not isinstance(scale, numbers.Real) or isinstance(scale, bool):
            raise TypeError(f"lora scale must be a number, got {kind(scale)}")
        if not math.isfinite(scale):
            raise ValueError(f"lora scale must be finite, got {scale}")
        lora = (a, b, float(scale))
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        if torch.float64 not in (hidden.dtype, weight.dtype):
            hidden, weight = hidden.to(dtype), weight.to(dtype)
            lora = None if lora is None else (lora[0].to(dtype), lora[1].to(dtype), lora[2])
    if weight.dtype != hidden.dtype:
        raise TypeError(f"weight must be {hidden.dtype} as hidden is, got {weight.dtype}")
    if lora is not None and (lora[0].dtype != hidden.dtype or lora[1].dtype != hidden.dtype):
        raise TypeError(f"lora A and B must be {hidden.dtype} as hidden is, got {lora[0].dtype} and {lora[1].dtype}")
    return hidden, weight, bias, lora


def check_options(config, workspace_bytes, backend):
    if not isinstance(config, GRPOLossConfig):
        raise TypeError(f"config must be a GRPOLossConfig, got {kind(config)}")
    if workspace_bytes is not None:
        if not isinstance(workspace_bytes, numbers.Integral) or isinstance(workspace_bytes, bool):
            raise TypeError(f"workspace_bytes must be an integer number of bytes, got {kind(workspace_bytes)}")
        if not 0 < workspace_bytes < 2**63:
            raise ValueError(f"workspace_bytes must be > 0 and < 2**63, got {workspace_bytes}")
    if not isinstance(backend, str):
        raise TypeError(f"backend must be a string, got {kind(backend)}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")


def _token_shape(hidden, cu_seqlens, dims, name="hidden"):
    """The shape of every per-token tensor: [B, T], or [N] in the packed layout."""
    last = "V" if name == "logits" else "D"
    if cu_seqlens is None:
        if hidden.dim() != dims:
            raise ValueError(f"{name} must be [B, T, {last}] (or [N, {last}] with cu_seqlens), got {list(hidden.shape)}")
        return hidden.shape[:2]
    _tensor("cu_seqlens", cu_seqlens, hidden.device, (torch.int32, torch.int64))
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"cu_seqlens must be [B + 1], got {list(cu_seqlens.shape)}")
    if hidden.dim() != 2:
        raise ValueError(f"{name} must be [N, {last}] with cu_seqlens, got {list(hidden.shape)}")
    return hidden.shape[:1]


def _check_per_token(tokens, device, completion_ids, advantages, mask, *, old_logps, ref_logps, importance_sampling_ratio,
                     sampling_logps, num_items, config, temperature, cu_seqlens):  # fmt: skip
    packed = cu_seqlens is not None
    sequences = cu_seqlens.numel() - 1 if packed else tokens[0]
    _tensor("completion_ids", completion_ids, device, (torch.int64,))
    _shape("completion_ids", completion_ids, tokens)
    _check_mask(mask, tokens, device)
    _tensor("advantages", advantages, device, FLOAT_DTYPES)
    _shape("advantages", advantages, (sequences,), tokens)
    for name, value in (("old_logps", old_logps), ("ref_logps", ref_logps), ("sampling_logps", sampling_logps),
                        ("temperature", temperature)):  # fmt: skip
        if value is not None:
            _tensor(name, value, device, FLOAT_DTYPES)
            _shape(name, value, tokens)
    if importance_sampling_ratio is not None:
        _tensor("importance_sampling_ratio", importance_sampling_ratio, device, FLOAT_DTYPES)
        _shape("importance_sampling_ratio", importance_sampling_ratio, (sequences, 1), tokens)
    if config.beta != 0 and ref_logps is None:
        raise ValueError(f"ref_logps must be given when beta != 0 (beta = {config.beta}), got None")
    _check_num_items(num_items, config, device)
    return dict(
        temperature=temperature, advantages=advantages, old_logps=old_logps, ref_logps=ref_logps,
        importance_sampling_ratio=importance_sampling_ratio, sampling_logps=sampling_logps, num_items=num_items,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip


def _check_num_items(num_items, config, device):
    if num_items is None:
        return
    if isinstance(num_items, torch.Tensor):
        if num_items.dim() != 0:
            raise ValueError(f"num_items must be a number or a 0-dim tensor, got shape {list(num_items.shape)}")
        if num_items.dtype == torch.bool or num_items.is_complex():
            raise TypeError(f"num_items must be a real number, got {num_items.dtype}")
    elif not isinstance(num_items, numbers.Real) or isinstance(num_items, bool):
        raise TypeError(f"num_items must be a number > 0 or a 0-dim tensor, got {kind(num_items)}")
    elif config.loss_type in ("dapo", "cispo", "vespo") and not 0 < num_items <= sys.float_info.max:
        raise ValueError(f"num_items must be > 0 and finite, got {num_items}")


def _check_kept_rows(kept_rows, mask):
    if kept_rows is None:
        return
    _tensor("kept_rows", kept_rows, mask.device, (torch.int64,))
    if kept_rows.dim() != 1 or kept_rows.numel() > mask.numel():
        raise ValueError(f"kept_rows must be 1-D with at most {mask.numel()} indices, got {list(kept_rows.shape)}")


def check_group(name, group):
    if group is not None and not (torch.distributed.is_available() and isinstance(group, torch.distributed.ProcessGroup)):
        raise TypeError(f"{name} must be a torch.distributed group or None, got {kind(group)}")


def _check_data_parallel_group(group):
    check_group("data_parallel_group", group.group if isinstance(group, QuantileOnly) else group)


def _check_mask(mask, tokens, device):
    if not isinstance(mask, torch.Tensor) or mask.is_complex():
        raise TypeError(f"mask must be a bool or 0/1 tensor, got {kind(mask)}")
    _tensor("mask", mask, device, (mask.dtype,))
    _shape("mask", mask, tokens)


def _tensor(name, value, device, dtypes):
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {kind(value)}")
    if value.dtype not in dtypes:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} must be {wanted}, got {value.dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")
    if device is None and value.device.type == "meta":
        raise ValueError(f"{name} must be on a device that holds data, got a tensor on meta")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on {device} as hidden is, got {value.device}")


def _shape(name, value, *allowed):
    if all(tuple(value.shape) != tuple(shape) for shape in allowed):
        wanted = " or ".join(str(list(shape)) for shape in allowed)
        raise ValueError(f"{name} must have shape {wanted}, got {list(value.shape)}")


def kind(value):
    """What came, for an error message."""
    return str(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__


def host_may_wait(like) -> bool:
    """False under torch.compile and while a CUDA graph is captured: nothing may synchronise with the host then."""
    if torch.compiler.is_compiling():
        return False
    return not (getattr(like, "is_cuda", False) and torch.cuda.is_current_stream_capturing())


def value_flags(mask, token_ids, vocab, advantages=None, temperature=None, layout=None) -> torch.Tensor:
    """[5] int64 counts of bad values, in the order of the messages of `raise_bad_values`; no synchronisation."""
    kept = mask.bool()
    none = kept.new_zeros((), dtype=torch.int64)
    bad_mask = none if mask.dtype == torch.bool else ((mask != 0) & (mask != 1)).sum()
    bad_ids = (kept & ((token_ids < 0) | (token_ids >= vocab))).sum()
    bad_advantages, bad_temperature = none, none
    if advantages is not None:
        kept_2d = kept if layout is None else layout.pad(kept)
        advantages = advantages if layout is None else layout.pad_advantages(advantages)
        row_kept = kept_2d if advantages.shape == kept_2d.shape else kept_2d.any(1)
        bad_advantages = (row_kept & ~advantages.isfinite()).sum()
    if temperature is not None:
        bad_temperature = (kept & ~((temperature > 0) & temperature.isfinite())).sum()
    bad_ends = none if layout is None or layout.bad_ends is None else layout.bad_ends
    return torch.stack([bad_mask, bad_ids, bad_advantages, bad_temperature, bad_ends])


def raise_bad_values(counts, vocab):
    for count, message in zip(counts, _BAD_VALUES, strict=True):
        if count:
            raise ValueError(message.format(count, vocab=vocab))


def check_values(mask, token_ids, vocab, advantages=None, temperature=None, cu_seqlens=None):
    layout = PackedLayout.of(cu_seqlens, mask)
    raise_bad_values(value_flags(mask, token_ids, vocab, advantages, temperature, layout).tolist(), vocab)


class PackedLayout:
    """Moves per-token tensors between the packed layout [N] and [B, T]; the identity for tensors that are padded already.

    The mathematics is written for [B, T] only: a packed batch's per-token vectors are small beside its logits, and padding
    them keeps every sum per sequence in one deterministic form.
    """

    def __init__(self, cu_seqlens=None, tokens=0, wait=True):
        self.position, self.bad_ends = None, None
        if cu_seqlens is None:
            return
        starts = cu_seqlens.long()
        index = torch.arange(tokens, device=cu_seqlens.device)
        sequence = torch.bucketize(index, starts[1:], right=True)
        if wait:
            self.sequences, self.length = self._checked_lengths(cu_seqlens.tolist(), tokens)
            self.position = sequence * self.length + index - starts[sequence]
            return
        # nothing may synchronise: the longest a sequence can be, and wrong ends are only counted
        self.sequences, self.length = cu_seqlens.shape[0] - 1, tokens
        position = sequence * self.length + index - starts[sequence]
        self.position = position.clamp(0, max(self.sequences * self.length - 1, 0))
        self.bad_ends = (starts.diff() < 0).sum() + (starts[0] != 0) + (starts[-1] != tokens)

    @staticmethod
    def _checked_lengths(ends, tokens):
        lengths = [end - start for start, end in pairwise(ends)]
        if ends[0] != 0 or ends[-1] != tokens or min(lengths, default=0) < 0:
            shown = f"{ends[:8]}{'...' * (len(ends) > 8)}"
            raise ValueError(f"cu_seqlens must rise from 0 to N = {tokens} without falling, got {shown}")
        return len(lengths), max(lengths, default=0)

    @staticmethod
    def of(cu_seqlens, mask, wait=True):
        """``wait``: the host may read cu_seqlens back."""
        return PackedLayout(cu_seqlens, mask.shape[0] if cu_seqlens is not None else 0, wait)

    def pad(self, x):
        """[N] -> [B, T], zeros beyond a sequence's end; differentiable."""
        if self.position is None or x is None:
            return x
        out = x.new_zeros(self.sequences * self.length).index_put((self.position,), x)
        return out.view(self.sequences, self.length)

    def pad_advantages(self, x):
        """[B] stays, [N] -> [B, T]."""
        return x if self.position is None or x.shape[0] == self.sequences else self.pad(x)

    def pad_ratio(self, x):
        """[B, 1] stays, [N] -> [B, T]."""
        return x if self.position is None or x is None or x.dim() == 2 else self.pad(x)

    def unpad(self, x):
        """[B, T] -> [N]."""
        return x if self.position is None else x.reshape(-1)[self.position]
