"""Verdicts, malformed files, and the one writer."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ch15_helpers.bench import expectations as ex
from ch15_helpers.bench.schema import Metric, TargetResult
from ch15_helpers.errors import ExpectationsError

HARDWARE: dict[str, Any] = {
    "name": "Test CPU",
    "driver": None,
    "torch": "2.13.0",
    "triton": None,
    "ceilings": {
        "read_GBps": 40.0,
        "copy_GBps": 30.0,
        "matmul_tflops": {"float32": 0.5},
        "launch_us": 2.0,
        "host_link_GBps": None,
    },
}
VALID: dict[str, Any] = {
    "schema_version": 1,
    "hardware": HARDWARE,
    "targets": {
        "t": {
            "metrics": [
                {
                    "name": "speedup",
                    "value": 2.0,
                    "unit": "x",
                    "kind": "measured",
                    "tolerance": 0.2,
                    "direction": "higher",
                }
            ],
            "provenance": {
                "commit": "abc",
                "command": "ch15 run --targets ch15:t",
                "parameters": {"model": "smollm2"},
                "sample_count": 10,
                "time": "2026-01-02T03:04:05+00:00",
            },
        }
    },
}


def measured(
    value: float, unit: str = "x", direction: str = "higher", tol: float = 0.2, name: str = "m"
) -> Metric:
    return Metric(name, value, unit, "measured", tol, direction)  # type: ignore[arg-type]


def result(
    *metrics: Metric, key: str = "cpu", target: str = "t", **parameters: Any
) -> TargetResult:
    return TargetResult(target, key, HARDWARE, metrics, parameters or {"model": "smollm2"}, 5)


def store(directory: Path, *results: TargetResult, commit: str = "abc") -> None:
    ex.update(directory, results, commit=commit, command="ch15 run", time="2026-01-02")


def verdicts(now: TargetResult, directory: Path) -> dict[str, str]:
    return {c.name: c.verdict for c in ex.compare(now, ex.load_key(directory, now.key))}


# Verdicts on one metric

TIMES = st.floats(1e-6, 1e6)
TOLERANCES = st.floats(0.01, 0.9)
DIRECTIONS = st.sampled_from(["higher", "lower"])
GAPS = st.floats(1e-3, 5.0)


@given(TIMES, TOLERANCES, DIRECTIONS, st.floats(-0.99, 0.99), st.booleans())
def test_within_the_tolerance_is_ok(
    value: float, tol: float, direction: str, part: float, on_gpu: bool
) -> None:
    expected = measured(value, direction=direction, tol=tol)
    now = measured(value * (1 + part * tol), direction=direction, tol=tol)
    assert ex.compare_metric(now, expected, on_gpu).verdict == "ok"


@given(TIMES, TOLERANCES, DIRECTIONS, GAPS, st.booleans())
def test_beyond_the_tolerance_the_direction_decides(
    value: float, tol: float, direction: str, gap: float, on_gpu: bool
) -> None:
    expected = measured(value, direction=direction, tol=tol)
    higher = measured(value * (1 + tol + gap), direction=direction, tol=tol)
    lower = measured(value * (1 - tol) / (1 + gap), direction=direction, tol=tol)
    better, worse = (higher, lower) if direction == "higher" else (lower, higher)
    assert ex.compare_metric(better, expected, on_gpu).verdict == "improved"
    assert ex.compare_metric(worse, expected, on_gpu).verdict == "regressed"


@given(TIMES, TIMES, TIMES, DIRECTIONS)
def test_a_better_value_never_gets_a_worse_verdict(
    expected: float, a: float, b: float, direction: str
) -> None:
    worse, better = sorted((a, b), reverse=direction == "lower")
    rank = ["regressed", "ok", "improved"].index
    got = [
        rank(
            ex.compare_metric(
                measured(v, direction=direction), measured(expected, direction=direction), True
            ).verdict
        )
        for v in (worse, better)
    ]
    assert got[0] <= got[1]


@given(TIMES, TIMES)
def test_absolute_values_are_shown_and_not_compared_on_cpus(now: float, was: float) -> None:
    c = ex.compare_metric(measured(now, "s", "lower"), measured(was, "s", "lower"), False)
    assert (c.verdict, c.compared) == ("ok", False)
    assert "not compared on CPUs" in c.reason


def test_the_stored_tolerance_counts_not_the_new_one() -> None:
    generous, strict = measured(1.0, tol=0.9), measured(2.0, tol=0.1)
    assert ex.compare_metric(generous, strict, False).verdict == "regressed"


@pytest.mark.parametrize("values", [([1, 2], [1, 3]), (True, False), (True, 1), (3, 4), ("a", "b")])
def test_exact_must_be_equal(values: tuple[Any, Any]) -> None:
    now, was = (Metric("m", v, "", "exact", 0.0, "equal") for v in values)
    assert ex.compare_metric(now, was, False).verdict == "regressed"
    assert ex.compare_metric(was, was, False).verdict == "ok"


@given(st.floats(1e-3, 1e9), st.sampled_from(["equal", "higher", "lower"]))
def test_modelled_agrees_to_one_part_in_a_million(value: float, direction: str) -> None:
    def at(factor: float) -> str:
        now = Metric("m", value * factor, "tokens", "modelled", 1e-6, direction)  # type: ignore[arg-type]
        was = Metric("m", value, "tokens", "modelled", 1e-6, direction)  # type: ignore[arg-type]
        return ex.compare_metric(now, was, False).verdict

    assert at(1 + 5e-7) == "ok"
    assert at(1 + 1e-5) == ("improved" if direction == "higher" else "regressed")
    assert at(1 - 1e-5) == ("improved" if direction == "lower" else "regressed")


def test_a_metric_that_changed_its_unit_is_not_compared() -> None:
    c = ex.compare_metric(measured(1.0, "s", "lower"), measured(1.0, "ms", "lower"), True)
    assert (c.verdict, c.compared) == ("new", False)
    assert "[ms]" in c.reason


# Verdicts on a target


def timed(baseline_s: float, optimised_s: float, key: str) -> TargetResult:
    return result(
        measured(baseline_s, "s", "lower", name="baseline_s"),
        measured(optimised_s, "s", "lower", name="optimised_s"),
        measured(baseline_s / optimised_s, "x", "higher", name="speedup"),
        key=key,
    )


@pytest.mark.parametrize(
    ("key", "verdict"), [("h200", "regressed"), ("2x_h200", "regressed"), ("cpu", "ok")]
)
def test_both_slower_together_regress_on_gpus_only(tmp_path: Path, key: str, verdict: str) -> None:
    store(tmp_path, timed(4.0, 2.0, key))
    now = timed(8.0, 4.0, key)
    assert ex.overall(ex.compare(now, ex.load_key(tmp_path, key))) == verdict


def test_new_and_missing(tmp_path: Path) -> None:
    store(tmp_path, result(measured(1.0, name="a"), measured(1.0, name="gone")))
    now = result(measured(1.0, name="a"), measured(1.0, name="fresh"))
    assert verdicts(now, tmp_path) == {"a": "ok", "fresh": "new", "gone": "missing"}
    assert ex.overall(ex.compare(now, ex.load_key(tmp_path, "cpu"))) == "missing"
    other = result(measured(1.0), target="other")
    assert verdicts(other, tmp_path) == {"m": "new"}
    assert verdicts(result(measured(1.0), key="h100"), tmp_path) == {"m": "new"}


def test_another_commit_is_compared(tmp_path: Path) -> None:
    store(tmp_path, result(measured(2.0)), commit="0" * 40)
    assert verdicts(result(measured(1.0)), tmp_path) == {"m": "regressed"}


def test_other_parameters_are_not_compared_and_the_reason_says_which(tmp_path: Path) -> None:
    store(tmp_path, result(measured(2.0), model="smollm2", dtype="float32", batch=1))
    now = result(measured(1.0), model="smollm2", dtype="bfloat16", prompts=3)
    (c,) = ex.compare(now, ex.load_key(tmp_path, "cpu"))
    assert (c.verdict, c.compared) == ("new", False)
    for part in (
        "dtype is 'bfloat16', stored with 'float32'",
        "batch is '(absent)'",
        "prompts is 3",
    ):
        assert part in c.reason


def test_iterations_profile_and_device_do_not_make_runs_incomparable(tmp_path: Path) -> None:
    store(tmp_path, result(measured(2.0), model="m", iterations=10, device="auto", profile="none"))
    now = result(measured(1.0), model="m", iterations=3, device="cpu", out_dir="x")
    assert verdicts(now, tmp_path) == {"m": "regressed"}


@given(st.lists(st.sampled_from(ex.SEVERITY), max_size=6))
def test_overall_is_the_worst(names: list[ex.Verdict]) -> None:
    comparisons = [ex.Comparison("m", n, None, None, "") for n in names]
    worst = min(names, key=ex.SEVERITY.index, default="missing")
    assert ex.overall(comparisons) == worst


# Malformed files


def mutated(path: str, value: Any = ...) -> dict[str, Any]:
    """VALID with one field replaced, or removed where no value is given."""
    data = copy.deepcopy(VALID)
    node: Any = data
    *parents, last = [int(p) if p.isdigit() else p for p in path.split("/")]
    for part in parents:
        node = node[part]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return data


METRIC, ORIGIN, CEILINGS = "targets/t/metrics/0/", "targets/t/provenance/", "hardware/ceilings/"
REQUIRED = [
    *("schema_version", "hardware", "targets", "targets/t/metrics", "targets/t/provenance"),
    *(f"hardware/{f}" for f in ("name", "driver", "torch", "triton", "ceilings")),
    *(CEILINGS + f for f in HARDWARE["ceilings"]),
    *(METRIC + f for f in VALID["targets"]["t"]["metrics"][0]),
    *(ORIGIN + f for f in VALID["targets"]["t"]["provenance"]),
]
WRONG = [
    ("schema_version", 2),
    ("schema_version", True),
    ("schema_version", "1"),
    ("hardware", []),
    ("hardware/name", ""),
    ("hardware/driver", 5),
    ("hardware/torch", None),
    ("hardware/extra", 1),
    (CEILINGS + "read_GBps", 0),
    (CEILINGS + "read_GBps", None),
    (CEILINGS + "copy_GBps", "fast"),
    (CEILINGS + "matmul_tflops", {}),
    (CEILINGS + "matmul_tflops", {"float32": -1}),
    (CEILINGS + "launch_us", True),
    (CEILINGS + "host_link_GBps", 0),
    ("targets", []),
    ("targets/t", 3),
    ("targets/t/metrics", []),
    ("targets/t/metrics", {}),
    ("targets/t/metrics", VALID["targets"]["t"]["metrics"] * 2),
    (METRIC + "name", 3),
    (METRIC + "name", ""),
    (METRIC + "value", "2"),
    (METRIC + "value", None),
    (METRIC + "value", True),
    (METRIC + "unit", None),
    (METRIC + "kind", "guessed"),
    (METRIC + "tolerance", -0.1),
    (METRIC + "tolerance", 1.5),
    (METRIC + "direction", "up"),
    (METRIC + "direction", "equal"),
    (METRIC + "note", "x"),
    (ORIGIN + "commit", ""),
    (ORIGIN + "command", None),
    (ORIGIN + "parameters", []),
    (ORIGIN + "sample_count", -1),
    (ORIGIN + "sample_count", 2.5),
    (ORIGIN + "time", 7),
]


def test_the_valid_file_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    path.write_text(json.dumps(VALID))
    assert ex.load(path).targets["t"].metrics[0].value == 2.0
    assert ex.load_key(tmp_path, "h200") is None


@pytest.mark.parametrize("field", REQUIRED)
def test_a_missing_field_is_named(tmp_path: Path, field: str) -> None:
    path = tmp_path / "cpu.json"
    path.write_text(json.dumps(mutated(field)))
    with pytest.raises(ExpectationsError) as caught:
        ex.load(path)
    assert str(path) in str(caught.value)
    assert field.split("/")[-1] in str(caught.value)


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_a_wrong_field_is_named(tmp_path: Path, field: str, value: Any) -> None:
    path = tmp_path / "cpu.json"
    path.write_text(json.dumps(mutated(field, value)))
    with pytest.raises(ExpectationsError) as caught:
        ex.load(path)
    assert str(path) in str(caught.value)
    last = field.split("/")[-1]
    assert ("target" if last == "t" else last) in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema_version": NaN}', "\x00"])
def test_what_is_no_json_object_is_an_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "cpu.json"
    path.write_text(text)
    with pytest.raises(ExpectationsError, match=r"cpu\.json"):
        ex.load(path)


# The one writer


def contents(directory: Path) -> dict[str, tuple[bytes, int]]:
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in directory.iterdir()}


def test_update_keeps_other_targets_and_stores_provenance(tmp_path: Path) -> None:
    store(tmp_path, result(measured(1.0), target="a"), result(measured(2.0), target="b"))
    store(tmp_path, result(measured(3.0), target="b"), commit="def")
    stored = ex.load_key(tmp_path, "cpu")
    assert stored is not None
    assert {n: t.metrics[0].value for n, t in stored.targets.items()} == {"a": 1.0, "b": 3.0}
    assert {n: t.provenance.commit for n, t in stored.targets.items()} == {"a": "abc", "b": "def"}
    assert stored.targets["b"].provenance.sample_count == 5


def test_update_writes_one_file_per_key(tmp_path: Path) -> None:
    store(tmp_path, result(measured(1.0)), result(measured(2.0), key="h200", target="u"))
    assert sorted(contents(tmp_path)) == ["cpu.json", "h200.json"]
    assert list(ex.load_all(tmp_path)) == ["cpu", "h200"]


def test_reading_and_comparing_never_write(tmp_path: Path) -> None:
    store(tmp_path, result(measured(1.0)))
    before = contents(tmp_path)
    ex.compare(result(measured(9.0)), ex.load_key(tmp_path, "cpu"))
    ex.compare(result(measured(9.0), key="h200"), ex.load_key(tmp_path, "h200"))
    ex.load_all(tmp_path)
    assert contents(tmp_path) == before


def test_a_crash_while_writing_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(tmp_path, result(measured(1.0)))
    before = contents(tmp_path)

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    for step in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, crash)
            with pytest.raises(KeyboardInterrupt):
                store(tmp_path, result(measured(2.0)))
        assert contents(tmp_path) == before


def test_a_malformed_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "h200.json").write_text("{broken")
    with pytest.raises(ExpectationsError, match=r"h200\.json"):
        store(tmp_path, result(measured(1.0)), result(measured(1.0), key="h200"))
    assert list(contents(tmp_path)) == ["h200.json"]
    assert (tmp_path / "h200.json").read_text() == "{broken"


def test_wrong_tokens_are_never_an_expectation(tmp_path: Path) -> None:
    wrong = Metric("same_tokens", False, "", "exact", 0.0, "equal")
    with pytest.raises(ExpectationsError, match="tokens differ"):
        store(tmp_path, result(measured(9.0), wrong))
    assert not contents(tmp_path)
