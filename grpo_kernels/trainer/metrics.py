"""Metrics between two logs: kept on their device as they come, reduced over time and processes when somebody asks."""

import math
from collections import defaultdict

import torch

_LARGEST = ("sampler_mismatch",)  # whose highest value counts, though their names do not say so
_LENGTH = 256  # values that wait one by one; a run that never logs keeps no more


class Recorded:
    """Weighted values by name since the last `take`. Recording never waits for the device."""

    def __init__(self):
        self._waiting = defaultdict(list)  # name -> (value, weight), scalar tensors
        self._totals = {}  # name -> [4]: sum of weight x value, sum of weights, lowest, highest

    def record(self, metrics, weight):
        """``metrics``: scalar tensors by name, each a mean over ``weight``; nan and weight 0 do not count."""
        for name, value in metrics.items():
            waiting = self._waiting[name]
            value = value.detach().float()
            weight = weight.to(value) if isinstance(weight, torch.Tensor) else value.new_full((), weight)
            waiting.append((value, weight))
            if len(waiting) == _LENGTH:
                self._totals[name] = self._total(name)
                waiting.clear()

    def names(self) -> list[str]:
        return sorted(self._waiting)

    def clear(self):
        self._waiting.clear()
        self._totals.clear()

    def take(self, gather) -> dict[str, float]:
        """Of all processes: means by weight, minima and maxima by name; and begins anew.

        One collective, ``gather`` of [1, metrics, 4], of the same size on every process. What had no weight anywhere has no entry.
        """
        names = self.names()
        if not names:
            return {}
        everywhere = gather(torch.stack([self._total(name) for name in names]).unsqueeze(0))
        self.clear()
        sums, low, high = everywhere[..., :2].sum(0), everywhere[..., 2].amin(0), everywhere[..., 3].amax(0)
        metrics = {}
        figures = torch.stack([*sums.unbind(1), low, high], dim=1).tolist()
        for name, (total, weight, lowest, highest) in zip(names, figures, strict=True):
            if weight > 0:
                kinds = (word for word in ("min", "max") if name.endswith(f"_{word}") or f"completions/{word}_" in name)
                kind = "max" if name in _LARGEST else next(kinds, "mean")
                metrics[name] = {"mean": total / weight, "min": lowest, "max": highest}[kind]
        return metrics

    def _total(self, name):
        rows = [self._totals[name]] if name in self._totals else []
        if self._waiting[name]:
            values, weights = (torch.stack(x) for x in zip(*self._waiting[name], strict=True))
            counts = (weights > 0) & ~values.isnan()
            weights, values = weights.where(counts, 0.0), values.where(counts, 0.0)
            low, high = values.masked_fill(~counts, math.inf).amin(), values.masked_fill(~counts, -math.inf).amax()
            rows.append(torch.stack([(values * weights).sum(), weights.sum(), low, high]))
        rows = torch.stack(rows)
        return torch.cat([rows[:, :2].sum(0), rows[:, 2].amin(0, keepdim=True), rows[:, 3].amax(0, keepdim=True)])
