"""GRPO in one file on plain PyTorch: sample groups, reward them, normalise, and take fused steps with clipping and KL.

    python examples/custom_loop.py                    a tiny random model learns to write even digits, half a minute on a laptop
    python examples/custom_loop.py --model PATH       any causal LM of transformers (bring your own prompts and reward)

The three calls of grpo_kernels are marked; everything else is an ordinary loop. No logits of the training batch are ever made.
"""

import argparse
import copy
import functools

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from grpo_kernels import GRPOLossConfig, fused_linear_grpo_loss, group_advantages
from grpo_kernels.integrations.transformers import fuse_lm_head


def tiny_model():
    """Vocabulary: 0 padding, 1 end, 2..11 the digits."""
    config = LlamaConfig(vocab_size=12, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                         pad_token_id=0, bos_token_id=None, eos_token_id=1)  # fmt: skip
    return LlamaForCausalLM(config)


def even_digits(completions, mask):
    """[B] share of the written tokens that are even digits."""
    even = (completions >= 2) & (completions % 2 == 0) & mask
    return even.sum(1) / mask.sum(1)


def rollout(model, prompts, length):
    """(ids [B, P + C], mask [B, C]): sampled completions, up to and with the end token."""
    with torch.no_grad():
        ids = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=length, do_sample=True, top_k=0)
    ended = (ids[:, prompts.shape[1] :] == model.config.eos_token_id).int().cumsum(1)
    completions = ids[:, prompts.shape[1] :]
    return ids, (ended == 0) | ((ended == 1) & (completions == model.config.eos_token_id))


def logps_of(model, ids, mask):
    """[B, C] log-probs of the completion by the numerics of the loss, without gradient."""
    labels = ids.clone()
    labels[:, : -mask.shape[1]] = -100
    labels[:, -mask.shape[1] :][~mask] = -100
    with torch.no_grad():
        return model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs[:, -mask.shape[1] :]


def loss_of(batch, config, hidden, head):
    """Called by the model where it would have made its logits."""
    completions, advantages, mask, old, ref = batch
    hidden = hidden[:, -mask.shape[1] - 1 : -1]  # position t predicts token t + 1
    given = dict(bias=head.bias, lora=head.lora, old_logps=old, ref_logps=ref, config=config)
    return fused_linear_grpo_loss(hidden, head.weight, completions, advantages, mask, **given)  # 3. loss and gradients


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="path of a causal LM; a tiny random one without")
    parser.add_argument("--steps", type=int, default=60, help="at least 1")
    parser.add_argument("--group", type=int, default=16, help="completions of a prompt")
    parser.add_argument("--length", type=int, default=12)
    parser.add_argument("--beta", type=float, default=0.01)
    parser.add_argument("--lr", type=float, default=3e-3)
    args = parser.parse_args()

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(args.model) if args.model else tiny_model()
    fuse_lm_head(model)  # 1. model(..., fused_lm_head=...) from here on
    reference = fuse_lm_head(copy.deepcopy(model).eval().requires_grad_(False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    config = GRPOLossConfig(loss_type="dapo", epsilon=0.2, epsilon_high=0.28, beta=args.beta)

    for step in range(args.steps):
        prompts = torch.randint(2, model.config.vocab_size, (4, 3)).repeat_interleave(args.group, 0)
        ids, mask = rollout(model, prompts, args.length)
        completions = ids[:, prompts.shape[1] :]
        rewards = even_digits(completions, mask)
        groups = torch.arange(4).repeat_interleave(args.group)
        advantages = group_advantages(rewards, groups)  # 2. (r - mean) / std in each group
        old, ref = logps_of(model, ids, mask), logps_of(reference, ids, mask)

        batch = (completions, advantages, mask, old, ref)
        for _ in range(2):  # two steps on the same samples: the ratio and its clipping come into play
            out = model(input_ids=ids, fused_lm_head=functools.partial(loss_of, batch, config))
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if step % 10 == 0 or step == args.steps - 1:
            print(f"step {step:3d}  reward {rewards.mean():.3f}  kl {out.metrics['kl']:.4f}  entropy {out.metrics['entropy']:.3f}")
    return rewards.mean().item()


if __name__ == "__main__":
    main()
