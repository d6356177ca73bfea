"""A run as one picture: reward, entropy, KL and clip fraction over the optimiser steps."""

import json
from pathlib import Path
from statistics import median

from ..extras import needs

PANELS = (
    ("reward", "reward", "mean over the rollout"),
    ("entropy", "entropy", "nats per token"),
    ("kl", "KL to the reference", "nats per token"),
    ("clip_ratio/region_mean", "clipped tokens", "share"),
)
_INK, _GRID, _RAW, _SMOOTH, _POINTS = "#333333", "#e6e6e6", "#b9cfe6", "#1f5fa8", "#d1662a"


def plot_folder(folder, file=None) -> str:
    """Draw the run in ``folder`` from its trainer_state.json, or from that of its last checkpoint; returns the picture's path.

    Raises:
        ValueError: there is no such file, or nothing was logged.
    """
    folder = Path(folder)
    states = [path for path in (folder / "trainer_state.json", *folder.glob("checkpoint-*/trainer_state.json")) if path.is_file()]
    if not states:
        raise ValueError(f"{folder}: wanted the folder of a run; neither it nor a checkpoint in it has a trainer_state.json")
    path = max(states, key=lambda path: path.stat().st_mtime)
    try:
        history = json.loads(path.read_text())["log_history"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error
    if not any("reward" in entry for entry in history):
        raise ValueError(f"{path}: nothing was logged yet")
    picture = str(file or folder / "training.png")
    last = [entry for entry in history if "reward" in entry][-1]
    plot_run(history, picture, f"{folder.resolve().name}: reward {last['reward']:.3g} at step {last['step']}")
    return picture


def plot_run(log_history, path, title="", greedy=None):
    """Write the PNG ``path`` from ``trainer.state.log_history``.

    Args:
        greedy: [(step, held-out accuracy)] to draw beside the reward, or None.
    """
    with needs("bench", "the picture of a run"):
        import matplotlib
        from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.4), layout="constrained")
    with matplotlib.rc_context({"font.size": 10.5, "axes.edgecolor": "#999999", "text.color": _INK}):
        axes = figure.subplots(2, 2, sharex=True)
        for axis, (key, name, unit) in zip(axes.flat, PANELS, strict=True):
            points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
            axis.set_title(name, loc="left", fontweight="bold", color=_INK)
            axis.set_ylabel(unit, color=_INK)
            axis.grid(color=_GRID, linewidth=0.8)
            axis.set_axisbelow(True)
            axis.spines[["top", "right"]].set_visible(False)
            if points:
                steps, values = zip(*points, strict=True)
                smooth = moving_median(values, max(len(values) // 10, 1))
                axis.plot(steps, values, color=_RAW, linewidth=1.2, label="each log")
                axis.plot(steps, smooth, color=_SMOOTH, linewidth=2, label="moving median")
                _limit(axis, values)
        if greedy:
            axes[0, 0].plot(*zip(*greedy, strict=True), "o-", color=_POINTS, markersize=4, linewidth=1, label="greedy, held out")
            axes[0, 0].set_ylim(0, 1.05)
        axes[0, 0].legend(loc="lower right", frameon=False)
        for axis in axes[1]:
            axis.set_xlabel("optimiser step", color=_INK)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12.5)
        figure.savefig(path, dpi=130)


def _limit(axis, values):
    axis.set_ylim(0, ceiling(values))
    if (highest := max(values)) > ceiling(values):
        axis.text(0.99, 0.97, f"highest {highest:.3g}", transform=axis.transAxes, ha="right", va="top", color=_INK, fontsize=9)


def ceiling(values):
    """The highest value with some air, unless that is an outlier: k3 is an exponential, so one token that the reference would have
    written can be all one sees of the KL."""
    usual, highest = sorted(values)[int(0.97 * (len(values) - 1))], max(values)
    return (1.5 * usual if highest > 4 * usual else 1.05 * highest) or 1.0


def moving_median(values, width):
    """Median of the last ``width`` values, fewer at the start."""
    return [median(values[max(i - width + 1, 0) : i + 1]) for i in range(len(values))]
