"""`decide`: within a minute, what a GPU says of the plan that was made without it. `plan`: what the planner learns from that.

Seconds of `decide` on an H200, by count (790 TFLOP/s of bf16, 4.3 TB/s, 55 TFLOP/s of float64, 2 ms ahead of each timing): imports
and the context 8, rates 2, products of D 4096 2, log-probs 3 with Triton's compiler, dense 9 (for the floor 24 ways of 60 ms, 31
TFLOP of float64, a compiled kernel, 7 rounds of 90 ms), frozen head, log-probs and two phases 9: all of D 4096 within 33. Then
D 2048 and 896, with 19 and 21 products beside 11, in 17.
"""

import statistics
from dataclasses import replace
from unittest import mock

import torch

from benchmarks.gpu import fit, peer_shims
from grpo_kernels import devices
from grpo_kernels.bench.measure import Effort, measure
from grpo_kernels.bench.peers import Absent
from grpo_kernels.bench.problem import make_problem
from grpo_kernels.bench.providers import OURS, PRODUCTS, PROVIDERS
from grpo_kernels.bench.shapes import TINY
from grpo_kernels.bench.workloads import WORKLOADS
from grpo_kernels.engine import chunks, cost, plan
from grpo_kernels.engine.products import multiply, tile_dtype

from .stage import read

PATHS = ("dense", "frozen", "logprobs", "sequence")


def run(stage):
    rates(stage)
    for depth in stage.depths:
        products(stage, depth)
        with stage.attempt("error", stage.ours, f"log-probs, D {depth}"):
            log_probs(stage, depth)
        paths(stage, depth, PATHS, stage.ours)


def rates(stage):
    """What shows a constant of the cost model alone."""
    n, one, l2 = 32 if stage.tiny else 4096, torch.zeros(1, device=stage.clock.device), plan.device_of(stage.clock.device).l2
    stage.copy()
    stage.rate("cube float32", torch.mm, 2 * n**3, *torch.empty(2, n, n, device=one.device).normal_())
    n *= 2
    stage.rate("cube bfloat16", torch.mm, 2 * n**3, *torch.empty(2, n, n, device=one.device, dtype=torch.bfloat16).normal_())
    stage.rate("launch", lambda: [one.add_(1) for _ in range(100)], 100)  # so few that the host is ahead
    for path, share in fit.SHARES.items():  # of kernels, whose launch costs what was found above
        a, b = torch.empty(2, int(share * l2) // 8, device=one.device).normal_()
        stage.rate(path, lambda a, b: [torch.neg(a, out=b) for _ in range(20)], 20 * 8 * len(a), a, b)


def asked(stage, name, depth):
    """What a call of this workload asks of the planner."""
    w, like = WORKLOADS[name], torch.empty(0, dtype=torch.bfloat16, device=stage.clock.device)
    live, tile_size = stage.shape.tokens * w.gradients, tile_dtype(like, stage.backends[0]).itemsize
    return plan.Problem(
        live, stage.shape.tokens - live, stage.shape.vocab, depth, 2, tile_size, w.gradients, w.gradients and w.trains_head,
        plan.default_budget(like.device.type), w.level == "sequence", device=plan.device_of(like.device),
    )  # fmt: skip


def products(stage, depth):
    """A row for each product of the plan; ``ways``: seconds by output, measured and predicted; * marks the plan's own."""
    device, found = plan.device_of(stage.clock.device), {}
    for *product, way in (made for name in PATHS for made in fit.products_of(asked(stage, name, depth))):
        found.setdefault(tuple(product), set()).add(way)
    for (what, m, n, k), planned in found.items():
        about, ways, cells = ("product", what, f"D {depth}", {"m": m, "n": n, "k": k}), {}, []
        with stage.attempt(*about):
            for way, s in time_product(stage, what, m, n, k):
                ways[way] = s, predicted = s, cost.seconds(*fit.product(device, what, m, n, k, way))
                cells.append(f"{way}{'*' * (way in planned)} {2e-12 * m * n * k / s:.0f} {s / predicted:.2f}")
            says = f"{', '.join(cells)} TFLOP/s, x predicted"
            stage.row(*about, [ways[min(planned)][0]], ways=ways, planned=sorted(planned), says=says)


def time_product(stage, what, m, n, k):
    """(way, seconds) of m x n x k as the engine lays it out: logits walk over the head, rows of logits and dz are padded."""
    vocab, device = stage.shape.vocab, stage.clock.device
    normal = lambda *size: torch.empty(size, dtype=torch.bfloat16, device=device).normal_()  # noqa: E731
    dz = lambda rows, columns: normal(rows, chunks.padded(columns, 2))[:, :columns]  # noqa: E731
    if what == "logits":
        head = normal(vocab, k)
        a, bs = normal(m, k), [head[c : c + n].T for c in range(0, vocab - n + 1, n)]
    else:
        a, bs = dz(m, k) if what == "dH" else dz(k, m).T, [normal(k, n)]
    for way, (size, adds) in fit.WAYS.items():
        stride, dtype = chunks.padded(n, 2) if what == "logits" else n, torch.float32 if size == 4 else a.dtype
        out = torch.zeros(m, stride, dtype=dtype, device=device)[:, :n]
        yield way, statistics.median(stage.timed(lambda: [multiply(a, b, out, adds) for b in bs])) / len(bs)  # noqa: B023


@torch.no_grad()
def log_probs(stage, depth):
    """The promise of docs/precision.md: an rms error of at most 1.1 times the bare product's, in blocks like ours, and 5e-7."""
    p = make_problem(replace(stage.shape, depth=depth, length=128), WORKLOADS["logprobs"], device=stage.clock.device)
    rows, ids, chosen = p.hidden.flatten(0, 1), p.ids.view(-1, 1), plan.plan(asked(stage, "logprobs", depth))
    exact = rows.double() @ p.weight.double().T
    z = torch.empty(exact.shape, dtype=tile_dtype(p.weight, stage.backends[0]), device=rows.device)
    for h, some in zip(rows.split(chosen.score_rows), z.split(chosen.score_rows), strict=True):
        for head, tile in zip(p.weight.split(chosen.score_columns), some.split(chosen.score_columns, 1), strict=True):
            multiply(h, head.T, tile)
    truth, bare = (x.double().log_softmax(1).gather(1, ids).flatten() for x in (exact, z))
    drawn, found = exact.gather(1, ids), {}
    for name, logps in (("ours", PROVIDERS[stage.ours].make(p)().logps.flatten()), ("product", bare)):
        off = (logps - truth).abs()
        found |= {f"{name} rms": off.square().mean().sqrt().item(), f"{name} max": off.max().item()}
    found["shrunk"] = (((drawn - z.gather(1, ids)) * drawn.sign()).sum() / drawn.abs().sum()).item()
    says = "rms {ours rms:.1e}, of the product {product rms:.1e}, shrunk by {shrunk:.1e}".format(**found)
    status = "ok" if found["ours rms"] <= 1.1 * found["product rms"] + 5e-7 else "wrong"
    stage.row("error", stage.ours, f"log-probs, D {depth}", status=status, note=says, says=says, **found)


def paths(stage, depth, names, *providers, beside=""):
    """Rows of `grpo-kernels bench`, ours beside what the plan had predicted; ``beside`` tells those of several processes apart."""
    shape, shared, chosen = replace(stage.shape, depth=depth), [], [PROVIDERS[name] for name in (PRODUCTS, *providers)]
    for name in names:
        effort = Effort(rounds=2 if stage.tiny else 7, memory=False, until=stage.deadline - 2)
        for row in measure(shape, WORKLOADS[name], chosen, stage.clock, effort, print, shared):
            if row["provider"].startswith(OURS) and row["status"] == "ok":
                ms = plan.predict(asked(stage, name, depth)).predicted_ms
                row |= {"predicted": ms * 1e-3, "note": f"{ms:.1f} ms predicted"}
            stage.add(row | {"path": name + beside})
        stage.clock.recover()


def peer(stage):
    name = stage.options.stage.partition(":")[2]
    peer_shims.install(name)
    try:
        PROVIDERS[name].make(make_problem(TINY, WORKLOADS["dense"], device=stage.clock.device))
    except Absent as why:
        return str(why)
    paths(stage, stage.depths[0], ("dense",), OURS, name, beside=f" beside {name}")


def tune(stage):
    """`plan`: constants from `decide`'s record or, without one, from rates and products taken here; then heights."""
    measured = lambda rows, kind: [r for r in rows if r.get("kind") == kind and r["status"] == "ok"]  # noqa: E731
    rows = stage.kept(str(stage.file).replace("-plan.json", "-decide.json"))
    if not measured(rows, "rate") or not measured(rows, "product"):
        rates(stage)
        for depth in stage.depths:
            products(stage, depth)
        rows = read(stage.file)
    good = measured(rows, "product")
    known = [((r["provider"], *r["shape"].values(), way), s) for r in good for way, (s, _) in r["ways"].items()]
    sheet = cost.data_sheet(stage.clock.device)
    found = fit.fit(sheet, {r["path"]: r["rate"] for r in measured(rows, "rate")}, known)
    steps = [(*of, s, *(cost.seconds(*fit.product(device, *of)) for device in (sheet, found))) for of, s in known]
    off = [statistics.median(abs(step[i] / step[-3] - 1) for step in steps) for i in (-2, -1)]
    constants = {key: getattr(found, key) for key in devices.CONSTANTS}
    says = f"products off by {off[0]:.0%}, now {off[1]:.0%}: {', '.join(f'{key} {x:.3g}' for key, x in constants.items())}"
    status = "ok" if stage.tiny or fit.inside(sheet, found) else "wrong"  # which is not adopted
    more = {"constants": constants, "steps": steps, "off": off, "says": says}
    stage.row("device", rows[0]["device"], "constants", status=status, note=says, **more)
    for depth in stage.depths:
        heights(stage, depth, found)


def heights(stage, depth, device):
    """`dense` with chunks and buffers around the planner's choice, which comes first."""
    p = make_problem(replace(stage.shape, depth=depth), WORKLOADS["dense"], device=stage.clock.device)
    call, problem = PROVIDERS[stage.ours].make(p), replace(asked(stage, "dense", depth), device=device)
    chosen = plan.plan(problem)
    around = [(r, chosen.buffer_rows) for r in (chosen.chunk_rows, 128, 256, 384, 512, 768, 1024)]
    for r, R in dict.fromkeys((min(r, R) if problem.wide else R, R) for r, R in (*around, (around[0][0], around[0][1] // 2))):
        tried = replace(chosen, chunk_rows=r, buffer_rows=R, direct=problem.live <= R)
        about = "height", stage.ours, "dense", {"depth": depth, "r": r, "R": R}
        with stage.attempt(*about), mock.patch.object(chunks, "plan", lambda _: tried):  # noqa: B023
            times = stage.timed(call, 3)
            ms = 1e3 * sum(s.count * cost.seconds(problem, s) for s in plan.steps(problem, tried))
            stage.row(*about, times, predicted=ms * 1e-3, says=f"{ms:.1f} ms predicted{' *' * (tried == chosen)}")
