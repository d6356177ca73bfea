"""On-policy distillation in one file: a student samples, and learns a larger model's distributions at its own tokens.

    python examples/distill.py                                  tiny models that add numbers, half a minute on a laptop
    python examples/distill.py --student PATH --teacher PATH    two causal LMs of transformers, one vocabulary; bring your prompts

The loss is the reverse KL over the whole vocabulary, from the last hidden states of both. The logits of neither are made.
"""

import argparse
import functools
import random

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed

from grpo_kernels import fused_linear_distillation_loss
from grpo_kernels.integrations.transformers import fuse_lm_head
from grpo_kernels.trainer.demo import make_tokenizer

SUMS = [(f"{a}+{b}=", str(a + b)) for a in range(10, 30) for b in range(1, 10)]


def tiny_model(tokenizer, width):
    shape = dict(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=tokenizer.eos_token_id, **shape))


def taught(model, tokenizer, steps=300):
    """The model after supervised steps on the sums."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        ids = tokenizer([q + a + tokenizer.eos_token for q, a in random.sample(SUMS, 64)], return_tensors="pt")["input_ids"]
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def complete(model, tokenizer, prompts, length, **sampling):
    """(ids [B, P + C], attention [B, P + C], mask [B, C]): completions up to and with the end token."""
    given = tokenizer(prompts, padding=True, padding_side="left", return_token_type_ids=False, return_tensors="pt").to(model.device)
    ids = model.generate(**given, max_new_tokens=length, pad_token_id=tokenizer.pad_token_id, **sampling)
    ends = ids[:, given["input_ids"].shape[1] :] == tokenizer.eos_token_id
    mask = ends.int().cumsum(1) - ends.int() == 0
    return ids, torch.cat([given["attention_mask"], mask.long()], 1), mask


def accuracy(model, tokenizer, length):
    ids, _, mask = complete(model, tokenizer, [q for q, _ in SUMS], length, do_sample=False)
    texts = tokenizer.batch_decode(ids[:, -mask.shape[1] :], skip_special_tokens=True)
    return sum(text.strip() == answer for text, (_, answer) in zip(texts, SUMS, strict=True)) / len(SUMS)


def loss_of(theirs, other, mask, hidden, head):
    """Called by the student where it would have made its logits. Position t predicts token t + 1."""
    own, theirs = (h[:, -mask.shape[1] - 1 : -1] for h in (hidden, theirs))
    of_student = dict(bias=head.bias, lora=head.lora, logit_scale=head.logit_scale, softcap=head.softcap)
    of_teacher = dict(teacher_bias=other.bias, teacher_logit_scale=other.logit_scale, teacher_softcap=other.softcap)
    given = dict(mask=mask, num_items=mask.sum(), **of_student, **of_teacher)
    return fused_linear_distillation_loss(own, head.weight, theirs, other.weight, **given)  # 2. loss and gradients


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", help="path of a causal LM; a tiny random one without")
    parser.add_argument("--teacher", help="path of a larger one of the same vocabulary; a tiny one that can add without")
    parser.add_argument("--steps", type=int, default=200, help="at least 1")
    parser.add_argument("--length", type=int, default=3, help="tokens of a completion at most")
    parser.add_argument("--lr", type=float, default=5e-3)
    args = parser.parse_args()

    set_seed(0)
    load = AutoModelForCausalLM.from_pretrained  # .to("cuda") where there is one
    tokenizer = AutoTokenizer.from_pretrained(args.student) if args.student else make_tokenizer()
    teacher = load(args.teacher) if args.teacher else taught(tiny_model(tokenizer, 64), tokenizer)
    student = fuse_lm_head(load(args.student) if args.student else tiny_model(tokenizer, 48))
    fuse_lm_head(teacher.eval().requires_grad_(False))  # 1. model(..., fused_lm_head=...) from here on
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, weight_decay=0.0)
    before, best = (accuracy(model, tokenizer, args.length) for model in (student, teacher))

    for step in range(args.steps):
        some = [prompt for prompt, _ in random.sample(SUMS, 64)]
        ids, attention, mask = complete(student, tokenizer, some, args.length, do_sample=True, top_k=0)
        call = dict(input_ids=ids, attention_mask=attention, use_cache=False)
        with torch.no_grad():
            beside = teacher(**call, fused_lm_head=lambda hidden, head: (hidden, head))
        out = student(**call, fused_lm_head=functools.partial(loss_of, *beside, mask))
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == args.steps - 1:
            print(f"step {step:3d}  reverse KL {out.loss.item():.4f}  entropy {out.entropy[mask].mean().item():.3f}")
    print(f"accuracy {before:.2f} -> {accuracy(student, tokenizer, args.length):.2f}, the teacher's is {best:.2f}")


if __name__ == "__main__":
    main()
