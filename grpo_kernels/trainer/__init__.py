"""GRPO training on transformers' Trainer: `GRPOConfig`, `GRPOTrainer`."""

from ..extras import needs

with needs("train", __name__):
    from .config import GRPOConfig
    from .trainer import GRPOTrainer

__all__ = ["GRPOConfig", "GRPOTrainer"]
