"""`decide`: within a minute, what a GPU says of the plan that was made without it. `plan`: what the planner learns from that.

Seconds on an H200, by count (790 TFLOP/s of bf16, 4.3 TB/s, 55 TFLOP/s of float64, 2 ms for the host to enqueue each timing):

    at  8   imports, the context
       10   rates: a copy, cubes, launches, the L2 cache
       12   the products of the plan at D 4096, as the engine lays them out, with each kind of output
       15   log-probs of 1024 rows against float64; Triton compiles a kernel
       24   dense: the floor's 24 ways of 60 ms, the truth's 31 TFLOP of float64, another kernel, 7 rounds of 90 ms
       33   frozen head, log-probs, two phases: 12 or 24 ways each, one more truth, two kernels
       50   products and paths at D 2048, at D 896
"""

import statistics
from dataclasses import replace
from unittest import mock

import torch

from benchmarks import shims
from grpo_kernels import devices
from grpo_kernels.bench.check import errors
from grpo_kernels.bench.measure import Effort, measure
from grpo_kernels.bench.problem import Result, make_problem, truth
from grpo_kernels.bench.providers import OURS, PRODUCTS, PROVIDERS
from grpo_kernels.bench.workloads import WORKLOADS
from grpo_kernels.engine import chunks, cost, fit, plan
from grpo_kernels.engine.operands import Work, problem_of
from grpo_kernels.engine.products import multiply, tile_dtype
from grpo_kernels.losses.config import LogitTransform

from .stage import read

PATHS = ("dense", "frozen", "logprobs", "sequence")
WAYS = {"bf16": (2, False), "float32": (4, False), "sum": (4, True)}  # bytes of an element that is written, or added to
ALLOWED, STEP = 1.1, 2.0**-20  # times the product's own error; the step of a float32 between 8 and 16


def run(stage):
    rates(stage)
    for depth in stage.depths:
        products(stage, depth)
        if depth == stage.depths[0]:
            with stage.attempt("error", stage.ours, "log-probs"):
                log_probs(stage)
        paths(stage, replace(stage.shape, depth=depth), PATHS, stage.ours)


def rates(stage):
    """What shows a constant of the cost model alone."""
    l2, one = asked(stage, "dense", stage.shape).device.l2, torch.zeros(1, device=stage.clock.device)
    copy(stage)
    for dtype, n in ((torch.bfloat16, 8192), (torch.float32, 4096)):
        n = 64 if stage.tiny else n
        a = torch.empty(n, n, device=one.device, dtype=dtype).normal_()
        rate(stage, f"cube {str(dtype)[6:]}", lambda: a @ a, 2 * n**3)  # noqa: B023
    rate(stage, "launch", lambda: [one.add_(1) for _ in range(200)], 200)
    for path, share in fit.SHARES.items():  # of kernels, whose launch costs what was found above
        a, b = torch.empty(2, int(share * l2) // 8, device=one.device).normal_()
        rate(stage, path, lambda: [torch.neg(a, out=b) for _ in range(20)], 20 * 8 * len(a))  # noqa: B023


def copy(stage):
    """Bytes read and written a second."""
    a, b = torch.empty(2, 2**17 if stage.tiny else 2**28, device=stage.clock.device).normal_()
    return rate(stage, "copy", lambda: b.copy_(a), 8 * len(a))


def rate(stage, path, call, amount):
    times = timed(stage.clock, call)
    stage.row("rate", "device", path, None, times, rate=amount / min(times), says=f"{amount / min(times):.3g} a second")
    return amount / min(times)


def timed(clock, call, rounds=5):
    """Seconds of a call without the host's, behind a first one."""
    call()
    return [clock.seconds(call, ahead=True) for _ in range(rounds)]


def asked(stage, name, shape):
    """What a call of this workload asks of the planner."""
    w, device = WORKLOADS[name], stage.clock.device
    weight = torch.empty((), dtype=torch.bfloat16, device=device).expand(shape.vocab, shape.depth)
    needs = (w.gradients, w.gradients and w.trains_head, False, False, False)
    work = Work(LogitTransform(), stage.backends[0], plan.default_budget(device.type), needs)
    live = shape.tokens * w.gradients
    return problem_of(weight, work, live, shape.tokens - live, w.level == "sequence")


def products(stage, depth):
    """A row for each product of the plan; ``ways``: seconds by output, measured and predicted; * marks the plan's own."""
    shape, found = replace(stage.shape, depth=depth), {}
    for problem in (asked(stage, name, shape) for name in PATHS):
        for s in (s for s in plan.steps(problem, plan.plan(problem)) if s.k):
            wide, adds = s.written + s.cached > 2 * s.m * s.n, s.read > 2 * (s.m + s.n) * s.k
            found.setdefault((s.what, s.m, s.n, s.k), set()).add("sum" if adds else "float32" if wide else "bf16")
    for (what, m, n, k), planned in found.items():
        about, ways, cells = ("product", what, f"D {depth}", {"m": m, "n": n, "k": k}), {}, []
        with stage.attempt(*about):
            for way, s in time_product(stage.clock, what, m, n, k, shape.vocab):
                ways[way] = s, predicted = s, cost.seconds(*fit.product(problem.device, what, m, n, k, *WAYS[way]))
                cells.append(f"{way}{'*' * (way in planned)} {2e-12 * m * n * k / s:.0f} {s / predicted:.2f}")
            times = [ways[way][0] for way in planned]
            stage.row(*about, times, ways=ways, planned=sorted(planned), says=f"TFLOP/s, x predicted: {', '.join(cells)}")


def time_product(clock, what, m, n, k, vocab):
    """(way, seconds) of m x n x k as the engine lays it out: logits walk over the head, rows of logits and dz are padded."""
    normal = lambda *size: torch.empty(size, dtype=torch.bfloat16, device=clock.device).normal_()  # noqa: E731
    dz = lambda rows, columns: normal(rows, chunks.padded(columns, 2))[:, :columns]  # noqa: E731
    if what == "logits":
        head = normal(vocab, k)
        a, bs = normal(m, k), [head[c : c + n].T for c in range(0, vocab - n + 1, n)]
    else:
        a, bs = dz(m, k) if what == "dH" else dz(k, m).T, [normal(k, n)]
    for way, (size, adds) in WAYS.items():
        stride, dtype = chunks.padded(n, 2) if what == "logits" else n, torch.float32 if size == 4 else a.dtype
        out = torch.zeros(m, stride, dtype=dtype, device=clock.device)[:, :n]
        yield way, statistics.median(timed(clock, lambda: [multiply(a, b, out, adds) for b in bs])) / len(bs)  # noqa: B023


@torch.no_grad()
def log_probs(stage):
    """Ours may be off by 1.1 times what one product of the same rows is off whose logits are then scored in float64."""
    p = make_problem(replace(stage.shape, length=1024 // stage.shape.sequences), WORKLOADS["logprobs"], device=stage.clock.device)
    rows, exact = p.hidden.flatten(0, 1), truth(p)
    z = torch.empty(len(rows), p.shape.vocab, dtype=tile_dtype(p.weight, stage.backends[0]), device=rows.device)
    multiply(rows, p.weight.T, z)
    product = Result(logps=z.double().log_softmax(1).gather(1, p.ids.view(-1, 1)).view(p.ids.shape).float())
    ours, bare = (errors(result, exact) for result in (PROVIDERS[stage.ours].make(p)(), product))
    good = all(ours[how] <= ALLOWED * bare[how] + STEP for how in bare)
    says = ", ".join(f"{how} {ours[how]:.1e}, of the product {bare[how]:.1e}" for how in bare)
    stage.row("error", stage.ours, "log-probs", status="ok" if good else "wrong", note=says, says=says, ours=ours, product=bare)


def paths(stage, shape, names, *providers):
    """Rows of `grpo-kernels bench`; ours beside what the plan had predicted."""
    shared, chosen = [], [PROVIDERS[name] for name in (PRODUCTS, *providers)]
    for name in names:
        effort = Effort(rounds=2 if stage.tiny else 7, memory=False, until=stage.deadline - 5)
        for row in measure(shape, WORKLOADS[name], chosen, stage.clock, effort, print, shared):
            if row["provider"].startswith(OURS) and row["status"] == "ok":
                row["predicted"] = plan.predict(asked(stage, name, shape)).predicted_ms * 1e-3
                row["note"] = f"{row['predicted'] * 1e3:.1f} ms predicted"
            stage.add(row)
        stage.clock.recover()


def peer(stage):
    shims.install()
    paths(stage, stage.shape, ("dense", "frozen", "logprobs"), OURS, stage.options.provider)


def tune(stage):
    """`plan`: constants from `decide`'s record or, without one, from rates and products taken here; then heights."""
    rows = read(str(stage.file).replace("-plan.json", "-decide.json"))
    if not {"rate", "product"} <= {r.get("kind") for r in rows}:
        rates(stage)
        for depth in stage.depths:
            products(stage, depth)
        rows = read(stage.file)
    good = [r for r in rows if r.get("kind") == "product" and r["status"] == "ok"]
    timed = [((r["provider"], *r["shape"].values(), *WAYS[way]), s) for r in good for way, (s, _) in r["ways"].items()]
    sheet = asked(stage, "dense", stage.shape).device
    found = fit.fit(sheet, {r["path"]: r["rate"] for r in rows if r.get("kind") == "rate"}, timed)
    steps = [(*of, s, *(cost.seconds(*fit.product(device, *of)) for device in (sheet, found))) for of, s in timed]
    off = [statistics.median(abs(step[i] / step[-3] - 1) for step in steps) for i in (-2, -1)]
    constants = {key: getattr(found, key) for key in devices.CONSTANTS}
    says = f"products off by {off[0]:.0%}, now {off[1]:.0%}: {', '.join(f'{key} {x:.3g}' for key, x in constants.items())}"
    stage.row("device", rows[0]["device"], "constants", constants=constants, steps=steps, off=off, says=says)
    if stage.options.device == "cuda":
        devices.adopt(read(stage.file))
    for depth in stage.depths:
        heights(stage, replace(stage.shape, depth=depth), found)


def heights(stage, shape, device):
    """`dense` with chunks and buffers around the planner's choice, which comes first."""
    problem = asked(stage, "dense", shape)
    call = PROVIDERS[stage.ours].make(make_problem(shape, WORKLOADS["dense"], device=stage.clock.device))
    chosen = plan.plan(problem)
    around = [(r, chosen.buffer_rows) for r in (chosen.chunk_rows, 128, 256, 384, 512, 768, 1024)]
    for r, R in dict.fromkeys([*around, (chosen.chunk_rows, chosen.buffer_rows // 2)]):
        tried = replace(chosen, chunk_rows=min(r, R) if problem.wide else R, buffer_rows=R, direct=problem.live <= R)
        about = "height", stage.ours, "dense", {"depth": shape.depth, "r": tried.chunk_rows, "R": R}
        with stage.attempt(*about), mock.patch.object(chunks, "plan", lambda _: tried):  # noqa: B023
            times = timed(stage.clock, call, 3)
            ms = 1e3 * sum(s.count * cost.seconds(replace(problem, device=device), s) for s in plan.steps(problem, tried))
            stage.row(*about, times, predicted=ms * 1e-3, says=f"{ms:.1f} ms predicted{' *' * (tried == chosen)}")
