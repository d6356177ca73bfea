"""Log-probs out of full logits in float64."""

import torch

from grpo_kernels import GRPOLossConfig
from grpo_kernels.reference import hidden_to_logits

TRANSFORMS = {
    "plain": GRPOLossConfig(), "scaled": GRPOLossConfig(logit_scale=-1.3, temperature=0.7), "capped": GRPOLossConfig(softcap=4.0),
}  # fmt: skip


def full_log_probs(p, dtype=None, temperature=None):
    """(log p [B, T, V], which positions are kept, leaves)"""
    (hidden, weight, _, _, mask), keywords, leaves = p.arguments(dtype)
    kept, c = mask.bool(), p.config
    z = hidden_to_logits(hidden.where(kept.unsqueeze(-1), 0.0), weight, keywords["bias"], keywords["lora"])
    z = c.logit_scale * z.to(torch.promote_types(z.dtype, torch.float32))
    z = z if c.softcap is None else c.softcap * torch.tanh(z / c.softcap)
    return (z / (c.temperature if temperature is None else temperature.unsqueeze(-1))).log_softmax(-1), kept, leaves
