"""How uneven a load is: Gini coefficient, maximum over mean, and what a capacity would drop.

And how many experts a batch touches, which is what a small batch pays for.
"""

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


def zipf_popularity(num_experts: int, skew: float) -> np.ndarray:
    """Shares in proportion to ``1 / (i + 1) ** skew``, float64 [num_experts]; 0 is uniform."""
    shares = np.arange(1, num_experts + 1, dtype=np.float64) ** -skew
    return np.asarray(shares / shares.sum())


def inclusion_probabilities(popularity: np.ndarray, top_k: int) -> np.ndarray:
    """Probability that a token's ``top_k`` distinct experts include each of them.

    Experts are drawn one after another in proportion to ``popularity``, without repetition, as
    ``SyntheticRouter`` draws them. Rosén's limit (1972): ``1 - exp(-rate * popularity)``, with the
    rate at which they add up to ``top_k``. Exact for a uniform popularity, else within a few
    per cent.

    Raises:
        MoEError: ``top_k`` is not between 1 and the number of experts with any popularity.
    """
    possible = int((popularity > 0).sum())
    if not 1 <= top_k <= possible:
        raise MoEError(f"top_k {top_k} is not between 1 and the {possible} experts to choose from")
    low, high = -10.0, 40.0  # of the rate's logarithm
    for _ in range(60):
        middle = (low + high) / 2
        total = float((1 - np.exp(-np.exp(middle) * popularity)).sum())
        low, high = (middle, high) if total < top_k else (low, middle)
    return np.asarray(1 - np.exp(-np.exp((low + high) / 2) * popularity))


def expected_touched(popularity: np.ndarray, top_k: int, num_tokens: int) -> float:
    """Distinct experts that a batch of independent tokens needs, expected.

    With a uniform popularity it equals ``bench.roofline.expected_experts_touched``.
    """
    absent = (1 - inclusion_probabilities(popularity, top_k)) ** num_tokens
    return float((1 - absent).sum())


@dataclass(frozen=True)
class LoadForecast:
    """What to expect of a batch of independent tokens.

    Attributes:
        touched: distinct experts in use.
        max_over_mean: largest load of an expert over the mean load.
        dropped: share of all pairs beyond the capacity; 0 without one.
    """

    touched: float
    max_over_mean: float
    dropped: float


def forecast_load(
    popularity: np.ndarray, top_k: int, num_tokens: int, capacity: int | None = None
) -> LoadForecast:
    """Expected load of experts that tokens choose as in :func:`inclusion_probabilities`.

    An expert's load is binomial, and experts are taken as independent of each other, which they
    are but for their sum: right within a few per cent where there are more than a few experts.

    Args:
        num_tokens: at least 1. capacity: most pairs of an expert, None drops nothing.
    """
    chance = np.clip(inclusion_probabilities(popularity, top_k), 1e-12, 1 - 1e-12)[:, None]
    log_factorials = np.concatenate([[0.0], np.log(np.arange(1, num_tokens + 1)).cumsum()])
    loads = np.arange(num_tokens + 1)
    log_ways = log_factorials[-1] - log_factorials - log_factorials[::-1]
    log_share = loads * np.log(chance) + (num_tokens - loads) * np.log1p(-chance)
    share = np.exp(log_ways + log_share)  # [experts, loads]
    below = share.cumsum(axis=1).clip(max=1.0)
    largest = float((1 - below.prod(axis=0)).sum())
    pairs = num_tokens * top_k
    over = 0.0
    if capacity is not None:
        over = float((share * np.maximum(0, loads - capacity)).sum()) / pairs
    touched = float((1 - share[:, 0]).sum())
    return LoadForecast(touched, largest * len(popularity) / pairs, over)
