"""The built-in demo: a tiny language model learns to add, from rewards alone, on any machine in a few minutes.

Everything is made here: a character tokenizer, a Llama of some 2 M parameters with random weights, and prompts such as `17+25=`
whose answers a program can check. A short supervised warm-up stops when the model is right now and then, because a policy that
never succeeds has nothing to compare. From there on the real `GRPOTrainer` takes over. The vocabulary is padded to that of a
small real model, so that the output layer weighs in this run as it does in real ones.
"""

import os
import random
import time

import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback, set_seed

from ..logprobs import linear_logprobs
from ..integrations.transformers import fuse_lm_head
from .config import GRPOConfig
from .rewards import exact_match
from .rollout import sample, tokenize
from .trainer import GRPOTrainer

DEFAULTS = dict(
    output_dir="runs/demo",
    seed=0,
    max_steps=160,
    learning_rate=5e-4,
    lr_scheduler_type="linear",
    warmup_steps=5,
    max_grad_norm=1.0,
    adam_beta2=0.95,
    per_device_train_batch_size=128,
    num_generations=8,
    steps_per_generation=1,
    num_iterations=2,
    max_completion_length=4,
    loss_type="dapo",
    epsilon=0.2,
    epsilon_high=0.28,
    beta=1e-3,
    logging_steps=4,
    save_strategy="steps",
    save_steps=80,
    report_to="none",
)
PADDED_VOCABULARY = 8192
HIGHEST = 99
HELD_OUT = 256
WARM_ENOUGH, TOO_WARM = 0.35, 0.55


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character of an addition, and an end."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *"0123456789+="])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def make_model(tokenizer) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=PADDED_VOCABULARY, hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def make_problems(seed, highest=HIGHEST, held_out=HELD_OUT):
    """(training rows, development rows, held-out rows): all sums a+b with a, b <= highest, no prompt in two of them."""
    rows = [{"prompt": f"{a:02d}+{b:02d}=", "answer": str(a + b)} for a in range(highest + 1) for b in range(highest + 1)]
    random.Random(seed).shuffle(rows)
    return rows[2 * held_out :], rows[held_out : 2 * held_out], rows[:held_out]


def greedy_answers(model, tokenizer, rows):
    config = GenerationConfig(
        max_new_tokens=4, do_sample=False, pad_token_id=tokenizer.pad_token_id, eos_token_id=[tokenizer.eos_token_id]
    )
    drawn = sample(model, tokenize(tokenizer, [row["prompt"] for row in rows]), config)
    return tokenizer.batch_decode(drawn.input_ids[:, -drawn.mask.shape[1] :], skip_special_tokens=True)


def greedy_accuracy(model, tokenizer, rows) -> float:
    answers = greedy_answers(model, tokenizer, rows)
    return sum(exact_match(answers, [row["answer"] for row in rows])) / len(rows)


def warm_up(model, tokenizer, train, development, seed, most_steps=1500):
    """Supervised steps on answers until the model is right now and then; returns (steps, development accuracy)."""
    dice = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0)
    model.train()
    before = None
    for step in range(1, most_steps + 1):
        rows = dice.sample(train, 128)
        prompts = torch.tensor(tokenize(tokenizer, [row["prompt"] for row in rows]))
        answers = tokenizer([row["answer"] + "<eos>" for row in rows], padding=True, return_tensors="pt")
        ids, mask = answers["input_ids"], answers["attention_mask"].bool()

        def answer_logps(hidden, head, ids=ids, mask=mask):
            return linear_logprobs(hidden[:, -ids.shape[1] - 1 : -1], head.weight, ids, mask=mask).logps

        logps = model(input_ids=torch.cat([prompts, ids], dim=1), use_cache=False, fused_lm_head=answer_logps)
        (-logps.sum() / mask.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, step / 50)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            accuracy = greedy_accuracy(model, tokenizer, development)
            if os.environ.get("DBG"): print(step, accuracy, flush=True)
            if accuracy > TOO_WARM and before is not None:
                model.load_state_dict(before[0])
                return step - 20, before[1]
            if accuracy >= WARM_ENOUGH:
                return step, accuracy
            before = {k: v.clone() for k, v in model.state_dict().items()}, accuracy
    return most_steps, accuracy


if __name__ == "__main__":
    import sys
    kw = dict(DEFAULTS); 
    for a in sys.argv[1:]:
        k,v=a.split("="); kw[k]=type(kw.get(k,0.0))(v)
    args=GRPOConfig(**kw, use_cpu=True)
    set_seed(args.seed)
    t0=time.time()
    tok=make_tokenizer(); train,dev,test=make_problems(args.seed); model=make_model(tok)
    print(sum(p.numel() for p in model.parameters()))
    fuse_lm_head(model)
    print(warm_up(model,tok,train,dev,args.seed), time.time()-t0)
    a0=greedy_accuracy(model,tok,test); print("test",a0)
    class CB(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **k):
            if "loss" in logs:
                acc=greedy_accuracy(model,tok,test) if state.global_step%20==0 else -1
                print(state.global_step, {k:round(float(logs[k]),3) for k in ("reward","entropy","kl","clip_ratio/region_mean","grad_norm") if k in logs}, f"acc {acc:.3f} {time.time()-t0:.1f}s",flush=True)
    model.__dict__.pop("forward")
    args.disable_tqdm=True
    tr=GRPOTrainer(model,exact_match,args,train,processing_class=tok,callbacks=[CB()])
    from transformers import PrinterCallback; tr.remove_callback(PrinterCallback)
    tr.train()
    print("accuracy",a0,greedy_accuracy(model,tok,test), time.time()-t0)
