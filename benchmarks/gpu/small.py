"""Every public path once, in seconds, at small odd shapes, against the reference in float64: what compute-sanitizer is run over.

    python -m benchmarks.gpu.small [--device cpu]
"""

import argparse
import sys

import torch

from grpo_kernels import GRPOLossConfig, fused_linear_grpo_loss, grpo_loss_from_logits, linear_logprobs, reference

B, T, D, V = 3, 5, 24, 1009  # D a multiple of 8: products of 16-bit matrices want rows on 16 bytes
# below, inside and above the clip range, further from its bounds than bf16 logits can move them
RATIOS = torch.tensor([[1.05, 0.5, 0.95, 1.6, 1.02], [0.97, 1.7, 1.04, 0.93, 0.45], [1.03, 0.96, 0.6, 1.06, 1.5]])
CASES = {
    "one pass": {},
    "one pass, several tiles": {"workspace_bytes": 1},
    "kl": {"config": {"beta": 0.04}},
    "two phases": {"config": {"importance_sampling_level": "sequence"}},
    "two phases, recomputed": {"config": {"importance_sampling_level": "sequence"}, "workspace_bytes": 1},
    "frozen head": {"frozen": True},
    "frozen head, two phases": {"config": {"importance_sampling_level": "sequence"}, "frozen": True},
    "entropy bonus": {"config": {"entropy_coef": 0.01}},
    "entropy bonus, two phases": {"config": {"importance_sampling_level": "sequence", "entropy_coef": 0.01}},
    "softcap": {"config": {"softcap": 3.0, "temperature": 0.7}},
    "softcap, two phases": {"config": {"softcap": 3.0, "importance_sampling_level": "sequence"}},
    "bias": {"bias": True},
    "adapter": {"lora": True},
    "rows without advantage": {"idle": True},
}


def inputs(dtype, device, config=GRPOLossConfig(), bias=False, lora=False, idle=False):  # noqa: B008 - frozen
    g = torch.Generator().manual_seed(0)
    normal = lambda *size: torch.randn(size, generator=g)  # noqa: E731
    tensors = {
        "hidden": 2 * normal(B, T, D).to(dtype),
        "weight": (normal(V, D) / D**0.5).to(dtype),
        "completion_ids": torch.randint(0, V, (B, T), generator=g),
        "advantages": torch.tensor([1.0, -0.7, 0.0 if idle else 0.4]),
        "mask": torch.arange(T) < torch.tensor([[T], [T - 2], [T - 1]]),
        "ref_logps": -7 + 0.1 * normal(B, T),
    }
    if bias:
        tensors["bias"] = normal(V).to(dtype)
    if lora:
        tensors["lora"] = ((normal(3, D) / D**0.5).to(dtype), normal(V, 3).to(dtype), 0.5)
    wide = doubled(tensors)
    with torch.no_grad():
        logits = reference.hidden_to_logits(wide["hidden"], wide["weight"], wide.get("bias"), wide.get("lora"))
        logps = reference.logps_from_logits(logits, tensors["completion_ids"], tensors["mask"], config)[0]
    tensors["old_logps"] = (logps - RATIOS.log()).float()
    return {name: tuple(_to(x, device) for x in value) if name == "lora" else _to(value, device) for name, value in tensors.items()}


def _to(x, device, dtype=None):
    if not isinstance(x, torch.Tensor):
        return x
    return x.to(device, dtype if x.is_floating_point() else None)


def doubled(tensors):
    """The same on the CPU in float64."""
    wide = lambda x: _to(x, "cpu", torch.float64)  # noqa: E731
    return {name: tuple(map(wide, value)) if name == "lora" else wide(value) for name, value in tensors.items()}


def differentiated(function, tensors, frozen, **more):
    """(loss, gradients of hidden and, if it is not frozen, weight), float64 on the CPU."""
    leaves = [tensors["hidden"].detach().requires_grad_(), tensors["weight"].detach().requires_grad_(not frozen)]
    rest = {name: x for name, x in tensors.items() if name not in ("hidden", "weight")}
    out = function(*leaves, **rest, **more)
    out.loss.backward()
    return [x.detach().cpu().double() for x in (out.loss, *(leaf.grad for leaf in leaves if leaf.requires_grad))]


def run(device):
    failed = 0
    for dtype in (torch.bfloat16, torch.float32):
        for name, case in CASES.items():
            config, frozen = GRPOLossConfig(**case.get("config", {})), case.get("frozen", False)
            tensors = inputs(dtype, device, config, **{k: case.get(k, False) for k in ("bias", "lora", "idle")})
            size = case.get("workspace_bytes")
            ours = differentiated(fused_linear_grpo_loss, tensors, frozen, config=config, workspace_bytes=size)
            exact = differentiated(reference.grpo_loss, doubled(tensors), frozen, config=config)
            failed += report(f"{name}, {dtype}", ours, exact, dtype)
        failed += scores(dtype, device) + from_logits(dtype, device)
    return failed


def scores(dtype, device):
    tensors = inputs(dtype, device)
    wide = doubled(tensors)
    with torch.no_grad():
        out = linear_logprobs(*(tensors[k] for k in ("hidden", "weight", "completion_ids")), mask=tensors["mask"])
        logits = reference.hidden_to_logits(wide["hidden"], wide["weight"], None, None)
        exact = reference.logps_from_logits(logits, wide["completion_ids"], wide["mask"], GRPOLossConfig())
    return report(f"log-probs, {dtype}", [x.cpu().double() for x in out], exact, dtype)


def from_logits(dtype, device):
    tensors = inputs(dtype, device)
    logits = (tensors.pop("hidden").float() @ tensors.pop("weight").float().T).to(dtype)

    def differentiate(x, call):
        leaf = x.clone().requires_grad_()
        loss = call(leaf).loss
        loss.backward()
        return [y.detach().cpu().double() for y in (loss, leaf.grad)]

    config = GRPOLossConfig()
    ours = differentiate(logits, lambda z: grpo_loss_from_logits(z * 1, **tensors, config=config))
    rest = doubled(tensors)
    identity = torch.eye(V, dtype=torch.float64)
    exact = differentiate(logits.cpu().double(), lambda z: reference.grpo_loss(z, identity, **rest, config=config))
    return report(f"given logits, {dtype}", ours, exact, dtype)


def report(name, ours, exact, dtype):
    errors = [((a - b).norm() / b.norm()).item() for a, b in zip(ours, exact, strict=True)]
    good = all(error <= (5e-2 if dtype == torch.bfloat16 else 1e-4) for error in errors)
    print("ok   " if good else "WRONG", name, " ".join(f"{error:.1e}" for error in errors), flush=True)
    return not good


def main(argv=None):
    parser = argparse.ArgumentParser(description="Every public path once, at small odd shapes.")
    parser.add_argument("--device", default="cuda")
    failed = run(torch.device(parser.parse_args(argv).device))
    print(f"{failed} of the paths are wrong" if failed else "all paths agree with the reference")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
