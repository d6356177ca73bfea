"""Checks of arguments. Each error names the argument, what was wanted and what came.

Shapes, types, devices and combinations cost nothing to check. Values (token ids, mask, advantages, temperature) need a look at
the data: every such check is a count, and the counts are read together with those of the rows in one host synchronisation.
"""

import math
import numbers
import sys
from typing import Literal, get_args

import torch
from torch.autograd import forward_ad

from .losses.config import DIVIDED_BY_ITEMS, GRPOLossConfig

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
Reduction = Literal["loss_type", "none"]
Backend = Literal["auto", "torch", "cpu", "triton", "cuda"]
BACKENDS = get_args(Backend)
_BAD_VALUES = (
    "mask must hold only 0 and 1, got other values at {} positions",
    "token ids must be in [0, V = {vocab}) where the mask is 1, got others at {} positions (completion_ids / token_ids); "
    "ids of -100 need a mask of 0: mask=(ids != -100)",
    "advantages must be finite where the mask is 1, got nan or inf at {} positions",
    "temperature must be > 0 and finite where the mask is 1, got others at {} positions",
    "cu_seqlens must rise from 0 to N without falling, got {} ends that do not",
)
_BAD_IDS_AT = {
    "ids": "ids must be in [0, V = {vocab}), or -1 for none, where the mask is 1, got others at {} positions",
    "teacher_ids": "teacher_ids must be in [0, V = {vocab}), or -1 for none, and none twice in a position, where the mask is 1, "
    "got others at {} positions",
}


def refuse_transforms(tensors):
    """``tensors``: name -> a tensor, a tuple of them, or anything else."""
    if torch.compiler.is_compiling():
        return
    for name, given in tensors.items():
        for x in given if isinstance(given, (tuple, list)) else (given,):
            if isinstance(x, torch.Tensor) and (torch._C._functorch.is_functorch_wrapped_tensor(x) or _has_tangent(x)):
                raise TypeError(
                    f"{name} must be a plain tensor, got one inside of a torch.func transform (vmap, grad, jvp) or with a tangent: "
                    "the fused ops have no rules for these; reference.grpo_loss takes them"
                )


def _has_tangent(x):
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


def check_head(hidden, weight, bias, lora, vocab_parallel_group):
    """Shapes and dtypes of the head; casts once under autocast."""
    check_tensor("hidden", hidden, None, FLOAT_DTYPES)
    device = hidden.device
    check_tensor("weight", weight, device, FLOAT_DTYPES)
    if hidden.dim() < 1:
        raise ValueError("hidden must be [..., D], got a 0-dim tensor")
    depth = hidden.shape[-1]
    fewest = 1 if vocab_parallel_group is None else 0  # a rank may hold none of the vocabulary's rows
    if weight.dim() != 2 or weight.shape[1] != depth or weight.shape[0] < fewest or depth < 1:
        raise ValueError(f"weight must be [V, D = {depth}] with V, D >= 1, got {list(weight.shape)}")
    vocab = weight.shape[0]
    if bias is not None:
        check_tensor("bias", bias, device, FLOAT_DTYPES)
        check_shape("bias", bias, (vocab,))
    check_group("vocab_parallel_group", vocab_parallel_group)
    if lora is not None:
        if not isinstance(lora, (tuple, list)) or len(lora) != 3:
            raise TypeError(f"lora must be a tuple (A [r, D], B [V, r], scale), got {kind(lora)}")
        a, b, scale = lora
        check_tensor("lora A", a, device, FLOAT_DTYPES)
        check_tensor("lora B", b, device, FLOAT_DTYPES)
        if a.dim() != 2 or a.shape[1] != depth:
            raise ValueError(f"lora A must be [r, D = {depth}], got {list(a.shape)}")
        check_shape("lora B", b, (vocab, a.shape[0]))
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


def check_num_items(num_items, config):
    if num_items is None:
        return
    if isinstance(num_items, torch.Tensor):
        if num_items.dim() != 0:
            raise ValueError(f"num_items must be a number or a 0-dim tensor, got shape {list(num_items.shape)}")
        if num_items.dtype == torch.bool or num_items.is_complex():
            raise TypeError(f"num_items must be a real number, got {num_items.dtype}")
    elif not isinstance(num_items, numbers.Real) or isinstance(num_items, bool):
        raise TypeError(f"num_items must be a number > 0 or a 0-dim tensor, got {kind(num_items)}")
    elif config.aggregation in DIVIDED_BY_ITEMS and not 0 < num_items <= sys.float_info.max:
        raise ValueError(f"num_items must be > 0 and finite, got {num_items}")


def check_group(name, group):
    if group is not None and not (torch.distributed.is_available() and isinstance(group, torch.distributed.ProcessGroup)):
        raise TypeError(f"{name} must be a torch.distributed group or None, got {kind(group)}")


def check_mask(mask, tokens, device):
    if not isinstance(mask, torch.Tensor) or mask.is_complex():
        raise TypeError(f"mask must be a bool or 0/1 tensor, got {kind(mask)}")
    check_tensor("mask", mask, device, (mask.dtype,))
    check_shape("mask", mask, tokens)


def check_tensor(name, value, device, dtypes):
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


def check_shape(name, value, *allowed, hint=""):
    if all(tuple(value.shape) != tuple(shape) for shape in allowed):
        wanted = " or ".join(str(list(shape)) for shape in allowed)
        raise ValueError(f"{name} must have shape {wanted}, got {list(value.shape)}{hint}")


def kind(value):
    """What came, for an error message."""
    return str(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__


def value_flags(args, vocab, loss=None) -> torch.Tensor:
    """[5] int64 counts of bad values, in the order of the messages of `raise_bad_values`; no synchronisation."""
    mask, ids, temperature = args.mask, args.completion_ids, args.temperature
    kept = mask.bool()
    none = kept.new_zeros((), dtype=torch.int64)
    bad_mask = none if mask.dtype == torch.bool else ((mask != 0) & (mask != 1)).sum()
    bad_ids = (kept & ((ids < 0) | (ids >= vocab))).sum()
    bad_advantages, bad_temperature, bad_ends = none, none, none
    if loss is not None:
        rows = loss.inputs.mask > 0
        rows = rows if loss.advantages.shape == rows.shape else rows.any(1)
        bad_advantages = (rows & ~loss.advantages.isfinite()).sum()
        bad_ends = none if loss.layout.bad_ends is None else loss.layout.bad_ends
    if temperature is not None:
        bad_temperature = (kept & ~((temperature > 0) & temperature.isfinite())).sum()
    return torch.stack([bad_mask, bad_ids, bad_advantages, bad_temperature, bad_ends])


def raise_bad_values(counts, vocab, ids_name=None):
    """``ids_name``: of `TokenArguments`."""
    for i, (count, message) in enumerate(zip(counts, _BAD_VALUES, strict=True)):
        if count:
            message = _BAD_IDS_AT.get(ids_name, message) if i == 1 else message
            raise ValueError(message.format(count, vocab=vocab))
