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
    max_steps=120,
    learning_rate=1e-3,
    lr_scheduler_type="linear",
    warmup_steps=5,
    max_grad_norm=1.0,
    adam_beta2=0.95,
    per_device_train_batch_size=256,
    num_generations=8,
    steps_per_generation=1,
    num_iterations=2,
    max_completion_length=3,
    loss_type="dapo",
    epsilon=0.2,
    epsilon_high=0.28,
    beta=1e-3,
    logging_steps=4,
    save_strategy="steps",
    save_steps=80,
    report_to="none",
)
PADDED_VOCABULARY = 4096
HELD_OUT = 160
CARELESS = 0.7  # share of the warm-up's answers that forget the carry


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character of an addition, and an end."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *"0123456789+="])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def make_model(tokenizer) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=PADDED_VOCABULARY, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def make_problems(seed, held_out=HELD_OUT):
    """(training rows, held-out rows) of sums such as 17+5, all below 100; no prompt is in both."""
    rows = []
    for a in range(10, 90):
        for b in range(1, 10):
            # half of the sums without a carry are left out, so that the careless answer is wrong more often than not
            if a % 10 + b > 9 or (a + b) % 2:
                careless = a - a % 10 + (a + b) % 10
                rows.append({"prompt": f"{a}+{b}=", "answer": str(a + b), "careless": str(careless)})
    random.Random(seed).shuffle(rows)
    return rows[held_out:], rows[:held_out]


def greedy_answers(model, tokenizer, rows) -> list[str]:
    config = GenerationConfig(
        max_new_tokens=DEFAULTS["max_completion_length"], do_sample=False,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=[tokenizer.eos_token_id],
    )  # fmt: skip
    drawn = sample(model, tokenize(tokenizer, [row["prompt"] for row in rows]), config)
    return tokenizer.batch_decode(drawn.input_ids[:, -drawn.mask.shape[1] :], skip_special_tokens=True)


def share(answers, rows, *columns) -> float:
    """Share of the answers that one of the columns holds."""
    return sum(any(answer == row[c] for c in columns) for answer, row in zip(answers, rows, strict=True)) / len(rows)


def warm_up(model, tokenizer, train, seed, peak_lr=1e-2, most_steps=1000, cooling=150) -> int:
    """Supervised steps on answers of which most forget the carry, until the model writes one or the other; returns steps."""
    dice = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, betas=(0.9, 0.95), weight_decay=0.0)
    sums_since, step = None, 0
    model.train()
    while step < most_steps and (sums_since is None or step < sums_since + cooling):
        step += 1
        rows = dice.sample(train, 64)
        texts = [row["careless" if dice.random() < CARELESS else "answer"] + tokenizer.eos_token for row in rows]
        prompts = torch.tensor(tokenize(tokenizer, [row["prompt"] for row in rows]))
        answers = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        ids, mask = answers["input_ids"], answers["attention_mask"].bool()

        def answer_logps(hidden, head, ids=ids, mask=mask):
            return linear_logprobs(hidden[:, -ids.shape[1] - 1 : -1], head.weight, ids, mask=mask).logps

        logps = model(input_ids=torch.cat([prompts, ids], dim=1), use_cache=False, fused_lm_head=answer_logps)
        (-logps.sum() / mask.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        left = 1.0 if sums_since is None else 1 - (step - sums_since) / cooling
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * min(left, step / 50)
        optimizer.step()
        optimizer.zero_grad()
        if sums_since is None and step % 25 == 0:
            if share(greedy_answers(model, tokenizer, train[:160]), train[:160], "answer", "careless") > 0.8:
                sums_since = step
    return step


if __name__ == "__main__":
    import sys, transformers
    torch.set_num_threads(1)
    kw = dict(DEFAULTS); 
    for a in sys.argv[1:]:
        k,v=a.split("="); kw[k]=type(kw.get(k,0.0))(v)
    args=GRPOConfig(**kw, use_cpu=True)
    set_seed(args.seed)
    t0=time.process_time()
    tok=make_tokenizer(); train,test=make_problems(args.seed); model=make_model(tok)
    print(sum(p.numel() for p in model.parameters()), len(train))
    fuse_lm_head(model)
    st=warm_up(model,tok,train,args.seed)
    g=greedy_answers(model,tok,test)
    print("seed",args.seed,"warm", st, f"{time.process_time()-t0:.1f}s", "right", share(g,test,"answer"),"either",share(g,test,"answer","careless"), flush=True)
    a0=share(g,test,"answer")
    class CB(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **k):
            if "loss" in logs and state.global_step%16==0:
                acc=share(greedy_answers(model,tok,test),test,"answer")
                print(state.global_step, {k:round(float(logs[k]),3) for k in ("reward","entropy","kl","clip_ratio/region_mean","grad_norm") if k in logs}, f"acc {acc:.3f} {time.process_time()-t0:.1f}s",flush=True)
    model.__dict__.pop("forward")
    args.disable_tqdm=True
    tr=GRPOTrainer(model,exact_match,args,train,processing_class=tok,callbacks=[CB()])
    from transformers import PrinterCallback; tr.remove_callback(PrinterCallback)
    tr.train()
    print("accuracy",a0,share(greedy_answers(model,tok,test),test,"answer"), time.process_time()-t0)
