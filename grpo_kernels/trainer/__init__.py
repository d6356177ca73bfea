"""GRPO training on transformers' Trainer: `GRPOConfig`, `GRPOTrainer`."""

from ..extras import import_peft, needs

with needs("train", __name__):
    import_peft()
    from .config import GRPOConfig
    from .trainer import GRPOTrainer

__all__ = ["GRPOConfig", "GRPOTrainer"]
