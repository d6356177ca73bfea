"""A micro-batch as the trainer's own rollouts make them."""

import torch


def batch(B=6, P=4, T=5, seed=0, zero=(1, 4), empty=(), **more):
    """Prompts padded on the left, completions on the right; ``zero`` have advantage 0, of ``empty`` no token is kept."""
    g = torch.Generator().manual_seed(seed)
    prompts, lengths = torch.randint(1, P + 1, (B,), generator=g), torch.randint(1, T + 1, (B,), generator=g)
    attention = torch.cat([torch.arange(P) >= P - prompts[:, None], torch.arange(T) < lengths[:, None]], 1)
    ids = torch.randint(2, 14, (B, P + T), generator=g) * attention
    mask = attention[:, P:].clone()
    mask[list(empty)] = False
    advantages = torch.randn(B, generator=g)
    advantages[list(zero)] = 0.0
    old = (-2.5 + 0.3 * torch.randn(B, T, generator=g)) * mask
    return {"input_ids": ids, "attention_mask": attention.long(), "mask": mask, "advantages": advantages, "old_logps": old, **more}
