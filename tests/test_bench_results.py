"""What a notebook records, reads back and says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ch15_helpers.bench import expectations, results
from ch15_helpers.bench.formatting import format_value
from ch15_helpers.bench.results import Recorder
from ch15_helpers.bench.schema import Metric, SchemaError, TargetResult
from ch15_helpers.bench.timing import PairTiming, Samples, pair_from_samples
from ch15_helpers.ceilings import Ceilings
from ch15_helpers.errors import ExpectationsError
from ch15_helpers.hardware import HardwareProfile

CEILINGS = Ceilings(40.0, 30.0, {"float32": 0.5}, 2.0, None)
CPU = HardwareProfile("cpu", "Test CPU", "cpu", None, "2.13.0", None, 1, 2, CEILINGS)
GPU = HardwareProfile("h200", "NVIDIA H200", "cuda", "1.2", "2.11.0", "3.6.0", 1, 2, CEILINGS)


def pair(baseline_s: float = 4.0, optimised_s: float = 2.0) -> PairTiming:
    return pair_from_samples(Samples((baseline_s,) * 3), Samples((optimised_s,) * 3))


def recorder(hardware: HardwareProfile = CPU, **parameters: Any) -> Recorder:
    return Recorder("inference_monolithic", hardware=hardware, parameters=parameters)


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An expectations folder with the target on two keys."""
    monkeypatch.setenv("CH15_EXPECTATIONS", str(tmp_path))
    for hardware, optimised_s in ((CPU, 2.0), (GPU, 0.5)):
        record = recorder(hardware, model="smollm2", batch=1 if hardware is CPU else 8)
        record.same_tokens(True)
        record.pair(pair(optimised_s=optimised_s), limit_s=1.0)
        record.exact("block_bytes", 2_097_152, "bytes")
        expectations.update(
            tmp_path, [record.result()], commit="a" * 40, command="ch15 run", time="2026-01-02T03"
        )
    return tmp_path


def test_pair_records_both_times_the_ratio_and_the_share_of_the_limit() -> None:
    record = recorder()
    record.pair(pair(), limit_s=1.0, tolerance=0.1)
    got = {m.name: (m.value, m.unit, m.direction, m.tolerance) for m in record.result().metrics}
    assert got == {
        "baseline_s": (4.0, "s", "lower", 0.1),
        "optimised_s": (2.0, "s", "lower", 0.1),
        "speedup": (2.0, "x", "higher", 0.1),
        "fraction_of_limit": (0.5, "fraction", "higher", 0.1),
    }
    assert record.result().sample_count == 3
    assert record.result().timings["pair"]["optimised_s"] == [2.0, 2.0, 2.0]


def test_several_pairs_keep_their_names() -> None:
    record = recorder()
    record.pair(pair(), name="prefill")
    record.pair(pair(), name="decode")
    names = [m.name for m in record.result().metrics]
    assert names[:3] == ["prefill_baseline_s", "prefill_optimised_s", "prefill_speedup"]
    assert set(record.result().timings) == {"prefill", "decode"}


def test_running_a_cell_twice_replaces_its_metrics() -> None:
    record = recorder()
    record.exact("steps", 3)
    record.exact("steps", 4)
    assert [m.value for m in record.result().metrics] == [4]


@pytest.mark.parametrize(
    ("same", "optimised_s", "line"),
    [
        (True, 2.0, "inference_monolithic: same tokens yes, speed-up as expected yes"),
        (False, 2.0, "inference_monolithic: same tokens no, speed-up as expected yes"),
        (True, 3.0, "inference_monolithic: same tokens yes, speed-up as expected no"),
    ],
)
def test_verdict_line_can_say_no(same: bool, optimised_s: float, line: str) -> None:
    record = recorder()
    record.same_tokens(same)
    record.pair(pair(optimised_s=optimised_s), expected_speedup=1.5)
    assert record.verdict_line() == line


def test_verdict_line_needs_every_pair_to_hold() -> None:
    record = recorder()
    record.same_tokens(True)
    record.pair(pair(), name="prefill", expected_speedup=1.5)
    record.pair(pair(), name="decode", expected_speedup=2.5)
    assert record.verdict_line().endswith("expected no")


def test_verdict_line_takes_its_bound_from_the_expectations(stored: Path) -> None:
    record = recorder()
    record.same_tokens(True)
    record.pair(pair(optimised_s=2.4))  # 1.67×: within 20 % of the stored 2×
    assert record.verdict_line().endswith("expected yes")
    record.pair(pair(optimised_s=2.6))  # 1.54×: not
    assert record.verdict_line().endswith("expected no")
    (stored / "cpu.json").unlink()
    with pytest.raises(ExpectationsError, match="No expectation is stored"):
        record.verdict_line()


def test_verdict_line_before_the_measurement_is_an_error() -> None:
    record = recorder()
    record.pair(pair())
    with pytest.raises(SchemaError, match=r"same_tokens\(\) and pair\(\) first"):
        record.verdict_line(1.0)


def test_a_displayed_result_is_read_back_from_the_notebook() -> None:
    record = recorder(model="smollm2")
    record.same_tokens(True)
    record.pair(pair())
    first, last = record.result().to_dict(), record.result().to_dict()
    first["parameters"] = {"model": "older"}
    cells = [
        {"cell_type": "markdown", "source": "x"},
        *({"outputs": [{"data": {results.MIME_TYPE: payload}}]} for payload in (first, last)),
        {"outputs": [{"output_type": "stream", "text": "noise"}]},
    ]
    notebook = json.loads(json.dumps({"cells": cells}))
    assert results.read_results(notebook) == [record.result()]


@pytest.mark.parametrize(
    "change",
    [
        {"metrics": "none"},
        {"sample_count": -1},
        {"sample_count": True},
        {"key": ""},
        {"extra": 1},
        {"parameters": []},
        {"hardware": {}},
    ],
)
def test_a_malformed_displayed_result_is_an_error(change: dict[str, Any]) -> None:
    payload = {**recorder().result().to_dict(), **change}
    with pytest.raises(SchemaError):
        results.read_results({"cells": [{"outputs": [{"data": {results.MIME_TYPE: payload}}]}]})


@pytest.mark.parametrize(
    "call",
    [
        lambda r: r.measured("x", float("nan"), "s", direction="lower"),
        lambda r: r.measured("x", 1.0, "s", direction="equal"),
        lambda r: r.measured("x", 1.0, "s", direction="lower", tolerance=0.0),
        lambda r: r.measured("x", 1.0, "s", direction="lower", ratio=True),
        lambda r: r.measured("x", 1.0, "x", direction="higher", ratio=False),
        lambda r: r.modelled("x", "3", "tokens"),
        lambda r: r.modelled("x", True, "tokens"),
        lambda r: r.exact("x", float("inf")),
        lambda r: r.exact("x", {"a": 1}),
        lambda r: r.exact("", 1),
    ],
)
def test_metrics_that_mean_nothing_are_refused(call: Any) -> None:
    with pytest.raises(SchemaError):
        call(recorder())


def test_duplicate_metrics_are_refused() -> None:
    metric = Metric("a", 1, "", "exact", 0.0, "equal")
    with pytest.raises(SchemaError, match="recorded twice: a"):
        TargetResult("t", "cpu", CPU.block(), (metric, metric), {}, 0)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (2.314, "x", "2.31×"),
        (0.0412, "s", "41.2 ms"),
        (0.634, "fraction", "63.4%"),
        (2097152, "bytes", "2,097,152 bytes"),
        (True, "", "yes"),
        (7, "", "7"),
        ([1, 2], "", "[1, 2]"),
    ],
)
def test_values_for_people(value: Any, unit: str, text: str) -> None:
    assert format_value(Metric("m", value, unit, "exact", 0.0, "equal")) == text


def test_prose_numbers_are_the_stored_ones(stored: Path) -> None:
    assert results.recorded("inference_monolithic", "speedup", "cpu") == 2.0
    assert results.recorded("inference_monolithic", "speedup", "h200") == 8.0
    text = results.bound_text("{speedup} in {optimised_s} on {key}", "inference_monolithic", "h200")
    assert text.data == "8× in 500 ms on h200"


def test_prose_that_names_what_is_not_stored_is_an_error(stored: Path) -> None:
    with pytest.raises(ExpectationsError, match=r"'latency' is stored.*stored: same_tokens"):
        results.recorded("inference_monolithic", "latency", "cpu")
    with pytest.raises(ExpectationsError, match="No expectation is stored for other on cpu"):
        results.recorded("other", "speedup", "cpu")
    with pytest.raises(ExpectationsError, match="names 'latency'"):
        results.bound_text("{latency}", "inference_monolithic", "cpu")


def test_what_you_should_see_shows_values_and_allowances(stored: Path) -> None:
    table = results.what_you_should_see("inference_monolithic", "cpu").data
    assert "| speedup | 2× | measured | not 20% less |" in table
    assert "| optimised | 2 s | measured | not compared (absolute, on a CPU) |" in table
    assert "| block bytes | 2,097,152 bytes | exact | equal |" in table
    assert "Test CPU" in table
    assert "aaaaaaaaaaaa" in table
    gpu = results.what_you_should_see("inference_monolithic", "h200").data
    assert "| optimised | 500 ms | measured | not 20% more |" in gpu


def test_other_hardware_is_side_by_side(stored: Path) -> None:
    table = results.on_other_hardware("inference_monolithic").data
    assert "| metric | `cpu` | `h200` |" in table
    assert "| speedup | 2× | 8× |" in table
    assert "| batch | 1 | 8 |" in table  # parameters that differ are shown, others are not
    assert "smollm2" not in table


def test_a_chapter_runs_before_anything_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CH15_EXPECTATIONS", str(tmp_path))
    for markdown in (
        results.what_you_should_see("inference_monolithic"),
        results.on_other_hardware("inference_monolithic"),
        results.bound_text("{speedup}", "inference_monolithic"),
    ):
        assert "--update-expectations" in markdown.data


def test_showing_expectations_writes_nothing(stored: Path) -> None:
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in stored.rglob("*")}
    results.what_you_should_see("inference_monolithic")
    results.on_other_hardware("inference_monolithic")
    results.recorded("inference_monolithic", "speedup", "cpu")
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in stored.rglob("*")} == before
