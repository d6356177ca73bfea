"""A tiny model whose distributions have peaks, and the cuts of sampling that follow them."""

import torch

from grpo_kernels.integrations.transformers import lm_head
from support.tiny_trainer import tiny_model

EOS = [1, 3, 4, 5, 6]
CUTS = {
    "top_k": dict(top_k=4),
    "top_p": dict(top_p=0.8),
    "min_p": dict(min_p=0.1),
    "all of them, colder": dict(top_k=12, top_p=0.9, min_p=0.05, temperature=0.7),
    "one token": dict(top_k=1),
    "nothing": dict(),
}


def peaked_model(**options):
    """`tiny_model`, whose own distributions are next to uniform, with larger logits."""
    model = tiny_model(**options).eval()
    with torch.no_grad():
        lm_head(model).weight.mul_(15)
    return model
