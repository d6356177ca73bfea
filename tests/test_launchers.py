"""`accelerate launch` with the files of examples/accelerate, on two processes without a GPU: each run is that of one process.

accelerate gives a CPU neither FSDP nor DeepSpeed, so the started script names the processes' backend as that of another device
(see `use_fsdp` in test_trainer_ranks.py). Files, launcher, command line and engines are the real ones.
"""

import pytest
from support.engines import EXAMPLES, LONG, RANKS, assert_same, assert_started_again, options, prepare, run

SCRIPT = """
import sys

from accelerate import state

from grpo_kernels import cli

if sys.argv.pop(1) == "engine":
    begin = state.PartialState.__init__
    state.PartialState.__init__ = lambda self, cpu=False, **options: begin(self, **options)
    state.PartialState._prepare_backend = lambda self, *args: ("gloo", state.DistributedType.MULTI_XPU)
if cli.main(sys.argv[1:]):
    sys.exit(1)
engine = state.AcceleratorState()
sys.stdout.write(f"<{engine.distributed_type.value} on {engine.num_processes}>")
"""
KINDS = {"ddp": "MULTI_CPU", "fsdp2": "FSDP", "deepspeed_zero3": "DEEPSPEED"}
PLAIN = dict(max_steps=2, learning_rate=0.3, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.5)


def start(folder, output, kind=None, survives=True, **settings):
    """`grpo-kernels train` on one process, or with a file of examples/accelerate on two; returns what was printed."""
    launcher, ranks = (), 1
    if kind:
        launcher = ("-m", "accelerate.commands.launch", "--config_file", EXAMPLES / "accelerate" / f"{kind}.yaml", "--num_processes", RANKS,
                    "--main_process_port", 0, "--mixed_precision", "no")  # fmt: skip
        ranks = RANKS
    engine = kind in ("fsdp2", "deepspeed_zero3")
    words = ["run.py", "engine" if engine else "plain", "train", *options(output, ranks, use_cpu=not engine, **settings)]
    return run(folder, *launcher, *words, environment={"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}, survives=survives)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("launched")
    prepare(path)
    (path / "run.py").write_text(SCRIPT)
    return path


@pytest.fixture(scope="module")
def one(folder):
    start(folder, "one", **PLAIN)


@pytest.mark.exhaustive(reason="a quarter of a minute for each engine")
@pytest.mark.parametrize("name", KINDS)
def test_accelerate_launch_is_one_process(name, folder, one):
    if name == "deepspeed_zero3":
        pytest.importorskip("deepspeed")
    said = start(folder, name, name, **PLAIN)
    assert said.count(f"<{KINDS[name]} on {RANKS}>") == RANKS and said.count(f"model: {name}\n") == 1
    assert_same(folder, name, "one")


@pytest.mark.exhaustive(reason="half a minute: launches three runs, two of them on two processes")
def test_a_killed_run_under_fsdp2_ends_as_one_process(folder):
    """One of two processes is killed in the fifth of six steps; started again, the run ends in log and weights of one that ran through."""
    start(folder, "whole", **LONG)
    for seen in folder.glob("seen-*"):
        seen.unlink()
    start(folder, "broken", "fsdp2", survives=False, **LONG)
    start(folder, "broken", "fsdp2", resume_from_checkpoint="last", **LONG)
    assert_started_again(folder)
    assert_same(folder, "broken", "whole")
