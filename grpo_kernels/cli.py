"""`grpo-kernels train | plan | plot | bench | doctor`: the command line.

`train` has one flag per field of `GRPOConfig`, generated from the dataclass; a YAML file sets the same names, and flags win
over it. Everything heavy is imported by the command that needs it.
"""

import argparse
import contextlib
import difflib
import json
import math
import sys
from dataclasses import asdict

from . import __version__
from .extras import MissingExtra

USAGE = """\
usage: grpo-kernels train [--config FILE.yaml] [--model PATH --data FILE --reward pkg.mod:fn ...] [--dry-run] [--OPTION VALUE ...]
       grpo-kernels plan --tokens N --vocab V --depth D [--device h200] [--dtype bf16] [--frozen | --logprobs] [--two-phase]
                         [--support K | --teacher-depth D' [--divergence KIND]] [--workspace-mb M] [--json]
       grpo-kernels plot RUN [FILE.png]
       grpo-kernels bench [--quick] [--shapes NAME,...] [--providers NAME,...] [--json FILE] [--plot DIR] ...
       grpo-kernels doctor [--build-cuda]
       grpo-kernels --version

train    trains a causal LM on rewards; without --model and --data, the built-in demo.
plan     predicts time and peak memory of one call of the loss on a device, step by step; runs nothing.
plot     draws reward, entropy, KL and clipping of a run's folder, finished or not.
bench    measures time, memory and error on this machine, beside bare matrix products and other libraries.
doctor   shows versions, devices, and which backends work here or why not; --build-cuda first builds the CUDA C++ kernels.

`grpo-kernels COMMAND --help` lists the options of a command.
"""


class UsageError(Exception):
    """What the user typed cannot be done; the message says what was wanted."""


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(f"{self.prog.split()[-1]}: {message}")


def main(argv=None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(USAGE, end="")
            return 0
        if argv[0] == "--version":
            print(f"grpo-kernels {__version__}")
            return 0
        if argv[0] not in COMMANDS:
            raise UsageError(f"unknown command {argv[0]!r}{_suggest(argv[0], COMMANDS)}\n{USAGE}")
        return COMMANDS[argv[0]](argv[1:]) or 0
    except (UsageError, MissingExtra) as error:
        print(f"grpo-kernels: {error}", file=sys.stderr)
        return 2


def _print_help(command):
    """What the usage says of a command that has no parser."""
    lines = USAGE.splitlines()
    (how,) = (line for line in lines if f"grpo-kernels {command}" in line)
    (what,) = (line for line in lines if line.startswith(command))
    print(f"usage: {how.strip()}\n\n{what}")


def doctor(argv):
    if argv in (["-h"], ["--help"]):
        return _print_help("doctor")
    if argv not in ([], ["--build-cuda"]):
        raise UsageError(f"doctor takes --build-cuda or nothing, got {' '.join(argv)}")
    from .doctor import main as examine

    return examine(argv)


def bench(argv):
    from .bench.command import Refused
    from .bench.command import main as measure

    try:
        return measure(argv)
    except Refused as error:
        raise UsageError(error) from error


def plan(argv):
    from .engine.cost import seconds
    from .engine.plan import DEVICES, Problem, default_budget, predict, steps
    from .engine.plan import plan as choose

    parser = _Parser(prog="grpo-kernels plan", allow_abbrev=False, description=_WHAT_PLAN_IS, epilog=_PLAN)
    parser.add_argument("--tokens", type=int, required=True, help="N, completion tokens of one call that are not masked")
    parser.add_argument("--vocab", type=int, required=True, help="V, the size of the vocabulary: rows of the head's weight")
    parser.add_argument("--depth", type=int, required=True, help="D, the hidden size: columns of that weight")
    parser.add_argument("--device", type=str.lower, choices=sorted(DEVICES), default="h200", help="whose time is predicted (h200)")
    parser.add_argument("--dtype", choices=_BYTES, default="bf16", help="of hidden states and weight (bf16)")
    wanted = parser.add_mutually_exclusive_group()
    wanted.add_argument("--frozen", action="store_true", help="the head is not trained: no gradient of its weight")
    wanted.add_argument("--logprobs", action="store_true", help="log-probs alone: no gradient at all")
    parser.add_argument("--two-phase", action="store_true", help="a loss that needs all log-probs before any coefficient")
    beside = parser.add_mutually_exclusive_group()
    beside.add_argument("--support", type=float, metavar="K", help="over supports of K tokens in the mean, not over the vocabulary")
    beside.add_argument("--teacher-depth", type=int, metavar="D'", help="a divergence from a teacher of this hidden size")
    parser.add_argument("--divergence", choices=_DIVERGENCES, help="which one, with --teacher-depth (reverse_kl)")
    parser.add_argument("--workspace-mb", type=float, metavar="M", help="memory for chunks of logits (GRPO_KERNELS_WORKSPACE_MB)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    try:
        budget = default_budget(args.device) if args.workspace_mb is None else int(args.workspace_mb * 2**20)
    except (ValueError, OverflowError) as error:
        raise UsageError(f"plan: {error}") from error
    for name, value in (("tokens", args.tokens), ("vocab", args.vocab), ("depth", args.depth), ("workspace-mb", budget)):
        if value <= 0:
            raise UsageError(f"plan: --{name} must be > 0, got {getattr(args, name.replace('-', '_'))}")
    if args.teacher_depth is not None and args.teacher_depth <= 0:
        raise UsageError(f"plan: --teacher-depth must be > 0, got {args.teacher_depth}")
    if args.divergence and not args.teacher_depth:
        raise UsageError("plan: --divergence is one from a teacher: it needs --teacher-depth")
    if args.support is not None and not 1 <= args.support <= args.vocab:
        raise UsageError(f"plan: --support must be in [1, V = {args.vocab}], got {args.support:g}")
    e, gradient = _BYTES[args.dtype], not args.logprobs
    problem = Problem(
        live=args.tokens * gradient, dead=args.tokens * (not gradient), vocab=args.vocab, depth=args.depth, element_size=e,
        tile_size=e if args.device == "cpu" else max(e, 4), needs_hidden=gradient, needs_weight=gradient and not args.frozen,
        budget=budget, two_phases=args.two_phase, device=DEVICES[args.device],
        pairs=math.ceil(args.tokens * (args.support or 0)), teacher_depth=args.teacher_depth or 0,
        teacher_size=e if args.teacher_depth else 0, mixes=args.divergence == "jsd",
    )  # fmt: skip
    chosen = choose(problem)
    found, prediction = steps(problem, chosen), predict(problem)
    if args.json:
        again = problem.stashes and not chosen.stash_rows
        r, R = (chosen.recompute_chunk, chosen.recompute_rows) if again else (chosen.chunk_rows, chosen.buffer_rows)
        heights = {"r": 0, "R": 0} if problem.pairs else {"r": r, "R": R, **asdict(chosen)}
        print(json.dumps({"device": args.device, "heights": heights, "steps": [asdict(x) for x in found], **asdict(prediction)}))
        return
    print(f"device   {args.device}, {args.dtype}, workspace {budget / 2**20:g} MiB")
    used = ("chunk_rows", "buffer_rows", "direct", "dh_rows") if gradient else ("score_group", "score_rows", "score_columns")
    if problem.stashes:
        used = (*used, "stash_rows", *(name for name in asdict(chosen) if "recompute" in name and chosen.stash_rows < args.tokens))
    heights = ", ".join(f"{name} {getattr(chosen, name)}" for name in used)
    print(f"heights  {'none: no logits are made' if problem.pairs else heights}")
    print(f"\n{'':50}{'MiB of one:':>11}{'':19}{'in all:':>10}")
    print(f"{'step':16}{'count':>7}{'m':>9}{'n':>9}{'k':>9}{'read':>11}{'written':>10}{'in L2':>9}{'ms':>10}")
    for x in found:
        mib = [size / 2**20 for size in (x.read, x.written, x.cached)]
        print(f"{x.what:16}{x.count:>7}{x.m:>9}{x.n:>9}{x.k or '':>9}{mib[0]:>11.1f}{mib[1]:>10.1f}{mib[2]:>9.1f}"
              f"{x.count * seconds(problem, x) * 1e3:>10.3f}")  # fmt: skip
    floor = "bare rows" if problem.pairs else "bare products"
    times = f"predicted {prediction.predicted_ms:.2f} ms, {floor} {prediction.floor_ms:.2f} ms, ratio {prediction.ratio:.3f}"
    peak = f"{prediction.peak_bytes / 2**20:.1f} MiB" if problem.pairs else f"{prediction.peak_bytes / 2**30:.2f} GiB"
    print(f"\n{times}, peak {peak}")


def plot(argv):
    if argv in (["-h"], ["--help"]):
        return _print_help("plot")
    if len(argv) not in (1, 2) or argv[0].startswith("-"):
        raise UsageError(f"plot takes the folder of a run, and a file other than training.png in it, got {' '.join(argv)!r}")
    from .trainer.plot import plot_folder

    try:
        print(plot_folder(*argv))
    except ValueError as error:
        raise UsageError(error) from error


def train(argv):
    from .trainer import GRPOTrainer, checkpoints, demo, dry_run
    from .trainer.arguments import leave_together, no_bars_in_a_file, output_folder, parse, read_data
    from .trainer.rewards import load_reward

    no_bars_in_a_file()
    with contextlib.ExitStack() as made:
        with _in_one_line():
            run, args = parse(argv, demo_defaults=demo.DEFAULTS)
            made.enter_context(output_folder(args.output_dir, keep=not run.dry_run))
            if run.dry_run:
                dry_run.forgo_hub(args)
            if not run.is_demo:
                rewards = [load_reward(spec) for spec in run.reward]
                data = read_data(run.data)
                evaluation = read_data(run.eval_data) if run.eval_data else None
                trainer = GRPOTrainer(run.model, rewards, args, data, eval_dataset=evaluation, peft_config=run.peft_config())
            else:
                trainer = demo.unwarmed(args)
            dry_run.check(trainer)
            if run.dry_run:
                plan = list(dry_run.describe(trainer))
                if args.process_index == 0:
                    print("\n".join(plan))
                return leave_together(args)
        try:
            demo.run(args) if run.is_demo else trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        except checkpoints.Unusable as error:
            raise UsageError(error) from error
        if not run.is_demo:
            trainer.save_model(args.output_dir)
            metrics = trainer.evaluate() if evaluation else None
            trainer.save_state()
            if args.process_index == 0:
                if evaluation:
                    print({name: round(value, 4) for name, value in metrics.items()})
                print(f"model: {args.output_dir}")
        leave_together(args)


@contextlib.contextmanager
def _in_one_line():
    """Whatever keeps a run from its first step; what is not meant for the user's eyes, with its type and place."""
    from .trainer.rewards import noted, raised_at, told

    try:
        yield
    except Exception as error:
        meant = isinstance(error, (ValueError, TypeError, NotImplementedError, OSError, ImportError, RuntimeError))
        said = noted(error) or (meant and " ".join(str(error).split())) or told(error, raised_at(error))
        raise UsageError(said if len(said) <= _LONGEST else f"{said[:_LONGEST]} ...") from error


def _suggest(name, known):
    close = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""


_WHAT_PLAN_IS = "Predicts time and peak memory of one call of the loss on a device. Nothing is run."
_PLAN = """A step is a product [m, k] x [k, n], or a pass over [m, n] logits where k is empty. It is done `count` times. MiB read
and written are those of one time; the milliseconds are those of all. With --support, m counts (position, token) pairs, of N x K: a
position of one token costs nothing and is counted all the same. Every pair's token is taken to be another one."""
_LONGEST = 500  # characters of a message; transformers' may list a hundred models
_DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")
_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
COMMANDS = {"train": train, "plan": plan, "plot": plot, "bench": bench, "doctor": doctor}

if __name__ == "__main__":
    sys.exit(main())
