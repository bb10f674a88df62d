"""Latency and goodput over many requests.

Definitions follow MLPerf Inference and DistServe (Zhong et al., OSDI 2024): TTFT is from arrival
to the first token, so it contains queueing and prefill; TPOT is the mean time of a token after
the first; ITL is each such time by itself, so that a stall that TPOT averages away stays visible;
goodput counts only requests that meet *both* latency targets. Whether a request with stalls
meets its token target depends on how the target is read: see ``SLODefinition``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType
from typing import Literal

import numpy as np
import numpy.typing as npt

from ch15_helpers.serving.request import SLO, RequestOutput

Floats = npt.NDArray[np.float64]

MLPERF_SLOS: Mapping[str, SLO] = MappingProxyType(
    {
        "llama2-70b": SLO(2.0, 0.200),
        "llama2-70b-interactive": SLO(0.450, 0.040),
        "mixtral-8x7b": SLO(2.0, 0.200),
        "llama3.1-405b": SLO(6.0, 0.175),
        "llama3.1-405b-interactive": SLO(4.5, 0.080),
        "llama3.1-8b": SLO(2.0, 0.100),
        "llama3.1-8b-interactive": SLO(0.5, 0.030),
        "deepseek-r1": SLO(2.0, 0.080),
        "deepseek-r1-interactive": SLO(1.5, 0.015),
    }
)
"""TTFT and TPOT limits of the server scenario in MLPerf Inference: ``loadgen/mlperf.conf`` of
mlcommons/inference, read at commit 001712e (v5.1 and later). MLPerf asks that the 99th percentiles
of a run be within them: see ``passes_mlperf``."""

SLODefinition = Literal["tpot", "itl", "pace"]
"""How the token limit of an SLO is read, with TTFT within its limit in all three:

- ``tpot``: the mean time per token is within ``tpot_s`` (MLPerf, DistServe); hides stalls.
- ``itl``: each inter-token latency is; one stall fails the request.
- ``pace``: token k is there by ``ttft_s + k * tpot_s``, so that a reader never catches up with
  the text (Andes, Liu et al. 2024; Etalon, Agrawal et al. 2024); early tokens buy time.
"""


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
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    return Percentiles(
        count=len(ordered),
        p50=_interpolate(ordered, 50),
        p95=_interpolate(ordered, 95),
        p99=_interpolate(ordered, 99),
        mean=math.fsum(values) / len(ordered),
        max=float(ordered[-1]),
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


@dataclass(frozen=True)
class Score:
    """One run under one reading of one SLO.

    Attributes:
        num_met: requests that met it.
        attainment: of all requests, failed ones included; NaN when there are none.
        goodput_per_s: of those that met it.
    """

    slo: SLO
    definition: SLODefinition
    num_met: int
    attainment: float
    goodput_per_s: float


def meets(output: RequestOutput, slo: SLO, definition: SLODefinition = "tpot") -> bool:
    """Whether a request completed within the SLO, read as ``definition`` says."""
    metrics = output.metrics
    if definition == "tpot":
        return slo.met_by(output)
    if definition not in ("itl", "pace"):
        raise ValueError(f"definition is {definition!r}; it must be tpot, itl or pace")
    if output.finish_reason not in ("stop", "length") or metrics.ttft_s is None:
        return False
    if definition == "itl":
        return metrics.ttft_s <= slo.ttft_s and max(metrics.itl_s, default=0.0) <= slo.tpot_s
    times_s = accumulate(metrics.itl_s, initial=metrics.ttft_s)
    return all(time_s <= slo.ttft_s + k * slo.tpot_s for k, time_s in enumerate(times_s))


def score(
    outputs: Sequence[RequestOutput],
    slo: SLO,
    duration_s: float,
    definition: SLODefinition = "tpot",
) -> Score:
    """Attainment and goodput of a run."""
    if not duration_s > 0:
        raise ValueError(f"duration_s must be positive, got {duration_s}")
    met = sum(meets(output, slo, definition) for output in outputs)
    fraction = met / len(outputs) if outputs else math.nan
    return Score(slo, definition, met, fraction, met / duration_s)


def passes_mlperf(outputs: Sequence[RequestOutput], slo: SLO) -> bool:
    """MLPerf's criterion on a run: all requests complete, 99th percentiles within both limits."""
    metrics = [o.metrics for o in outputs if o.finish_reason in ("stop", "length")]
    if not outputs or len(metrics) < len(outputs):
        return False
    ttft_s = percentile([m.ttft_s for m in metrics if m.ttft_s is not None], 99)
    tpot_s = percentile([m.tpot_s for m in metrics if m.tpot_s is not None] or [0.0], 99)
    return ttft_s <= slo.ttft_s and tpot_s <= slo.tpot_s


def _interpolate(ordered: Sequence[float] | Floats, percent: float) -> float:
    rank = (len(ordered) - 1) * percent / 100
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    below, above = float(ordered[low]), float(ordered[high])
    return below + (above - below) * (rank - low)
