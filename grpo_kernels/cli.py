"""`grpo-kernels train | plot | bench | doctor`: the command line.

`train` has one flag per field of `GRPOConfig`, generated from the dataclass; a YAML file sets the same names, and flags win
over it. Everything heavy is imported by the command that needs it.
"""

import difflib
import sys

from . import __version__

USAGE = """\
usage: grpo-kernels train [--config FILE.yaml] [--model PATH --data FILE --reward pkg.mod:fn ...] [--dry-run] [--OPTION VALUE ...]
       grpo-kernels plot RUN [FILE.png]
       grpo-kernels bench [--quick] [--shapes NAME,...] [--providers NAME,...] [--json FILE] [--plot DIR] ...
       grpo-kernels doctor [--build-cuda]
       grpo-kernels --version

train    trains a causal LM on rewards; without --model and --data, the built-in demo. `train --help` lists the options.
plot     draws reward, entropy, KL and clipping of a run's folder, finished or not.
bench    time, memory and error on this machine, beside bare matrix products and other libraries. `bench --help` explains.
doctor   versions, devices, and which backends are usable here and why not; --build-cuda first builds the CUDA C++ kernels.
"""


class UsageError(Exception):
    """What the user typed cannot be done; the message says what was wanted."""


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
    except UsageError as error:
        print(f"grpo-kernels: {error}", file=sys.stderr)
        return 2


def doctor(argv):
    from .doctor import main as examine

    if argv in (["-h"], ["--help"]):
        print(USAGE, end="")
        return 0
    if argv not in ([], ["--build-cuda"]):
        raise UsageError(f"doctor takes --build-cuda or nothing, got {' '.join(argv)}")
    return examine(argv)


def bench(argv):
    from .bench.command import Refused
    from .bench.command import main as measure
    from .bench.plot import NoMatplotlib

    try:
        return measure(argv)
    except (Refused, NoMatplotlib) as error:
        raise UsageError(error) from error


def plot(argv):
    from .trainer.plot import plot_folder

    if argv in (["-h"], ["--help"]):
        print(USAGE, end="")
        return
    if len(argv) not in (1, 2) or argv[0].startswith("-"):
        raise UsageError(f"plot takes the folder of a run, and a file other than training.png in it, got {' '.join(argv)!r}")
    try:
        print(plot_folder(*argv))
    except ValueError as error:
        raise UsageError(error) from error


def train(argv):
    from .trainer import GRPOTrainer, checkpoints, demo
    from .trainer.arguments import leave_together, parse, read_data
    from .trainer.dry_run import describe
    from .trainer.rewards import load_reward

    try:
        run, args = parse(argv, demo_defaults=demo.DEFAULTS)
        if not run.is_demo:
            rewards = [load_reward(spec) for spec in run.reward]
            data = read_data(run.data)
            evaluation = read_data(run.eval_data) if run.eval_data else None
            trainer = GRPOTrainer(run.model, rewards, args, data, eval_dataset=evaluation, peft_config=run.peft_config())
        if run.dry_run:
            plan = ["the built-in demo: no model, data or reward to check"] if run.is_demo else list(describe(trainer))
            if args.process_index == 0:
                print("\n".join(plan))
            return leave_together(args)
    except (ValueError, TypeError, NotImplementedError, OSError) as error:
        raise UsageError(error) from error
    if run.is_demo:
        demo.run(args)
    else:
        try:
            trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        except checkpoints.Unusable as error:
            raise UsageError(error) from error
        trainer.save_model(args.output_dir)
        metrics = trainer.evaluate() if evaluation else None
        trainer.save_state()
        if args.process_index == 0:
            if evaluation:
                print({name: round(value, 4) for name, value in metrics.items()})
            print(f"model: {args.output_dir}")
    leave_together(args)


def _suggest(name, known):
    close = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""


COMMANDS = {"train": train, "plot": plot, "bench": bench, "doctor": doctor}

if __name__ == "__main__":
    sys.exit(main())
