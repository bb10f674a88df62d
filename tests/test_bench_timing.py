"""Interleaving, samples, and the interval of the ratio."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ch15_helpers.bench import timing
from ch15_helpers.bench.formatting import format_s
from ch15_helpers.errors import InvalidRequestError


def test_versions_alternate_and_each_run_is_preceded_by_the_reset() -> None:
    calls: list[str] = []
    timing.measure_pair(
        lambda: calls.append("A"),
        lambda: calls.append("B"),
        iterations=2,
        warmup=1,
        reset=lambda: calls.append("-"),
    )
    assert "".join(calls) == "-A-B" * 3


def test_warmup_and_reset_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    cost = iter([100.0, 100.0, 3.0, 1.0, 5.0, 1.0, 4.0, 2.0])
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def work() -> None:
        now[0] += next(cost)

    def reset() -> None:
        now[0] += 1000.0

    pair = timing.measure_pair(work, work, iterations=3, warmup=1, reset=reset)
    assert pair.baseline.samples_s == (3.0, 5.0, 4.0)
    assert pair.optimised.samples_s == (1.0, 1.0, 2.0)
    assert pair.speedup == 4.0
    assert pair.baseline.median_s == 4.0


def test_more_than_two_versions_share_rounds() -> None:
    calls: list[str] = []
    times = timing.interleave(
        {n: (lambda n=n: calls.append(n)) for n in "ABC"}, iterations=2, warmup=0
    )
    assert "".join(calls) == "ABCABC"
    assert {n: len(s) for n, s in times.items()} == {"A": 2, "B": 2, "C": 2}


def test_percentiles() -> None:
    samples = timing.Samples(tuple(float(i) for i in range(11)))
    assert (samples.p10_s, samples.median_s, samples.p90_s, len(samples)) == (1.0, 5.0, 9.0, 11)


@pytest.mark.parametrize("paired_drift", [0.0, 0.5])
def test_interval_covers_the_true_ratio(paired_drift: float) -> None:
    """95 % intervals hold the true ratio of medians in about 95 % of synthetic experiments."""
    rng = np.random.default_rng(7)
    trials, covered, widths = 300, 0, []
    for trial in range(trials):
        drift = np.exp(rng.normal(0, paired_drift, 25))
        a = tuple(2.0 * drift * np.exp(rng.normal(0, 0.1, 25)))
        b = tuple(1.0 * drift * np.exp(rng.normal(0, 0.1, 25)))
        low, high = timing.bootstrap_ratio_interval(a, b, seed=trial, resamples=500)
        covered += low <= 2.0 <= high
        widths.append(high - low)
    assert 0.90 <= covered / trials <= 1.0
    if not paired_drift:  # an interval that is always right because it is wide says nothing
        assert np.mean(widths) < 0.3


def test_interval_is_seeded_and_narrows_with_confidence() -> None:
    rng = np.random.default_rng(0)
    a, b = tuple(rng.uniform(1, 2, 15)), tuple(rng.uniform(1, 2, 15))
    assert timing.bootstrap_ratio_interval(a, b, seed=3) == timing.bootstrap_ratio_interval(
        a, b, seed=3
    )
    wide = timing.bootstrap_ratio_interval(a, b, confidence=0.99)
    narrow = timing.bootstrap_ratio_interval(a, b, confidence=0.5)
    assert wide[0] < narrow[0] <= narrow[1] < wide[1]


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=12), st.floats(0.1, 10.0))
def test_constant_ratio_has_a_point_interval(baseline: list[float], factor: float) -> None:
    optimised = tuple(t / factor for t in baseline)
    pair = timing.pair_from_samples(timing.Samples(tuple(baseline)), timing.Samples(optimised))
    assert pair.speedup == pytest.approx(factor)
    assert pair.speedup_low == pytest.approx(factor)
    assert pair.speedup_high == pytest.approx(factor)


@pytest.mark.parametrize(
    "wrong", [{"iterations": 0}, {"warmup": -1}, {"confidence": 1.0}, {"confidence": 0.0}]
)
def test_senseless_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidRequestError, match="expected"):
        timing.measure_pair(lambda: None, lambda: None, **wrong)  # type: ignore[arg-type]


def test_unpaired_samples_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="one of each per round"):
        timing.bootstrap_ratio_interval((1.0, 2.0), (1.0,))
    with pytest.raises(InvalidRequestError, match="no samples"):
        timing.Samples(())
    with pytest.raises(InvalidRequestError, match="no versions"):
        timing.interleave({})


def test_an_error_in_a_version_is_not_swallowed() -> None:
    with pytest.raises(ZeroDivisionError):
        timing.measure(lambda: 1 // 0)


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.234, "1.23 s"), (0.0456, "45.6 ms"), (7.89e-6, "7.89 µs"), (0, "0 ns")]
)
def test_times_have_a_fitting_unit(seconds: float, text: str) -> None:
    assert format_s(seconds) == text


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_events_time_the_device_not_the_launch() -> None:
    x = torch.randn(8192, 8192, device="cuda")
    host_s = []

    def launch() -> None:
        start_s = time.perf_counter()
        torch.matmul(x, x)
        host_s.append(time.perf_counter() - start_s)

    measured = timing.measure(launch, device="cuda", iterations=5)
    assert measured.median_s > 5 * np.median(host_s[2:])
