"""Distributions that workloads are drawn from: gaps between arrivals, and lengths in tokens.

Everything is drawn from a ``numpy.random.Generator`` that the caller seeds. A gap distribution is
stated by its rate and by its burstiness, the coefficient of variation (CV, standard deviation
over mean): 1 is Poisson; traces of services are above it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class Arrivals(Protocol):
    """An open-loop arrival process: it does not wait for the system under test."""

    def times_s(self, count: int, rng: np.random.Generator) -> Floats:
        """Arrival times of ``count`` requests, not decreasing, the first one gap after 0."""


class Lengths(Protocol):
    """A distribution of token counts."""

    def sample(self, count: int, rng: np.random.Generator) -> Ints:
        """``count`` lengths of at least 1."""


@dataclass(frozen=True)
class Poisson:
    """Independent users: exponential gaps, CV 1."""

    rate_per_s: float

    def __post_init__(self) -> None:
        _positive(self, "rate_per_s")

    def times_s(self, count: int, rng: np.random.Generator) -> Floats:
        """See Arrivals."""
        return np.cumsum(rng.standard_exponential(count)) / self.rate_per_s


@dataclass(frozen=True)
class Gamma:
    """Gamma gaps with a given CV: the usual one-knob model of burstiness (as in vLLM's bench).

    Beyond a CV of about 3 it is a poor model: nearly all gaps become 0. Use Hyperexponential.
    """

    rate_per_s: float
    cv: float

    def __post_init__(self) -> None:
        _positive(self, "rate_per_s", "cv")

    def times_s(self, count: int, rng: np.random.Generator) -> Floats:
        """See Arrivals."""
        shape = self.cv**-2
        return np.cumsum(rng.standard_gamma(shape, count)) / (shape * self.rate_per_s)


@dataclass(frozen=True)
class Hyperexponential:
    """Busy spells and long pauses: a gap is exponential with a short or, rarely, a long mean.

    The three parameters of the mixture are solved from rate, CV (above 1) and the median gap.
    """

    rate_per_s: float
    cv: float
    median_gap_s: float

    def __post_init__(self) -> None:
        _positive(self, "rate_per_s", "cv", "median_gap_s")
        longest = math.log(2) / self.rate_per_s
        if self.cv <= 1 or self.median_gap_s >= longest:
            raise ValueError(
                f"cv must be above 1 and median_gap_s below {longest:.4g} s (that of a Poisson "
                f"process of this rate), got {self.cv} and {self.median_gap_s}"
            )
        self.mixture()

    def mixture(self) -> tuple[float, float, float]:
        """(short mean in s, long mean in s, probability of a long gap).

        Raises:
            ValueError: no mixture of two exponentials has these moments.
        """
        mean = 1 / self.rate_per_s
        second = (1 + self.cv**2) * mean**2 / 2  # short² and long² mixed
        # For a short mean, the two moments give the rest; bisect on the median.
        low, high = 0.0, self.median_gap_s / math.log(2)
        for _ in range(200):
            short = (low + high) / 2
            long = (second - mean * short) / (mean - short)
            chance = (mean - short) / (long - short)
            below = 1 - (1 - chance) * math.exp(-self.median_gap_s / short)
            below -= chance * math.exp(-self.median_gap_s / long)
            low, high = (short, high) if below > 0.5 else (low, short)
        if abs(below - 0.5) > 1e-6:
            raise ValueError(
                f"no mixture of two exponentials has rate {self.rate_per_s}, CV {self.cv} and a "
                f"median gap as small as {self.median_gap_s} s; raise the CV or the median"
            )
        return short, long, chance

    def times_s(self, count: int, rng: np.random.Generator) -> Floats:
        """See Arrivals."""
        short, long, chance = self.mixture()
        means = np.where(rng.random(count) < chance, long, short)
        return np.cumsum(rng.standard_exponential(count) * means)


@dataclass(frozen=True)
class Replay:
    """Recorded times, in seconds from any origin; the first arrival is moved to 0."""

    recorded_s: tuple[float, ...]

    def times_s(self, count: int, rng: np.random.Generator) -> Floats:
        """See Arrivals; there must be enough recorded times."""
        if count > len(self.recorded_s):
            raise ValueError(f"{count} arrivals are wanted, {len(self.recorded_s)} are recorded")
        times = np.asarray(self.recorded_s[:count], dtype=np.float64)
        if np.any(np.diff(times) < 0):
            raise ValueError("the recorded times go backwards; sort them")
        return times - times[0] if count else times


@dataclass(frozen=True)
class Fixed:
    """Always the same length."""

    tokens: int

    def __post_init__(self) -> None:
        _positive(self, "tokens")

    def sample(self, count: int, rng: np.random.Generator) -> Ints:
        """See Lengths."""
        return np.full(count, self.tokens, dtype=np.int64)


@dataclass(frozen=True)
class Uniform:
    """Every length from ``low`` to ``high``, both included, equally often."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high:
            raise ValueError(f"1 <= low <= high must hold, got {self.low} and {self.high}")

    def sample(self, count: int, rng: np.random.Generator) -> Ints:
        """See Lengths."""
        return rng.integers(self.low, self.high, count, dtype=np.int64, endpoint=True)


@dataclass(frozen=True)
class LogNormal:
    """Log-normal lengths, rounded and cut off at ``maximum``.

    ``sigma`` is the standard deviation of the logarithm.
    """

    median: float
    sigma: float
    maximum: int = 2**31

    def __post_init__(self) -> None:
        _positive(self, "median", "maximum")
        if not self.sigma >= 0:
            raise ValueError(f"sigma must not be negative, got {self.sigma}")

    @classmethod
    def from_median_and_mean(cls, median: float, mean: float, maximum: int = 2**31) -> LogNormal:
        """The one with this median and (before rounding and the cut) this mean."""
        if not 0 < median <= mean:
            raise ValueError(f"0 < median <= mean must hold, got {median} and {mean}")
        return cls(median, math.sqrt(2 * math.log(mean / median)), maximum)

    def sample(self, count: int, rng: np.random.Generator) -> Ints:
        """See Lengths."""
        values = self.median * np.exp(self.sigma * rng.standard_normal(count))
        return np.clip(np.rint(values), 1, self.maximum).astype(np.int64)


@dataclass(frozen=True)
class Empirical:
    """Drawn with replacement from recorded lengths."""

    values: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.values or min(self.values) < 1:
            raise ValueError("values must be token counts of at least 1, and not empty")

    def sample(self, count: int, rng: np.random.Generator) -> Ints:
        """See Lengths."""
        return rng.choice(np.asarray(self.values, dtype=np.int64), count)


def gap_cv(times_s: Sequence[float] | Floats) -> float:
    """Coefficient of variation of the gaps between arrivals; NaN with fewer than two gaps."""
    gaps = np.diff(np.asarray(times_s, dtype=np.float64))
    if len(gaps) < 2 or not gaps.mean() > 0:
        return math.nan
    return float(gaps.std() / gaps.mean())


def _positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not value > 0 or not math.isfinite(value):
            raise ValueError(f"{name} must be positive and finite, got {value}")
