"""Draws docs/losses/*.svg, the pictures of docs/losses.md: d loss / d ratio of one token by autograd of the objective.

    python docs/loss_pictures.py

The token is alone in its sequence and its call, so that a sequence's ratio is its own; its old probability is 0.2. Blue is an
advantage of 1, orange one of -1. The grey lines are a derivative of 0 and a ratio of 1. A ratio goes from 0 to 4, a derivative from
-2 to 2, and what is beyond is not drawn.
"""

import math
from itertools import pairwise
from pathlib import Path

import torch

from grpo_kernels import GRPOLossConfig, objective
from grpo_kernels.losses.config import LOSS_TYPES
from grpo_kernels.losses.correction import sampler_correction

FOLDER = Path(__file__).parent / "losses"
WIDTH, HEIGHT, POINTS, HIGHEST, LIMIT = 132, 66, 265, 4.0, 2.0
COLOURS = {1.0: "#1f6fb4", -1.0: "#d9730d"}
OLD_PROBABILITY = 0.2  # so that a ratio of 4 is a probability, too
# where the default would draw nothing of interest: dro has none, and dppo's distance is of probabilities
OPTIONS = {"cispo": {"epsilon_high": 2.0}, "dro": {"dro_beta": 1.0}, "kl_cov": {"ppo_kl_coef": 0.5}}
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")  # which are one picture
WEIGHTS = {"truncate": "token_truncate", "mask": "icepop"}


def ratios():
    """[POINTS], none of them 0 or on a bound of the default options."""
    return (torch.arange(POINTS, dtype=torch.float64) + 0.5) * HIGHEST / POINTS


def derivative(loss_type, advantage):
    """[POINTS] of d loss / d ratio; a call a point, for which one token is all there is."""
    old = torch.full((1, 1), math.log(OLD_PROBABILITY), dtype=torch.float64)
    config = GRPOLossConfig(loss_type=loss_type, max_completion_length=1, **OPTIONS.get(loss_type, {}))
    found = []
    for w in ratios():
        logps = (old + w.log()).requires_grad_()
        given = torch.tensor([advantage], dtype=torch.float64), torch.ones(1, 1)
        loss, _ = objective(logps, logps.detach() * 0, *given, old_logps=old, config=config)
        found.append(torch.autograd.grad(loss, logps)[0].item() / w.item())  # d lp / d ratio is 1 / ratio
    return found


def weight(mode):
    """[POINTS] of what a policy term is multiplied by, over the ratio of trainer to sampler."""
    d = ratios().log().unsqueeze(1)
    return sampler_correction(d, d * 0, torch.ones_like(d), GRPOLossConfig(importance_sampling_mode=mode)).flatten().tolist()


def line(values, colour, top, bottom):
    """Path elements of a curve, cut where it jumps or leaves the picture."""
    x = [w * WIDTH / HIGHEST for w in ratios().tolist()]
    y = [(top - value) * HEIGHT / (top - bottom) for value in values]
    parts, current = [], []
    for i, (value, place) in enumerate(zip(values, y, strict=True)):
        step = abs(place - y[i - 1]) if current else 0.0
        jumped = step > HEIGHT / 16 and len(current) > 1 and step > 4 * abs(y[i - 1] - y[i - 2])
        if jumped or not bottom <= value <= top:
            parts.append(current)
            current = []
        if bottom <= value <= top:
            current.append((x[i], place))
    parts.append(current)
    drawn = [thinned(part) for part in parts if len(part) > 1]
    path = "".join("M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in part) for part in drawn)
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>'


def thinned(points):
    """Without points on the straight line between their neighbours."""
    kept = [points[0]]
    for (before, here), (_, after) in zip(pairwise(points), pairwise(points[1:]), strict=False):
        if abs((here[1] - before[1]) - (after[1] - here[1])) > 1e-6:
            kept.append(here)
    return [*kept, points[-1]]


def picture(curves, title, top=LIMIT, bottom=-LIMIT):
    zero, one = top * HEIGHT / (top - bottom), WIDTH / HIGHEST
    lines = "".join(line(values, colour, top, bottom) for colour, values in curves)
    axes = f'<path d="M0 {zero:.1f}H{WIDTH}M{one:.1f} 0V{HEIGHT}" stroke="#999" stroke-width="0.6"/>'
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
            f"<title>{title}</title>{axes}{lines}</svg>\n")  # fmt: skip


def pictures():
    """Name -> SVG."""
    found = {}
    for loss_type in LOSS_TYPES:
        name = "clipped" if loss_type in CLIPPED else loss_type
        if name not in found:
            curves = [(colour, derivative(loss_type, A)) for A, colour in COLOURS.items()]
            found[name] = picture(curves, f"{name}: d loss / d ratio")
    for name, mode in WEIGHTS.items():
        found[name] = picture([("#555", weight(mode))], f"{name}: weight of a token", top=4.0, bottom=-0.4)
    return found


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in pictures().items():
        (FOLDER / f"{name}.svg").write_text(text)
