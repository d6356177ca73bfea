"""A run as one page: report.html with its curves, what the model answered before and after, and what the fused loss saved.

The page loads nothing and runs no script; a browser without a network shows it, in the light or the dark of its system.
"""

import math
from html import escape
from typing import NamedTuple

from .plot import PANELS, ceiling, moving_median

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 420, 210, 44, 26, 10  # of a chart; margins of its axes
_STYLE = """
:root { color-scheme: light dark; --ink: #222; --soft: #6b7280; --rule: #e5e7eb; --page: #fff; --raw: #b9cfe6; --line: #1f5fa8;
  --dot: #d1662a; --right: #1a7f4b; --wrong: #b42318 }
@media (prefers-color-scheme: dark) { :root { --ink: #e5e7eb; --soft: #9ca3af; --rule: #374151; --page: #111827; --raw: #2f4a68;
  --line: #6aa5e8; --dot: #f0925a; --right: #5cc48d; --wrong: #f28b82 } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 57rem; margin: 2rem auto;
  padding: 0 1rem }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem } p { margin: .4rem 0 }
.soft { color: var(--soft) }
.headline { font-size: 2.6rem; font-weight: 600; font-variant-numeric: tabular-nums }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem } figure { margin: 0 }
figcaption { font-weight: 600 }
svg { width: 100%; height: auto } svg text { fill: var(--soft); font-size: 11px }
table { border-collapse: collapse } th, td { text-align: left; padding: .25rem 1rem .25rem 0; border-bottom: 1px solid var(--rule) }
td { font-variant-numeric: tabular-nums } .right { color: var(--right) } .wrong { color: var(--wrong) }
code { font-size: .95em; unicode-bidi: isolate }
"""


class Answer(NamedTuple):
    """What the model wrote for a prompt before and after the run, and what was right."""

    prompt: str
    before: str
    after: str
    right: str


def write(path, title, log_history, greedy, answers, savings, options) -> None:
    """Writes the page.

    Args:
        log_history: of ``trainer.state``.
        greedy: [(step, held-out accuracy)], from before the first step to after the last.
        answers: `Answer` of some prompts.
        savings: rows of text, the first of them a head.
        options: (name, value) of the run.
    """
    before, after = greedy[0][1], greedy[-1][1]
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="headline" id="accuracy">{before:.2f} → {after:.2f}</p>',
        '<p class="soft">Share of held-out prompts that the most likely answer solves, before and after.</p>',
        "<h2>The run</h2>",
        '<p class="soft">Over the optimiser steps: light, each log; dark, the moving median; points, held-out accuracy.</p>',
        '<div class="charts">',
        *(_figure(log_history, panel, greedy if panel[0] == "reward" else ()) for panel in PANELS), "</div>",
        "<h2>What it answers</h2>", _answers(answers),
        "<h2>What the fused loss saves</h2>", _table(savings),
        "<h2>Options</h2>", _table([("option", "value"), *((name, repr(value)) for name, value in options)]),
    ]  # fmt: skip
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    with open(path, "w", encoding="utf-8") as page:
        body = "\n".join(parts)
        page.write(f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n')


def _answers(answers):
    def cell(text, right):
        mark, kind = ("✓", "right") if text == right else ("✗", "wrong")
        return f'<td><code>{escape(text)}</code> <span class="{kind}">{mark}</span></td>'

    rows = (f"<tr><td><code>{escape(a.prompt)}</code></td>{cell(a.before, a.right)}{cell(a.after, a.right)}</tr>" for a in answers)
    return "<table><tr><th>prompt</th><th>before</th><th>after</th></tr>" + "".join(rows) + "</table>"


def _table(rows):
    head, *body = [[escape(str(x)) for x in row] for row in rows]
    cells = lambda row, kind: "<tr>" + "".join(f"<{kind}>{x}</{kind}>" for x in row) + "</tr>"  # noqa: E731
    return "<table>" + cells(head, "th") + "".join(cells(row, "td") for row in body) + "</table>"


def _figure(log_history, panel, greedy):
    """A metric over the steps: each log, its moving median, and the accuracies as points."""
    key, name, unit = panel
    points = [(entry["step"], entry[key]) for entry in log_history if math.isfinite(entry.get(key, math.nan))]
    caption = f'<figcaption>{escape(name)} <span class="soft">{escape(unit)}</span></figcaption>'
    if not points:
        return f'<figure>{caption}<p class="soft">was not logged</p></figure>'
    steps, values = zip(*points, strict=True)
    last, top = max([*steps, *(step for step, _ in greedy)]) or 1, 1.0 if greedy else ceiling(values)

    def at(step, value):
        x = _LEFT + (_WIDTH - _LEFT - 8) * step / last
        return f"{x:.1f},{_TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - min(max(value / top, 0.0), 1.0)):.1f}"

    def curve(numbers, colour, width):
        line = " ".join(map(at, steps, numbers))
        return f'<polyline points="{line}" fill="none" stroke="var(--{colour})" stroke-width="{width}"/>'

    marks = [curve(values, "raw", 1.2), curve(moving_median(values, max(len(values) // 10, 1)), "line", 2)]
    for step, value in greedy:
        x, y = at(step, value).split(",")
        hint = f"<title>step {step}: greedy accuracy {value:.2f}</title>"
        marks.append(f'<circle cx="{x}" cy="{y}" r="3.5" fill="var(--dot)">{hint}</circle>')
    return f"<figure>{caption}{_drawing(marks, last, top, f'{name} over {last} steps, at the end {values[-1]:.3g}')}</figure>"


def _drawing(marks, last, top, description):
    axes = []
    for share in (0, 0.5, 1):
        y = _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - share)
        axes.append(f'<line x1="{_LEFT}" x2="{_WIDTH - 8}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--rule)"/>')
        axes.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{share * top:.2g}</text>')
        x = _LEFT + (_WIDTH - _LEFT - 8) * share
        anchor = {0: "start", 0.5: "middle", 1: "end"}[share]
        axes.append(f'<text x="{x:.1f}" y="{_HEIGHT - 8}" text-anchor="{anchor}">{round(share * last)}</text>')
    inside = "".join(axes + marks)
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(description)}">{inside}</svg>'
