"""The command line's training run under Ray Train: the same options, on Ray's workers; a worker that dies is started again.

    pip install "ray[train]"
    python examples/ray_train.py --workers 8 --gpu -- --model PATH --data FILE.jsonl --reward pkg.mod:fn --output_dir /shared/run
    python examples/ray_train.py --workers 2 --threads 1 -- --model PATH --data FILE.jsonl --reward pkg.mod:fn --output_dir out

What follows ``--`` are the options of `grpo-kernels train`. Each worker is one process of the run; Ray sets its rank and makes the
process group. If a worker is killed, Ray stops the others and starts all of them again, and the run goes on from its newest
checkpoint that is whole. The output folder must therefore be one that every machine sees.
"""

import argparse
import os
import sys

import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from grpo_kernels import cli


def worker(settings):
    """On each worker: `grpo-kernels train`, from the newest checkpoint if there is one. Returns its exit status."""
    os.chdir(settings["folder"])
    sys.path.insert(0, settings["folder"])  # where --reward is looked for
    torch.set_num_threads(settings["threads"])
    return cli.main(["train", *settings["options"], "--resume_from_checkpoint", "last"])  # not 0: refused, as it would be again


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpu", action="store_true", help="one for each worker")
    parser.add_argument("--threads", type=int, default=1, help="CPU cores of each worker")
    parser.add_argument("--failures", type=int, default=3, help="how often the workers may be started again")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="-- and the options of grpo-kernels train")
    args = parser.parse_args()
    options = args.options[1:] if args.options[:1] == ["--"] else args.options
    settings = {"folder": os.getcwd(), "threads": args.threads, "options": options}
    trainer = TorchTrainer(
        worker,
        train_loop_config=settings,
        torch_config=TorchConfig(backend="nccl" if args.gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=args.workers, use_gpu=args.gpu, resources_per_worker={"CPU": args.threads}),
        # Ray's own records; with several machines they too must lie where all see them
        run_config=RunConfig(storage_path=os.path.abspath("ray_results"), failure_config=FailureConfig(max_failures=args.failures)),
    )
    sys.exit(trainer.fit().return_value)


if __name__ == "__main__":
    main()
