"""The built-in demo: a tiny language model learns to add, from rewards alone, on any machine in a few minutes.

Everything is made here: a character tokenizer, a Llama with random weights, and prompts such as `17+5=` whose answers a program
can check. The warm-up imitates texts of someone who counts on their fingers and often starts at the first number itself
(`17+5=21`), the larger the second number the more often. So the model can add, but its best guess is right only now and then;
a policy that never succeeds would have nothing to compare. From there on the real `GRPOTrainer` takes over, and sees no
answers any more, only whether its own were right. The vocabulary is padded, so that the output layer weighs in this run as it
does in real ones.
"""

import contextlib
import os
import random
import time

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..integrations.transformers import fuse_lm_head
from ..logprobs import linear_logprobs
from . import report
from .config import GRPOConfig
from .loss_cost import Shape, compare
from .rewards import exact_match
from .rollout import sample, tokenize
from .trainer import GRPOTrainer

DEFAULTS = dict(
    output_dir="outputs/demo",
    seed=0,
    use_cpu=True,
    max_steps=240,
    learning_rate=1e-3,
    lr_scheduler_type="linear",
    warmup_steps=4,
    adam_beta2=0.95,
    per_device_train_batch_size=256,
    num_generations=8,
    num_iterations=2,
    max_completion_length=3,
    epsilon_high=0.28,
    beta=1e-3,
    logging_steps=2,
    save_steps=120,
    report_to="none",
    ddp_find_unused_parameters=False,
)
_SHOWN = ("seed", "max_steps", "learning_rate", "per_device_train_batch_size", "num_generations", "num_iterations",
          "epsilon_high", "beta")  # fmt: skip
PADDED_VOCABULARY = 4096
HELD_OUT = 120
MISCOUNTED = {"small": 0.3, "large": 0.75}  # share of the warm-up's answers that are one too low, by the second number


def run(args: GRPOConfig) -> tuple[float, float]:
    """Warm up, train, show; returns the greedy accuracy on held-out prompts before and after. One process of several speaks."""
    transformers.utils.logging.disable_progress_bar()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices of 64 columns: threads would only wait for each other, and their number change the bits
    try:
        with contextlib.ExitStack() as stack:
            if args.process_index != 0:
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            return _run(args, threads)
    finally:
        torch.set_num_threads(threads)
        transformers.utils.logging.enable_progress_bar()


def _run(args, threads):
    start = time.perf_counter()
    set_seed(args.seed)
    tokenizer = make_tokenizer()
    train, held_out = make_problems(args.seed)
    model = make_model(tokenizer).to(args.device)
    print(f"A Llama of {model.num_parameters() / 1e6:.1f} M random parameters, vocabulary {PADDED_VOCABULARY}.")
    print(f"Task: sums, answered ones digit first as one adds by hand, such as {train[0]['prompt']}{train[0]['answer']};")
    print(f"{len(train)} to train on, {len(held_out)} held out.\n")

    print("1. Warm-up on texts of someone who often miscounts by one.")
    steps = warm_up(model, tokenizer, train, args.seed)
    before = greedy_answers(model, tokenizer, held_out)
    accuracy = share(before, held_out, "answer")
    print(f"   {steps} supervised steps, {time.perf_counter() - start:.0f} s: greedy accuracy {accuracy:.2f} on held-out prompts\n")

    print(f"2. GRPO: {args.generation_batch_size} completions a rollout, {args.num_generations} per prompt; reward 1 if right.")
    trainer = GRPOTrainer(model, exact_match, args, train, processing_class=tokenizer)
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    story = _Story(model, tokenizer, held_out, accuracy)
    trainer.add_callback(story)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    after = greedy_answers(model, tokenizer, held_out)
    final = share(after, held_out, "answer")

    print(f"\n3. Held-out prompts\n   {'prompt':8} {'before':>8} {'after':>8}")
    if args.process_index != 0:
        return accuracy, final  # one picture, and a measurement that nobody else disturbs
    for row, old, new in list(zip(held_out, before, after, strict=True))[:8]:
        print(f"   {row['prompt']:8} {old:>6} {_tick(old, row)} {new:>6} {_tick(new, row)}")

    torch.set_num_threads(threads)
    shape = Shape(args.per_device_train_batch_size, args.max_completion_length, PADDED_VOCABULARY, model.config.hidden_size)
    print(f"\n4. The loss and its gradients on one batch of this run ({describe(shape)})")
    savings = _savings(compare(shape))
    for name, *figures in savings[1:]:
        print(f"   {name:12} " + "   ".join(figures))
    page = os.path.join(args.output_dir, "report.html")
    shown = [report.Answer(row["prompt"], *texts, row["answer"]) for row, *texts in zip(held_out, before, after, strict=True)]
    options = [("model", f"a Llama of {model.num_parameters()} parameters"), *((name, getattr(args, name)) for name in _SHOWN)]
    title = "A small model learns to add from rewards"
    greedy = [*story.greedy, (trainer.state.global_step, final)]
    report.write(page, title, trainer.state.log_history, greedy, shown[:16], savings, options)
    print(f"\ncheckpoint: {os.path.join(args.output_dir, f'checkpoint-{trainer.state.global_step}')}")
    print(f"report: {page}")
    print(f"time: {time.perf_counter() - start:.0f} s")
    print(f"accuracy {accuracy:.2f} -> {final:.2f}")
    return accuracy, final


def unwarmed(args: GRPOConfig) -> GRPOTrainer:
    """The trainer of a demo whose model knows nothing yet, to look at."""
    tokenizer = make_tokenizer()
    return GRPOTrainer(make_model(tokenizer), exact_match, args, make_problems(args.seed)[0], processing_class=tokenizer)


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
    """(training rows, held-out rows) of sums such as 17+5, all below 100, answered ones digit first; no prompt is in both."""
    rows = [
        {
            "prompt": f"{a}+{b}=",
            "answer": str(a + b)[::-1],
            "miscount": str(a + b - 1)[::-1],
            "size": "small" if b < 5 else "large",
        }
        for a in range(11, 91)
        for b in range(1, 10)
    ]
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


def warm_up(model, tokenizer, train, seed, peak_lr=5e-3, most_steps=1400, cooling=150) -> int:
    """Supervised steps on answers of which many are miscounted, until the model adds one way or the other; returns their number."""
    dice = random.Random(seed)
    fuse_lm_head(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, betas=(0.9, 0.95), weight_decay=0.0)
    step, last = 0, most_steps
    model.train()
    while step < last:
        step += 1
        rows = dice.sample(train, 64)
        texts = [row["miscount" if dice.random() < MISCOUNTED[row["size"]] else "answer"] + tokenizer.eos_token for row in rows]
        prompts = torch.tensor(tokenize(tokenizer, [row["prompt"] for row in rows]), device=model.device)
        answers = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").to(model.device)
        ids, mask = answers["input_ids"], answers["attention_mask"].bool()

        def answer_logps(hidden, head, ids=ids, mask=mask):
            return linear_logprobs(hidden[:, -ids.shape[1] - 1 : -1], head.weight, ids, mask=mask).logps

        logps = model(input_ids=torch.cat([prompts, ids], dim=1), use_cache=False, fused_lm_head=answer_logps)
        (-logps.sum() / mask.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * min(1.0, step / 50, (last - step + 1) / cooling)
        optimizer.step()
        optimizer.zero_grad()
        if last == most_steps and step < most_steps - cooling and step % 25 == 0:
            some = train[:HELD_OUT]
            if share(greedy_answers(model, tokenizer, some), some, "answer", "miscount") > 0.97:
                last = step + cooling
    return step


class _Story(TrainerCallback):
    """One line of figures now and then, with the accuracy on held-out prompts."""

    def __init__(self, model, tokenizer, held_out, accuracy):
        self.model, self.tokenizer, self.held_out, self.greedy = model, tokenizer, held_out, [(0, accuracy)]
        print(f"   {'step':>4} {'reward':>7} {'entropy':>8} {'KL':>6} {'clipped':>8} {'greedy, held out':>17}")

    def on_log(self, args, state, control, logs=None, **kwargs):
        step = state.global_step
        if "reward" not in logs or (step % (8 * args.logging_steps) and step + args.logging_steps <= state.max_steps):
            return
        accuracy = share(greedy_answers(self.model, self.tokenizer, self.held_out), self.held_out, "answer")
        self.greedy.append((step, accuracy))
        clipped = logs["clip_ratio/region_mean"]
        print(f"   {step:4} {logs['reward']:7.2f} {logs['entropy']:8.3f} {logs.get('kl', 0):6.3f} {clipped:8.4f} {accuracy:17.2f}")


def _tick(answer, row):
    return "✓" if answer == row["answer"] else "✗"


def describe(shape):
    return f"{shape.B} completions x {shape.T} tokens, vocabulary {shape.V}, hidden size {shape.D}, float32"


def _savings(costs):
    """Rows of a table."""
    rows, full, fused = [("loss and gradients", "time", "memory on top of the inputs")], costs["full"], costs["fused"]
    memory = lambda n: "not measured here" if n is None else f"{n / 2**20:.1f} MiB"  # noqa: E731
    rows += [(name, f"{x.seconds * 1e3:.1f} ms", memory(x.extra_bytes)) for name, x in (("full logits", full), ("fused", fused))]
    saved = None if full.extra_bytes is None else full.extra_bytes - fused.extra_bytes
    return [*rows, ("saved", f"x {full.seconds / fused.seconds:.2f}", memory(saved))]
