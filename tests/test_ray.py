"""Under Ray: the trainer's run on Ray Train's workers, one of them killed, and verl's plugin in a worker process of verl's kind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("ray", reason="needs ray, see make test-ray")
pytest.importorskip("ray.train.torch", reason="needs ray[train], see make test-ray")

from test_trainer import tiny_model

from grpo_kernels.trainer.demo import make_tokenizer

TESTS = Path(__file__).parent
EXAMPLE = TESTS.parent / "examples" / "ray_train.py"
SECONDS = 600
STEPS = 6
TOLERANCE = 2e-5

# given completions instead of dice, so that the run is that of one process; rank 1 dies in its fifth rollout, once
HOUSE = """
import os
import signal
from pathlib import Path

import torch.distributed as dist
from test_trainer_ranks import Rehearsed, letters

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
    with open(f"seen-{ranks}-{rank}", "a") as file:
        file.write(f"{os.getpid()}\\n")
    if rank == 1 and calls == 5 and not Path("killed").exists():
        Path("killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return letters(completions, **columns)
"""


def run(command, folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    # Ray's sockets lie below its folder, and their names have at most 107 bytes
    environment["RAY_TMPDIR"] = "/tmp"
    done = subprocess.run([sys.executable, *map(str, command)], cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-6000:])
    return done.stdout


def options(folder, rows):
    return ["--model", "model", "--data", "data.jsonl", "--output_dir", folder, "--reward", "house:scored", "--max_steps", STEPS,
            "--per_device_train_batch_size", rows, "--num_generations", 4, "--max_completion_length", 5, "--learning_rate", 1e-2,
            "--adam_epsilon", 1e-3, "--optim", "adamw_torch", "--beta", 0.1, "--logging_steps", 1, "--save_steps", 2, "--report_to", "none",
            "--disable_tqdm", "true", "--use_cpu", "true"]  # fmt: skip


def test_ray_train_goes_on_after_a_killed_worker(tmp_path):
    """Two workers, one killed amid the run: log and weights are those of one process that nobody stopped."""
    tiny_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in (1, 23, 456) for b in (1, 5, 9)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "house.py").write_text(HOUSE)
    run(["-m", "grpo_kernels.cli", "train", *options("one", 8)], tmp_path)
    run([EXAMPLE, "--workers", 2, "--", *options("two", 4)], tmp_path)
    for rank in range(2):
        seen = (tmp_path / f"seen-2-{rank}").read_text().split()
        assert len(set(seen)) == 2, "the workers were not started again"
        assert 5 + STEPS - 4 <= len(seen) < 5 + STEPS, "the second run began anew"

    logs, wanted = (
        [log for log in json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"] if "loss" in log]
        for name in ("two", "one")
    )
    assert [log["step"] for log in logs] == list(range(1, STEPS + 1))
    for log, other in zip(logs, wanted, strict=True):
        assert log.keys() == other.keys()
        for name in log:
            if not name.endswith("per_second"):
                assert log[name] == pytest.approx(other[name], rel=TOLERANCE, abs=TOLERANCE), (log["step"], name)
    begun, one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "one", "two"))
    moved, apart = (sum((a[key] - b[key]).square().sum() for key in begun).sqrt() for a, b in ((one, begun), (two, one)))
    assert moved > 1e-2 and apart <= TOLERANCE * moved


PLUGIN = "from grpo_kernels.integrations.verl import install_verl_backend\n\ninstall_verl_backend()\n"
# a worker group as verl's trainers make theirs; its model's config imports external_lib in the worker
WORKERS = """
import os
import sys

import ray
import torch
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch, register
from verl.single_controller.ray.base import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup


class Scorer(Worker):
    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def score(self, path, external_lib):
        from transformers import AutoModelForCausalLM
        from verl.models.transformers.monkey_patch import patch_forward_with_backends
        from verl.utils.kernel import linear_cross_entropy as kernel
        from verl.workers.config import HFModelConfig

        before = kernel.linear_cross_entropy.__module__
        config = HFModelConfig(path=path, external_lib=external_lib, use_fused_kernels=True, fused_kernel_options={"impl_backend": "triton"},
                               override_config={"attn_implementation": "eager"})
        model = AutoModelForCausalLM.from_pretrained(config.local_path, config=config.hf_config, dtype=torch.float32)
        ids = torch.arange(2, 12).reshape(2, 5)
        truth = (model(input_ids=ids).logits.detach() / 0.7).log_softmax(-1)
        patch_forward_with_backends(model, use_fused_kernels=config.use_fused_kernels,
                                    fused_kernels_backend=config.fused_kernel_options["impl_backend"])
        out = model(input_ids=ids, temperature=0.7, return_dict=True, use_cache=False)
        out.log_probs.sum().backward()
        return dict(pid=os.getpid(), rank=self.rank, world=self.world_size, before=before, after=kernel.linear_cross_entropy.__module__,
                    logps=out.log_probs.detach(), entropy=out.entropy.detach(), gradient=model.lm_head.weight.grad.norm(),
                    wanted=truth.gather(-1, ids.roll(-1, -1).unsqueeze(-1)).flatten(), wanted_entropy=-(truth.exp() * truth).sum(-1).flatten())


if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False)
    pool = RayResourcePool([2], use_gpu=False, max_colocate_count=1)
    group = RayWorkerGroup(pool, RayClassWithInitArgs(ray.remote(Scorer)), device_name="cpu")
    torch.save((os.getpid(), group.score(os.path.abspath("model"), "my_plugin")), "scores")
"""


def test_verls_ray_workers_load_the_plugin_as_external_lib(tmp_path):
    """In both processes verl's forward runs on ours: log-probs and entropies are those of full logits."""
    pytest.importorskip("verl", reason="needs verl, see make test-ray")
    tiny_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "my_plugin.py").write_text(PLUGIN)
    (tmp_path / "workers.py").write_text(WORKERS)
    run(["workers.py"], tmp_path)
    driver, scores = torch.load(tmp_path / "scores", weights_only=False)
    assert len({driver, *(score["pid"] for score in scores)}) == 3
    for rank, score in enumerate(scores):
        assert (score["rank"], score["world"]) == (rank, 2)
        assert not score["before"].startswith("grpo_kernels") and score["after"] == "grpo_kernels.integrations.verl"
        torch.testing.assert_close(score["logps"], score["wanted"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(score["entropy"], score["wanted_entropy"], atol=1e-5, rtol=1e-5)
        assert score["gradient"] > 0
