"""`accelerate launch` with the files of examples/accelerate, on two processes without a GPU: each run is that of one process.

accelerate gives a CPU neither FSDP nor DeepSpeed, so the started script names the processes' backend as that of another device
(see `use_fsdp` in test_trainer_ranks.py). Files, launcher, command line and engines are the real ones.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_trainer import tiny_model

from grpo_kernels.trainer.demo import make_tokenizer

TESTS = Path(__file__).parent
EXAMPLES = TESTS.parent / "examples" / "accelerate"
RANKS = 2
SECONDS = 600
STEPS = 2
ROWS = 8  # of a step, over all processes
TOLERANCE = 2e-5

# the dice are each process's own, so completions are given, by rollout and row
SCRIPT = """
import sys

from accelerate import state
from test_trainer_ranks import Rehearsed, letters

import grpo_kernels.trainer
from grpo_kernels import cli

if sys.argv.pop(1) == "engine":
    begin = state.PartialState.__init__
    state.PartialState.__init__ = lambda self, cpu=False, **options: begin(self, **options)
    state.PartialState._prepare_backend = lambda self, *args: ("gloo", state.DistributedType.MULTI_XPU)
grpo_kernels.trainer.GRPOTrainer = Rehearsed
if cli.main(sys.argv[1:]):
    sys.exit(1)
engine = state.AcceleratorState()
print(f"{engine.distributed_type.value} on {engine.num_processes}", flush=True)
"""
KINDS = {"ddp": "MULTI_CPU", "fsdp2": "FSDP", "deepspeed_zero3": "DEEPSPEED"}


def start(folder, name, *launcher, engine=False, ranks=RANKS):
    """Trains the model in ``folder`` and returns (log history, weights by name, what was printed)."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    command = [
        *launcher, "run.py", "engine" if engine else "plain", "train", "--model", "model", "--data", "data.jsonl", "--output_dir", name,
        "--reward", "test_trainer_ranks:letters", "--max_steps", STEPS, "--per_device_train_batch_size", ROWS // ranks,
        "--num_generations", 4, "--max_completion_length", 5, "--learning_rate", 0.3, "--optim", "sgd", "--lr_scheduler_type", "constant",
        "--beta", 0.1, "--max_grad_norm", 0.5, "--logging_steps", 1, "--report_to", "none", "--disable_tqdm", "true",
        "--use_cpu", str(not engine),
    ]  # fmt: skip
    done = subprocess.run([sys.executable, *map(str, command)], cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr[-6000:]
    logs = json.loads((folder / name / "trainer_state.json").read_text())["log_history"]
    return logs, load_file(folder / name / "model.safetensors"), done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("launched")
    tiny_model().save_pretrained(path / "model")
    make_tokenizer().save_pretrained(path / "model")
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in (1, 23, 456) for b in (1, 5, 9)]
    (path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "run.py").write_text(SCRIPT)
    return path


@pytest.fixture(scope="module")
def one(folder):
    return start(folder, "one", ranks=1)


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_launch_is_one_process(name, folder, one):
    if name == "deepspeed_zero3":
        pytest.importorskip("deepspeed")
    launcher = ("-m", "accelerate.commands.launch", "--config_file", EXAMPLES / f"{name}.yaml", "--num_processes", RANKS,
                "--main_process_port", 0, "--mixed_precision", "no")  # fmt: skip
    logs, weights, said = start(folder, name, *launcher, engine=name != "ddp")
    assert said.count(f"{KINDS[name]} on {RANKS}\n") == RANKS and said.count(f"model: {name}\n") == 1
    steps = [log for log in one[0] if "loss" in log]
    assert len(steps) == STEPS and any(abs(log["loss"]) > 1e-3 for log in steps)
    for log, other in zip([log for log in logs if "loss" in log], steps, strict=True):
        assert log.keys() == other.keys()
        for key in log:
            if not key.endswith(("runtime", "per_second", "total_flos")):
                assert log[key] == pytest.approx(other[key], rel=TOLERANCE, abs=TOLERANCE), (log["step"], key)
    begun = load_file(folder / "model" / "model.safetensors")
    moved = sum((one[1][key] - begun[key]).square().sum() for key in begun).sqrt()
    apart = sum((one[1][key] - weights[key]).square().sum() for key in begun).sqrt()
    assert moved > 1e-2 and apart <= TOLERANCE * moved
