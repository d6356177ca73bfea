"""Under Ray: the trainer's run on Ray Train's workers, one of them killed, and verl's plugin in a worker process of verl's kind."""

import pytest
import torch

pytest.importorskip("ray", reason="needs ray, see make test-ray")
pytest.importorskip("ray.train.torch", reason="needs ray[train], see make test-ray")

from support.engines import EXAMPLES, LONG, RANKS, assert_same, assert_started_again, options, prepare, run

# Ray's sockets lie below its folder, and their names have at most 107 bytes
RAY = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": "/tmp"}


def test_ray_train_goes_on_after_a_killed_worker(tmp_path):
    """Two workers, one killed amid the run: log and weights are those of one process that nobody stopped."""
    prepare(tmp_path)
    run(tmp_path, "-m", "grpo_kernels.cli", "train", *options("one", 1, use_cpu=True, **LONG))
    run(tmp_path, EXAMPLES / "ray_train.py", "--workers", RANKS, "--", *options("two", RANKS, use_cpu=True, **LONG), environment=RAY)
    assert_started_again(tmp_path)
    assert_same(tmp_path, "two", "one")


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
    prepare(tmp_path)
    (tmp_path / "my_plugin.py").write_text(PLUGIN)
    (tmp_path / "workers.py").write_text(WORKERS)
    run(tmp_path, "workers.py", environment=RAY)
    driver, scores = torch.load(tmp_path / "scores", weights_only=False)
    assert len({driver, *(score["pid"] for score in scores)}) == 3
    for rank, score in enumerate(scores):
        assert (score["rank"], score["world"]) == (rank, 2)
        assert not score["before"].startswith("grpo_kernels") and score["after"] == "grpo_kernels.integrations.verl"
        torch.testing.assert_close(score["logps"], score["wanted"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(score["entropy"], score["wanted_entropy"], atol=1e-5, rtol=1e-5)
        assert score["gradient"] > 0
