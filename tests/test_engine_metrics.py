"""Latency definitions, percentiles and goodput on numbers that can be checked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ch15_helpers.serving.metrics import (
    SLO,
    attainment,
    goodput,
    percentile,
    percentiles,
    summarise,
)
from ch15_helpers.serving.request import Request, RequestMetrics, RequestOutput


def output(
    ttft_s: float | None, tpot_s: float | None = None, reason: str = "length", tokens: int = 4
) -> RequestOutput:
    metrics = RequestMetrics(ttft_s, tpot_s, [tpot_s or 0.0] * (tokens - 1), 9.0, 0.5, 1)
    return RequestOutput("r", [1, 2], [7] * tokens, "", reason, None, metrics)


def test_definitions() -> None:
    request = Request("r", [1, 2, 3], arrival_s=10.0)
    request.first_scheduled_s = 10.5
    request.token_times_s = [12.0, 12.5, 14.0]
    metrics = request.metrics()
    assert metrics.ttft_s == 2.0 and metrics.queue_s == 0.5 and metrics.e2e_s == 4.0
    assert metrics.itl_s == [0.5, 1.5] and metrics.tpot_s == 1.0
    request.token_times_s = [12.0]
    assert request.metrics().tpot_s is None and request.metrics().itl_s == []


@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_percentiles_are_numpys(count: int) -> None:
    values = np.random.default_rng(count).exponential(size=count).tolist()
    for percent in (0, 1, 50, 95, 99, 100):
        assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))
    found = percentiles(values)
    assert (found.count, found.max) == (count, max(values))
    assert found.mean == pytest.approx(np.mean(values))
    assert found.p99 == percentile(values, 99)


def test_percentiles_of_nothing_and_beyond() -> None:
    assert math.isnan(percentile([], 50)) and math.isnan(percentiles([]).p50)
    with pytest.raises(ValueError, match=r"\[0, 100\]"):
        percentile([1.0], 101)


def test_goodput_needs_both_targets_and_a_completed_request() -> None:
    slo = SLO(ttft_s=1.0, tpot_s=0.1)
    outputs = [
        output(0.9, 0.05),
        output(1.0, 0.1),  # exactly on the limit counts
        output(1.1, 0.05),
        output(0.9, 0.2),
        output(0.5, None),  # one token: only TTFT applies
        output(0.5, 0.01, reason="error"),
        output(None, None, reason="abort"),
    ]
    assert goodput(outputs, slo, duration_s=2.0) == 1.5
    assert attainment(outputs, slo) == pytest.approx(3 / 7)
    assert math.isnan(attainment([], slo))
    with pytest.raises(ValueError, match="duration_s"):
        goodput(outputs, slo, 0.0)


def test_summary_counts_completed_work_only() -> None:
    outputs = [output(1.0, 0.2), output(3.0, 0.4), output(0.1, 0.1, reason="error")]
    summary = summarise(outputs, duration_s=4.0)
    assert (summary.num_requests, summary.num_completed) == (3, 2)
    assert (summary.num_prompt_tokens, summary.num_output_tokens) == (4, 8)
    assert summary.output_tokens_per_s == 2.0 and summary.requests_per_s == 0.5
    assert summary.ttft_s.p50 == 2.0 and summary.itl_s.count == 6
    assert summary.num_preemptions == 3
    with pytest.raises(ValueError, match="duration_s"):
        summarise(outputs, 0.0)
