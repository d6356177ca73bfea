"""Draws docs/design/*.svg, the pictures of docs/design.md, from the package's own planner.

    python -m docs.design_pictures

passes    what each kind of call runs, in order, and its operations: the steps of `engine.plan.steps`, added up
heights   which rows are in memory together: the heights of `engine.plan.plan`
peak      what a call holds at its peak: the terms of the formula in `engine/plan.py`, whose sum is `engine.plan.peak_bytes`
"""

from dataclasses import dataclass
from pathlib import Path

from grpo_kernels.engine.plan import DEFAULT_GPU_WORKSPACE_BYTES, DEFAULT_WORKSPACE_BYTES, DEVICES, Problem, peak_bytes, plan, steps

FOLDER = Path(__file__).parent / "design"
INK, GREY, LINE, PAPER = "#222222", "#666666", "#bbbbbb", "#ffffff"
BLUE, ORANGE, GREEN, SILVER, VIOLET = "#cfe2f5", "#fbdcb8", "#d3ecd0", "#ececec", "#e3d7f1"
V, D, GIB = 151_936, 4096, 2**30


def problem(tokens, device="h200", **more):
    """One pass over all tokens of a bf16 call, unless told otherwise."""
    on_cpu = device == "cpu"
    asked = dict(
        live=tokens, dead=0, vocab=V, depth=896 if on_cpu else D, element_size=2, tile_size=2 if on_cpu else 4, needs_hidden=True,
        needs_weight=True, budget=DEFAULT_WORKSPACE_BYTES if on_cpu else DEFAULT_GPU_WORKSPACE_BYTES, device=DEVICES[device],
    )  # fmt: skip
    return Problem(**(asked | more))


# ---- drawing ----


class Picture:
    def __init__(self, width, height, title):
        self.width, self.height, self.title, self.parts = width, height, title, []

    def rectangle(self, x, y, width, height, fill, stroke=GREY, dash=""):
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}" stroke="{stroke}"{dashed}/>'
        )

    def line(self, x1, y1, x2, y2, dash="", stroke=GREY):
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" fill="none" stroke="{stroke}"{dashed}/>')

    def text(self, x, y, words, size=12, colour=INK, anchor="start", weight="normal"):
        words = words.replace("&", "&amp;").replace("<", "&lt;")
        bold = ' font-weight="bold"' if weight == "bold" else ""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}" text-anchor="{anchor}"{bold}>{words}</text>'
        )

    def svg(self):
        size = f'width="{self.width}" height="{self.height}" viewBox="0 0 {self.width} {self.height}"'
        paper = f'<rect width="{self.width}" height="{self.height}" fill="{PAPER}"/>'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" font-family="Helvetica, Arial, sans-serif">'
        return "\n".join([head, f"<title>{self.title}</title>", paper, *self.parts, "</svg>", ""])


# ---- what each kind of call runs ----

PRODUCTS = {"logits": "z = h Wᵀ", "teacher logits": "y = h' W'ᵀ", "dH": "dH = dz W", "dW": "dW = dzᵀ h"}
KERNELS = {"policy": "row kernel: dz", "divergence": "row kernel: dz", "statistics": "statistics", "gradient": "gradient: dz"}
OVER_PAIRS = {
    "pair logits": "z of pairs",
    "statistics": "statistics",
    "gradient": "gradient: dz",
    "dH": "dH of pairs",
    "dW": "dW of pairs",
}


@dataclass(frozen=True)
class Call:
    name: str
    about: str
    problem: Problem
    backward: str = ""  # the step with which the backward begins; none: the forward makes all gradients
    stash: str = ""  # what the kernel before the backward leaves
    end: str = "gradients x d loss"  # what the backward does beyond the steps


N = 8192
CALLS = (
    Call("log-probs", "no gradient", problem(0, dead=N, needs_hidden=False, needs_weight=False), end=""),
    Call("one pass", "each row by itself", problem(N)),
    Call("two phases", "all rows stashed", problem(N, two_phases=True), "scale hidden", "stash", ""),
    Call("two phases", "nothing stashed", problem(N, two_phases=True, budget=2**20), "logits", "", ""),
    Call("frozen head", "two phases", problem(N, two_phases=True, needs_weight=False), end="dH = g u"),
    Call("two heads", "teacher of depth D'", problem(N, teacher_depth=D, teacher_size=2)),
    Call("supports", "K tokens a position", problem(N, two_phases=True, pairs=8 * N), "gradient", "", ""),
)


def order(call):
    """(forward, backward): names of the steps that are drawn, in order, each once a phase."""
    known = OVER_PAIRS if call.problem.pairs else PRODUCTS | KERNELS
    asked, found = call.problem, steps(call.problem, plan(call.problem))
    names = [step.what for step in found]
    if call.backward == "scale hidden":
        at = names.index(call.backward)
    elif call.backward == "logits":  # what is scored comes first, and has statistics alone
        at = len(names) - 1 - names[::-1].index("statistics") + 1
    else:
        at = names.index(call.backward) if call.backward else len(names)
    twice = sum(step.what == "logits" and 2 * step.count * step.m * step.n for step in found) == 4 * N * asked.vocab
    forward, backward = (list(dict.fromkeys(name for name in part if name in known)) for part in (names[:at], names[at:]))
    if call.stash:  # the stash is what the gradient kernel leaves: onehot - p
        forward = [name if name != "gradient" else "stash" for name in forward]
    if asked.two_phases and not asked.needs_weight and not asked.pairs:
        forward = ["logits", "unit", "u"]
    # equal steps of both phases are counted together
    return forward, ["logits"] * twice + backward


def work(asked):
    """{depth: operations of the products, in units of N V depth}."""
    found = {}
    for step in steps(asked, plan(asked)):
        if step.k:
            depth = "NVD'" if step.what == "teacher logits" else "NVD"
            found[depth] = found.get(depth, 0) + 2 * step.count * step.m * step.n * step.k / (N * asked.vocab * asked.depth)
    return " + ".join(f"{round(amount, 6):g}{depth}" for depth, amount in sorted(found.items()))


def passes():
    top, row, left, box, gap, height = 46, 50, 160, 110, 8, 28
    width = left + 6 * (box + gap) + 70 + 120
    drawn = Picture(width, top + row * len(CALLS) + 40, "What each kind of call runs")
    words = {**PRODUCTS, **KERNELS, "stash": "stash onehot - p", "unit": "onehot - p", "u": "u = (onehot - p) W"}
    drawn.text(12, 26, "call", weight="bold")
    drawn.text(left, 26, "in order, from left to right", weight="bold")
    drawn.text(width - 12, 26, "products", anchor="end", weight="bold")
    for i, call in enumerate(CALLS):
        y = top + i * row
        drawn.line(12, y - 8, width - 12, y - 8, stroke=LINE)
        drawn.text(12, y + 12, call.name, 13, weight="bold")
        drawn.text(12, y + 28, call.about, 11, GREY)
        x, (forward, backward) = left, order(call)
        boxes = [(name, name in PRODUCTS or name == "u") for name in forward]
        boxes += [("|", False)] * bool(backward or call.end) + [(name, name in PRODUCTS) for name in backward]
        boxes += [(call.end, False)] * bool(call.end)
        for name, product in boxes:
            if name == "|":
                label = "your loss" if call.problem.two_phases else "backward"
                drawn.line(x + 2, y - 4, x + 2, y + height + 4, dash="3 3")
                drawn.text(x + 8, y + 18, label, 11, GREY)
                x += 62 + gap
                continue
            label = OVER_PAIRS[name] if call.problem.pairs else words.get(name, name)
            fill = GREEN if call.problem.pairs and "pair" in label else BLUE if product and not call.problem.pairs else ORANGE
            drawn.rectangle(x, y, box, height, SILVER if name == call.end else fill)
            drawn.text(x + box / 2, y + 18, label, 11, anchor="middle")
            x += box + gap
        drawn.text(width - 12, y + 18, work(call.problem) or "none", 13, anchor="end", weight="bold")
    y = top + len(CALLS) * row + 4
    drawn.line(12, y - 12, width - 12, y - 12, stroke=LINE)
    key = (
        (BLUE, "matrix product"),
        (ORANGE, "row kernel over logits"),
        (GREEN, "kernel over pairs"),
        (SILVER, "over vectors or gradients"),
    )
    for i, (fill, words) in enumerate(key):
        drawn.rectangle(left + i * 190, y, 18, 14, fill)
        drawn.text(left + i * 190 + 25, y + 12, words, 11, GREY)
    return drawn.svg()


# ---- which rows are in memory together ----

CUTS = (
    ("H200, 8,192 tokens", problem(8192)),
    ("H200, 16,384 tokens", problem(16_384)),
    ("H200, 8,192 tokens, frozen head", problem(8192, needs_weight=False)),
    ("CPU, 4,096 tokens, D 896", problem(4096, "cpu")),
)


def heights():
    left, step, top, tall, wide = 24, 256, 58, 250, 96
    drawn = Picture(left + step * len(CUTS), top + tall + 104, "Two heights: chunk and buffer")
    for i, (title, asked) in enumerate(CUTS):
        found, x = plan(asked), left + i * step
        n, R, r = asked.live, found.buffer_rows, found.chunk_rows
        scale = tall / n
        drawn.text(x, 24, title, 12, weight="bold")
        drawn.text(x, 42, f"kept rows: {n:,}, drawn to scale", 11, GREY)
        drawn.rectangle(x, top, wide, tall, PAPER, LINE)
        for start in range(0, n, R):
            drawn.rectangle(
                x,
                top + start * scale,
                wide,
                min(R, n - start) * scale,
                BLUE if start == 0 else PAPER,
                GREY,
                "" if start == 0 else "4 3",
            )
        for start in range(0, min(R, n), r):
            drawn.line(x, top + start * scale, x + wide, top + start * scale, stroke="#8fb4dc")
        first = min(r, n) * scale
        drawn.rectangle(x, top, wide, first, ORANGE)
        side, same = x + wide + 8, not asked.wide  # logits in the dtype of dz are overwritten by it
        drawn.text(side, top + max(first / 2, 4) + 4, f"r = {'R = ' * same}{r:,}", 12, weight="bold")
        if not same:
            drawn.text(side, top + max(min(R, n) * scale / 2, first / 2 + 22) + 4, f"R = {R:,}", 12, weight="bold")
        buffers = -(-n // R)
        y = top + tall + 22
        chunks = -(-min(R, n) // r)
        of_chunks, of_buffers = ("one" if count == 1 else count for count in (chunks, buffers))
        said = [f"{of_chunks} chunk{'s'[: chunks - 1]} a buffer, {of_buffers} buffer{'s'[: buffers - 1]}"]
        if not asked.needs_weight:
            said.append("no dW")
        else:
            said.append("dW: one product, in bf16" if found.direct else "dW: summed in float32")
        buffer = _gib(_buffer(asked, R))
        said.append(f"the chunk is the buffer: {buffer}" if same else f"chunk {_gib(_chunk(asked, r))}, buffer {buffer}")
        for k, words in enumerate(said):
            drawn.text(x, y + 16 * k, words, 11)
    y = top + tall + 82
    key = ((ORANGE, "chunk: r rows of logits, one row kernel"), (BLUE, "buffer: R rows of dz, one product for dW"))
    for i, (fill, words) in enumerate(key):
        drawn.rectangle(left + i * 300, y, 18, 14, fill)
        drawn.text(left + i * 300 + 25, y + 12, words, 11, GREY)
    return drawn.svg()


def _padded(asked, size):
    unit = 128 // size
    return -(-asked.vocab // unit) * unit


def _chunk(asked, r):
    return r * _padded(asked, asked.tile_size) * asked.tile_size


def _buffer(asked, R):
    return R * _padded(asked, asked.element_size) * asked.element_size


def _gib(size):
    return f"{size / GIB:.2f} GiB"


# ---- what a call holds ----

TOKENS = (1024, 8192, 16_384, 65_536)
TERMS = (
    ("dW", VIOLET),
    ("dH", GREEN),
    ("buffer: dz", BLUE),
    ("rows of h", SILVER),
    ("chunk: logits", ORANGE),
    ("slice of dH", "#f4c7c3"),
)


def terms(asked):
    """{term: bytes} of one pass on a GPU, whose sum is `peak_bytes`."""
    found, e = plan(asked), asked.element_size
    scoring = found.score_group * asked.depth * e + found.score_rows * found.score_columns * asked.tile_size
    sizes = {
        "dW": asked.vocab * asked.depth * (e if found.direct else 4) * asked.needs_weight,
        "dH": asked.live * asked.depth * e,
        "buffer: dz": _buffer(asked, found.buffer_rows),
        "rows of h": found.buffer_rows * asked.depth * e,
        "chunk: logits": _chunk(asked, found.chunk_rows),
        "slice of dH": found.dh_rows * asked.depth * (4 + e),
    }
    total = sum(sizes.values())
    if total != peak_bytes(asked, asked.live) or scoring > total - sizes["dH"]:
        raise AssertionError(f"the formula gives {peak_bytes(asked, asked.live)}, its terms {total}")
    return sizes


def peak():
    calls = [
        (f"{n:,} tokens" + (", frozen head" if frozen else ""), problem(n, needs_weight=not frozen))
        for frozen in (False, True)
        for n in TOKENS
    ]
    left, top, row, bar, width = 196, 62, 34, 20, 920
    most = max(sum(terms(asked).values()) for _, asked in calls)
    scale = (width - left - 190) / most
    drawn = Picture(width, top + row * len(calls) + 62, "What a call holds at its peak")
    drawn.text(
        12,
        24,
        f"H200, bf16, D {D:,}, V {V:,}, one pass, workspace {DEFAULT_GPU_WORKSPACE_BYTES / 2**20:,.0f} MiB",
        12,
        weight="bold",
    )
    drawn.text(width - 12, 46, "one copy of the logits, bf16", 11, GREY, "end")
    drawn.text(left, 46, "peak above the inputs", 11, GREY)
    for i, (title, asked) in enumerate(calls):
        y, x, sizes = top + i * row, left, terms(asked)
        drawn.text(12, y + 15, title, 12)
        for name, fill in TERMS:
            drawn.rectangle(x, y, sizes[name] * scale, bar, fill)
            x += sizes[name] * scale
        drawn.text(x + 8, y + 15, _gib(sum(sizes.values())), 12, weight="bold")
        drawn.text(width - 12, y + 15, _gib(asked.live * V * 2), 12, GREY, "end")
    y = top + row * len(calls) + 14
    for i, (name, fill) in enumerate(TERMS):
        drawn.rectangle(left + i * 118, y, 18, 14, fill)
        drawn.text(left + i * 118 + 24, y + 12, name, 11, GREY)
    budget, summed = (_gib(size) for size in (DEFAULT_GPU_WORKSPACE_BYTES, 4 * V * D))
    drawn.text(
        left, y + 38, f"bound: dH + workspace of {budget} + float32 dW of {summed}; with a frozen head dH + workspace", 11, GREY
    )
    return drawn.svg()


def pictures():
    """Name -> SVG."""
    return {"passes": passes(), "heights": heights(), "peak": peak()}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in pictures().items():
        (FOLDER / f"{name}.svg").write_text(text)
