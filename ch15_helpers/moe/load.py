"""How uneven a load is: Gini coefficient, maximum over mean, and what a capacity would drop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ch15_helpers.errors import MoEError


@dataclass(frozen=True)
class LoadStatistics:
    """Loads of experts or of ranks.

    Attributes:
        counts: load of each.
        gini: 0 when all are equal, near 1 when one has everything.
        max_over_mean: how much longer the slowest takes than it would at an even load; 1 is even.
        num_idle: how many have no load.
    """

    counts: tuple[float, ...]
    gini: float
    max_over_mean: float
    num_idle: int

    def overflow(self, capacity: float) -> float:
        """Share of the whole load that lies beyond ``capacity`` of its expert (0 to 1)."""
        total = sum(self.counts)
        over = sum(max(0.0, count - capacity) for count in self.counts)
        return over / total if total else 0.0


def load_statistics(counts: Sequence[float] | np.ndarray) -> LoadStatistics:
    """Statistics of loads [num_experts]; a load of nothing at all counts as even.

    Raises:
        MoEError: no counts, or one that is negative or not finite.
    """
    loads = np.sort(np.asarray(counts, dtype=np.float64))
    if loads.ndim != 1 or not loads.size or not np.isfinite(loads).all() or loads[0] < 0:
        raise MoEError("loads must be a non-empty list of finite numbers that are not negative")
    values = tuple(float(count) for count in counts)
    idle, total, size = int((loads == 0).sum()), float(loads.sum()), loads.size
    if total == 0:
        return LoadStatistics(values, 0.0, 1.0, idle)
    places = np.arange(1, size + 1)
    gini = 2 * float((places * loads).sum()) / (size * total) - (size + 1) / size
    return LoadStatistics(values, gini, float(loads[-1]) * size / total, idle)
