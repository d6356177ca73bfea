"""A fused loss inside a causal LM's own forward.

A head that is read from outside (`model.lm_head.weight`) is invisible to DDP and sharded away by FSDP. So the model itself
learns one keyword: `model(..., fused_lm_head=fn)` runs the body, then calls `fn(hidden, head)` where the logits would have
been made, and returns what `fn` returns. Every other call, `generate` included, is unchanged.
"""

import functools
import types
from typing import NamedTuple

import torch


class LMHead(NamedTuple):
    """What turns last hidden states into logits: `softcap * tanh(logit_scale * (h W^T + bias) / softcap)`."""

    weight: torch.Tensor  # [V, D]
    bias: torch.Tensor | None  # [V]
    lora: tuple[torch.Tensor, torch.Tensor, float] | None  # A [r, D], B [V, r], scale
    logit_scale: float
    softcap: float | None


def fuse_lm_head(model, verify=True):
    """Teach this instance of a causal LM the keyword ``fused_lm_head``.

    ``model(..., fused_lm_head=fn)`` equals ``fn(model.base_model(...).last_hidden_state, lm_head(model))``.

    Args:
        model: a `transformers` causal LM, before any wrapper (DDP, FSDP, accelerate); under PEFT its base model.
        verify: run four tokens both ways and compare the logits, so that an architecture which treats its logits in a way
            unknown here is refused and not trained wrongly.

    Returns:
        The same model.

    Raises:
        NotImplementedError: the logits of this architecture are not what its head and configuration say.
    """
    original = model.forward.__func__
    if getattr(original, "fuses_lm_head", False):
        return model

    @functools.wraps(original)
    def forward(self, *args, fused_lm_head=None, **kwargs):
        if fused_lm_head is None:
            return original(self, *args, **kwargs)
        given = {name: value for name, value in kwargs.items() if value is not None}
        return fused_lm_head(self.base_model(*args, **given)[0], lm_head(self))

    forward.fuses_lm_head = True
    model.forward = types.MethodType(forward, model)
    if verify:
        _verify(model)
    return model


def lm_head(model) -> LMHead:
    """The output layer of a causal LM as numbers: adapters on it apart, factors from the model's configuration."""
    layer = model.get_output_embeddings()
    if hasattr(layer, "modules_to_save"):  # PEFT: a trained copy beside the original
        layer = layer.original_module if layer.disable_adapters else layer.modules_to_save[layer.active_adapters[0]]
    weight, bias, lora = layer.weight, getattr(layer, "bias", None), None
    if hasattr(layer, "lora_A") and not layer.disable_adapters and not layer.merged:
        (name,) = layer.active_adapters
        if isinstance(layer.lora_dropout[name], torch.nn.Dropout):
            raise NotImplementedError("lora_dropout on the output layer must be 0: its logits are never made")
        lora = (layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])
    config = model.config.get_text_config()
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    return LMHead(weight, bias, lora, float(scale), getattr(config, "final_logit_softcapping", None))


def _verify(model):
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            ids = torch.arange(4, device=model.device).unsqueeze(0)
            theirs = model(input_ids=ids, use_cache=False).logits.float()
            ours = model(input_ids=ids, use_cache=False, fused_lm_head=_full_logits).float()
    finally:
        for module, mode in modes:
            module.training = mode
    # bf16 logits differ by some 1e-2 of their norm at most; a forgotten factor by its distance from 1
    if ours.shape != theirs.shape or (ours - theirs).norm() > 0.02 * theirs.norm():
        raise NotImplementedError(
            f"{type(model).__name__} does not make its logits from last hidden states, output layer, logit_scale, "
            "logits_scaling and final_logit_softcapping alone; its fused loss would be that of another model"
        )


def _full_logits(hidden, head):
    z = hidden @ head.weight.T
    if head.lora is not None:
        a, b, scale = head.lora
        z = z + scale * (hidden @ a.T @ b.T)
    z = head.logit_scale * (z if head.bias is None else z + head.bias)
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
