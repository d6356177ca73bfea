"""GRPO training on transformers' Trainer: `GRPOConfig`, `GRPOTrainer`."""

from .config import GRPOConfig
from .trainer import GRPOTrainer

__all__ = ["GRPOConfig", "GRPOTrainer"]
