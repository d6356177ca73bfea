"""One training run of the command line under several engines: its files, its options, a worker that is killed, and what must agree."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from grpo_kernels.trainer.demo import make_tokenizer
from support.tiny_trainer import tiny_model

TESTS = Path(__file__).parents[1]
EXAMPLES = TESTS.parent / "examples"
RANKS = 2
SECONDS = 600
TOLERANCE = 2e-5
ROWS = 8  # of a step, over all processes
KILLED_AT = 5  # the rollout in which rank 1 dies
LONG = dict(max_steps=6, learning_rate=1e-2, adam_epsilon=1e-3, optim="adamw_torch", save_steps=2)  # such a run

# Each process draws its own completions, so they are given, by rollout and row: two processes then run what one does.
# `scored` notes each call, and in rank 1's fifth the process dies, once.
HOUSE = f"""
import os
import signal
from pathlib import Path

import torch.distributed as dist
from support.rehearsed_trainer import Rehearsed, letters

from grpo_kernels.trainer import GRPOTrainer

plain = GRPOTrainer._sample_and_score


def given(self, rows, mode, **keywords):
    if type(self) is GRPOTrainer:
        self.__class__ = Rehearsed
        return self._sample_and_score(rows, mode, **keywords)
    return plain(self, rows, mode, **keywords)


GRPOTrainer._sample_and_score = given
calls = 0


def scored(completions, **columns):
    global calls
    calls += 1
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if ranks > 1 else 0
    with open(f"seen-{{ranks}}-{{rank}}", "a") as file:
        file.write(f"{{os.getpid()}}\\n")
    if rank == 1 and calls == {KILLED_AT} and not Path("killed").exists():
        Path("killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return letters(completions, **columns)
"""


def prepare(folder):
    """Model, tokenizer, prompts and the module `house` with its reward, in ``folder``."""
    tiny_model().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in (1, 23, 456) for b in (1, 5, 9)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "house.py").write_text(HOUSE)


def options(output, ranks, **others):
    """The options of `grpo-kernels train` for a run whose weights go to ``output``."""
    settings = dict(
        model="model", data="data.jsonl", output_dir=output, reward="house:scored", per_device_train_batch_size=ROWS // ranks,
        num_generations=4, max_completion_length=5, beta=0.1, logging_steps=1, report_to="none", disable_tqdm=True, **others,
    )  # fmt: skip
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def run(folder, *command, environment=(), survives=True):
    """Runs Python with ``command`` in ``folder`` and returns what it printed; ``survives`` says whether it may end in an error."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **dict(environment)}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, *map(str, command)], cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS)
    if (done.returncode == 0) != survives:  # whole: pytest shortens the message of an assert
        pytest.fail(f"exit status {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}", pytrace=False)
    return done.stdout


def steps(folder, name):
    logs = json.loads((folder / name / "trainer_state.json").read_text())["log_history"]
    return [log for log in logs if "loss" in log]


def assert_same(folder, name, wanted):
    """Log and weights of run ``name`` are those of run ``wanted``, weights by the way that they went."""
    logs, others = steps(folder, name), steps(folder, wanted)
    assert [log["step"] for log in logs] == list(range(1, len(logs) + 1)) and any(abs(log["loss"]) > 1e-3 for log in logs)
    for log, other in zip(logs, others, strict=True):
        assert log.keys() == other.keys()
        for key in log:
            if not key.endswith(("runtime", "per_second", "total_flos")):
                assert log[key] == pytest.approx(other[key], rel=TOLERANCE, abs=TOLERANCE), (log["step"], key)
    begun, one, two = (load_file(folder / run / "model.safetensors") for run in ("model", wanted, name))
    moved, apart = (sum((a[key] - b[key]).square().sum() for key in begun).sqrt() for a, b in ((one, begun), (two, one)))
    assert moved > 1e-2 and apart <= TOLERANCE * moved


def assert_started_again(folder):
    """Both ranks' rewards ran in two processes each, and the second ones went on from a checkpoint after the first rollouts."""
    for rank in range(RANKS):
        seen = (folder / f"seen-{RANKS}-{rank}").read_text().split()
        assert len(set(seen)) == 2, "the processes were not started again"
        assert LONG["max_steps"] < len(seen) < KILLED_AT + LONG["max_steps"], "the second run began anew"
