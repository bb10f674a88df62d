"""Latency and goodput over many requests.

Definitions follow MLPerf Inference and DistServe (Zhong et al., OSDI 2024): TTFT is from arrival
to the first token, so it contains queueing and prefill; TPOT is the mean time of a token after
the first; ITL is each such time by itself, so that a stall that TPOT averages away stays visible;
goodput counts only requests that meet *both* latency targets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ch15_helpers.serving.request import SLO, RequestOutput


@dataclass(frozen=True)
class Percentiles:
    """Median, 95th and 99th percentile, mean and largest of ``count`` values; NaN when none."""

    count: int
    p50: float
    p95: float
    p99: float
    mean: float
    max: float


@dataclass(frozen=True)
class Summary:
    """What a run of many requests came to.

    Attributes:
        num_requests, num_completed: all, and those that ended with ``stop`` or ``length``.
        num_prompt_tokens, num_output_tokens: of the completed ones.
        duration_s: wall time that throughput is divided by.
        output_tokens_per_s, requests_per_s: completed work over ``duration_s``.
        ttft_s, tpot_s, itl_s, e2e_s, queue_s: over completed requests (ITL over all their gaps).
        num_preemptions: over all requests.
    """

    num_requests: int
    num_completed: int
    num_prompt_tokens: int
    num_output_tokens: int
    duration_s: float
    output_tokens_per_s: float
    requests_per_s: float
    ttft_s: Percentiles
    tpot_s: Percentiles
    itl_s: Percentiles
    e2e_s: Percentiles
    queue_s: Percentiles
    num_preemptions: int


def percentile(values: Sequence[float], percent: float) -> float:
    """Percentile with linear interpolation between ranks (numpy's default); NaN when empty."""
    if not 0 <= percent <= 100:
        raise ValueError(f"percent must be in [0, 100], got {percent}")
    if not values:
        return math.nan
    return _interpolate(sorted(values), percent)


def percentiles(values: Sequence[float]) -> Percentiles:
    """The usual ones, from one sort."""
    if not values:
        return Percentiles(0, math.nan, math.nan, math.nan, math.nan, math.nan)
    ordered = sorted(values)
    return Percentiles(
        count=len(ordered),
        p50=_interpolate(ordered, 50),
        p95=_interpolate(ordered, 95),
        p99=_interpolate(ordered, 99),
        mean=math.fsum(ordered) / len(ordered),
        max=ordered[-1],
    )


def summarise(outputs: Sequence[RequestOutput], duration_s: float) -> Summary:
    """Summarise a run.

    Args:
        outputs: every request of the run, failed ones included.
        duration_s: from the first arrival to the last token, on the same clock.
    """
    if not duration_s > 0:
        raise ValueError(f"duration_s must be positive, got {duration_s}")
    done = [output for output in outputs if output.finish_reason in ("stop", "length")]
    metrics = [output.metrics for output in done]
    num_tokens = sum(len(output.token_ids) for output in done)
    return Summary(
        num_requests=len(outputs),
        num_completed=len(done),
        num_prompt_tokens=sum(len(output.prompt_token_ids) for output in done),
        num_output_tokens=num_tokens,
        duration_s=duration_s,
        output_tokens_per_s=num_tokens / duration_s,
        requests_per_s=len(done) / duration_s,
        ttft_s=percentiles([m.ttft_s for m in metrics if m.ttft_s is not None]),
        tpot_s=percentiles([m.tpot_s for m in metrics if m.tpot_s is not None]),
        itl_s=percentiles([gap for m in metrics for gap in m.itl_s]),
        e2e_s=percentiles([m.e2e_s for m in metrics if m.e2e_s is not None]),
        queue_s=percentiles([m.queue_s for m in metrics if m.queue_s is not None]),
        num_preemptions=sum(output.metrics.num_preemptions for output in outputs),
    )


def attainment(outputs: Sequence[RequestOutput], slo: SLO) -> float:
    """Fraction of all requests, failed ones included, that met the objective; NaN when none."""
    if not outputs:
        return math.nan
    return sum(map(slo.met_by, outputs)) / len(outputs)


def goodput(outputs: Sequence[RequestOutput], slo: SLO, duration_s: float) -> float:
    """Requests per second that met the objective."""
    if not duration_s > 0:
        raise ValueError(f"duration_s must be positive, got {duration_s}")
    return sum(map(slo.met_by, outputs)) / duration_s


def _interpolate(ordered: Sequence[float], percent: float) -> float:
    rank = (len(ordered) - 1) * percent / 100
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)
