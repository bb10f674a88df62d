"""Fair timing of two or more versions: warm-up, interleaving, medians and intervals.

Versions are run A B A B …, so drift of the machine (clocks, neighbours, temperature) hits all of
them alike. On a GPU a sample is the time between two CUDA events, host gaps included, and
the device is idle when a sample starts. The interval of the ratio is a bootstrap over *rounds*,
because the samples of one round share the machine's state.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ch15_helpers.bench.formatting import format_s
from ch15_helpers.errors import InvalidRequestError

Run = Callable[[], object]
RESAMPLES = 2000


@dataclass(frozen=True)
class Samples:
    """Times of one version, in seconds, in the order in which they were taken."""

    samples_s: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.samples_s:
            raise InvalidRequestError("no samples; expected at least one measured time")

    @property
    def median_s(self) -> float:
        return float(np.median(self.samples_s))

    @property
    def p10_s(self) -> float:
        return float(np.percentile(self.samples_s, 10))

    @property
    def p90_s(self) -> float:
        return float(np.percentile(self.samples_s, 90))

    def __len__(self) -> int:
        return len(self.samples_s)

    def __str__(self) -> str:
        return (
            f"{format_s(self.median_s)} (p10 {format_s(self.p10_s)}, p90 {format_s(self.p90_s)}, "
            f"n={len(self)})"
        )


@dataclass(frozen=True)
class PairTiming:
    """Interleaved times of a baseline and an optimised version.

    Attributes:
        speedup: median of the baseline over median of the optimised version.
        speedup_low, speedup_high: bootstrap interval of that ratio.
        confidence: coverage that the interval aims for, e.g. 0.95.
    """

    baseline: Samples
    optimised: Samples
    speedup: float
    speedup_low: float
    speedup_high: float
    confidence: float

    def __str__(self) -> str:
        return (
            f"{format_s(self.baseline.median_s)} → {format_s(self.optimised.median_s)}: "
            f"{self.speedup:.2f}× ({self.confidence:.0%} interval "
            f"{self.speedup_low:.2f}–{self.speedup_high:.2f}, n={len(self.baseline)})"
        )


def measure_pair(
    baseline: Run,
    optimised: Run,
    *,
    device: str | torch.device = "cpu",
    iterations: int = 10,
    warmup: int = 2,
    reset: Run | None = None,
    seed: int = 0,
    confidence: float = 0.95,
) -> PairTiming:
    """Time two versions of the same work, interleaved A B A B.

    Args:
        baseline, optimised: callables without arguments that do the whole work.
        device: CUDA devices are timed with events, others with the wall clock.
        iterations: timed rounds; each round runs both versions once.
        warmup: untimed rounds before them (compilation, caches, allocator).
        reset: called untimed before every run, e.g. to free a cache or ``flush_l2``.
        seed: of the bootstrap, so that a stored result can be recomputed from its samples.
        confidence: of the interval of the ratio.

    Raises:
        InvalidRequestError: iterations below 1, warmup below 0, confidence outside (0, 1).
    """
    times = interleave(
        {"baseline": baseline, "optimised": optimised},
        device=device,
        iterations=iterations,
        warmup=warmup,
        reset=reset,
    )
    return pair_from_samples(
        times["baseline"], times["optimised"], seed=seed, confidence=confidence
    )


def pair_from_samples(
    baseline: Samples, optimised: Samples, *, seed: int = 0, confidence: float = 0.95
) -> PairTiming:
    """Ratio and interval from times taken elsewhere, e.g. inside distributed workers.

    Samples ``i`` of both must belong to the same round.
    """
    low, high = bootstrap_ratio_interval(
        baseline.samples_s, optimised.samples_s, seed=seed, confidence=confidence
    )
    return PairTiming(
        baseline=baseline,
        optimised=optimised,
        speedup=baseline.median_s / optimised.median_s,
        speedup_low=low,
        speedup_high=high,
        confidence=confidence,
    )


def interleave(
    versions: Mapping[str, Run],
    *,
    device: str | torch.device = "cpu",
    iterations: int = 10,
    warmup: int = 2,
    reset: Run | None = None,
) -> dict[str, Samples]:
    """Time any number of versions, one run of each per round, in the given order."""
    if iterations < 1 or warmup < 0:
        raise InvalidRequestError(
            f"iterations={iterations}, warmup={warmup}; expected iterations ≥ 1 and warmup ≥ 0"
        )
    if not versions:
        raise InvalidRequestError("no versions to time; expected at least one")
    dev = torch.device(device)
    times: dict[str, list[float]] = {name: [] for name in versions}
    for round_ in range(-warmup, iterations):
        for name, run in versions.items():
            if reset is not None:
                reset()
            elapsed_s = time_once_s(run, dev)
            if round_ >= 0:
                times[name].append(elapsed_s)
    return {name: Samples(tuple(values)) for name, values in times.items()}


def measure(
    run: Run,
    *,
    device: str | torch.device = "cpu",
    iterations: int = 10,
    warmup: int = 2,
    reset: Run | None = None,
) -> Samples:
    """Time one version. For a comparison use :func:`measure_pair`, which interleaves."""
    timed = interleave(
        {"run": run}, device=device, iterations=iterations, warmup=warmup, reset=reset
    )
    return timed["run"]


def time_once_s(run: Run, device: torch.device) -> float:
    """Seconds of one call. On CUDA: events on the current stream, device idle before the start."""
    if device.type != "cuda":
        start_s = time.perf_counter()
        run()
        return time.perf_counter() - start_s
    stream = torch.cuda.current_stream(device)
    start, end = _timing_event(), _timing_event()
    torch.cuda.synchronize(device)
    start.record(stream)
    run()
    end.record(stream)
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def flush_l2(device: str | torch.device) -> Run:
    """A ``reset`` for kernels whose data would stay in the GPU's L2 from run to run.

    Overwrites a buffer of 256 MiB (H100 and H200 have 50 MiB of L2).
    """
    buffer = torch.empty(256 * 1024**2, dtype=torch.uint8, device=torch.device(device))
    return buffer.zero_


def bootstrap_ratio_interval(
    baseline_s: tuple[float, ...],
    optimised_s: tuple[float, ...],
    *,
    seed: int = 0,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
) -> tuple[float, float]:
    """Percentile bootstrap of ``median(baseline) / median(optimised)`` over paired rounds.

    After Efron (1979). With few rounds the percentile interval of a median is somewhat too
    narrow: use 10 rounds or more where the bound matters.

    Returns:
        (low, high). With a single round both are the ratio itself.
    """
    if len(baseline_s) != len(optimised_s) or not baseline_s:
        raise InvalidRequestError(
            f"{len(baseline_s)} baseline and {len(optimised_s)} optimised samples; "
            "expected the same number, one of each per round"
        )
    if not 0 < confidence < 1:
        raise InvalidRequestError(f"confidence is {confidence}; expected a number in (0, 1)")
    n = len(baseline_s)
    rows = np.random.default_rng(seed).integers(0, n, size=(resamples, n))
    ratios = np.median(np.asarray(baseline_s)[rows], axis=1) / np.median(
        np.asarray(optimised_s)[rows], axis=1
    )
    tail = (1 - confidence) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return float(low), float(high)
