"""What `make release` runs in an empty environment that holds one of its artefacts: python installed.py VERSION CHECKOUT."""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

import grpo_kernels
from grpo_kernels import GRPOLossConfig, build_cuda, fused_linear_grpo_loss, reference
from grpo_kernels.backends import native


def said(*command):
    """What a command of the environment prints."""
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def check_place(version, checkout):
    package = Path(grpo_kernels.__file__).parent.resolve()
    assert package.is_relative_to(Path(sys.prefix).resolve()) and not package.is_relative_to(Path(checkout).resolve()), package
    assert grpo_kernels.__version__ == version, grpo_kernels.__version__
    assert {*build_cuda.SOURCES, *build_cuda.CPU_SOURCES} <= {path.name for path in (package / "csrc").iterdir()}
    assert (package / "py.typed").exists()


def check_extension():
    assert native.why_unavailable() is None, native.why_unavailable()
    assert native.build_info()["openmp"] and native.build_info()["isas"][0] == "baseline", native.build_info()
    # PyTorch's OpenMP runtime is the only one: two would be two pools of threads
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
    assert len(loaded) == 1, loaded


def problem(dtype):
    """(hidden, weight, ids, advantages, mask, old log-probs): 24 tokens, some masked, ratios on both sides of the clip range."""
    torch.manual_seed(0)
    hidden, weight = (0.3 * torch.randn(4, 6, 48)).to(dtype), torch.randn(509, 48).to(dtype)
    ids, mask, advantages = torch.randint(509, (4, 6)), torch.ones(4, 6), torch.tensor([1.0, -1.0, 0.5, 0.0])
    mask[1, 4:] = mask[3] = 0
    logps = torch.log_softmax(hidden.double() @ weight.double().T, -1).gather(-1, ids[..., None])[..., 0]
    return hidden, weight, ids, advantages, mask, (logps + 0.4 * torch.randn(4, 6)).float()


def answers(function, inputs, dtype, config, **options):
    hidden, weight, ids, advantages, mask, old = inputs
    hidden, weight = (x.to(dtype).requires_grad_() for x in (hidden, weight))
    wide = torch.promote_types(dtype, torch.float32)
    out = function(hidden, weight, ids, advantages.to(wide), mask, old_logps=old.to(wide), config=config, **options)
    out.loss.backward()
    return {"loss": out.loss.detach(), "d hidden": hidden.grad, "d weight": weight.grad}


def check_loss():
    """At most twice the error of plain PyTorch in the same dtype, both against float64, as in the test suite."""
    floors = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2e-3}
    for loss_type in ("grpo", "dapo", "cispo", "sapo", "gspo"):
        config = GRPOLossConfig(loss_type=loss_type, epsilon_high=2.0 if loss_type == "cispo" else 0.28)
        for dtype, floor in floors.items():
            inputs = problem(dtype)
            exact = answers(reference.grpo_loss, inputs, torch.float64, config)
            plain = answers(reference.grpo_loss, inputs, dtype, config)
            ours = answers(fused_linear_grpo_loss, inputs, dtype, config, backend="cpu")
            for name, truth in exact.items():
                error, budget = ((x[name].double() - truth).norm() for x in (ours, plain))
                where = f"{loss_type} {dtype} {name}: error {error}, of PyTorch {budget}"
                assert truth.norm() > 0 and error <= 2 * budget + floor * truth.norm(), where


def check_command(version):
    command = str(Path(sys.executable).parent / "grpo-kernels")
    assert said(command, "--version") == f"grpo-kernels {version}\n"
    for question in ([command, "--help"], [sys.executable, "-m", "grpo_kernels", "--help"]):
        assert all(name in said(*question) for name in ("train", "plan", "bench", "doctor")), question
    report = said(command, "doctor")
    for key, value in (("grpo-kernels", version), ("cpu", "usable"), ("state", "loaded"), ("in use", native.isa())):
        assert re.search(rf"^  {key} +{re.escape(value)}$", report, re.M), f"{key} is not {value} in\n{report}"


def main(version, checkout):
    assert "PYTHONPATH" not in os.environ
    check_place(version, checkout)
    check_extension()
    check_loss()
    check_command(version)
    print(f"grpo-kernels {version}: the {native.isa()} kernels, loss, gradients and command line are as they should be")


if __name__ == "__main__":
    main(*sys.argv[1:])
