"""Stored step times: complete, traceable, and refused when they are not; and how they are made."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from typer.testing import CliRunner

from ch15_helpers.bench import fit_step_time
from ch15_helpers.bench.fit_step_time import SWEEPS, Mix, Sweep, Timer, capacity_per_s, fit_on
from ch15_helpers.bench.targets import TARGETS, validator_of
from ch15_helpers.bench.validate_batching import judge
from ch15_helpers.errors import Ch15Error
from ch15_helpers.serving import step_time_data
from ch15_helpers.serving.config import SchedulerConfig
from ch15_helpers.serving.step_time import FEW_ROWS, MANY_ROWS, StepFeatures, StepTimeModel
from ch15_helpers.serving.step_time_data import StoredStepTime, load_step_time, stored_keys
from ch15_helpers.serving.workload import Workload, WorkloadRequest

if TYPE_CHECKING:
    from ch15_helpers.model.transformer import Transformer

SMALL = Sweep(
    max_num_seqs=4,
    max_num_batched_tokens=32,
    cells=((1, 8, 3), (1, 30, 3), (4, 8, 3)),
    mixed=Mix(6, 0.5, 0.02, 0.02),
    tests=(Mix(6, 0.5, 0.02, 0.02),),
)


@pytest.mark.parametrize("key", stored_keys())
def test_what_is_stored_says_where_it_is_from_and_how_good_it_is(key: str) -> None:
    stored = load_step_time(key)
    assert stored.key == key
    for name in ("hardware", "torch", "model", "dtype", "clock", "commit", "command", "time"):
        assert stored.provenance[name], name
    assert stored.provenance["model"] in stored.model.fitted_on
    assert 0 <= stored.worst <= 0.09, "the promised bound of the simulator's error"
    assert stored.fit["num_steps"] >= 100 and stored.fit["median_abs"] < 0.05
    assert f"{stored.worst:.1%}" in stored.describe()
    assert StoredStepTime.from_dict(json.loads(json.dumps(stored.to_dict()))) == stored


def test_cpu_comes_first_and_an_unknown_key_lists_what_there_is() -> None:
    assert stored_keys()[0] == "cpu"
    with pytest.raises(Ch15Error, match=r"'abacus'; stored: cpu.*fit_step_time"):
        load_step_time("abacus")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 0}, "schema_version 1"),
        ({"extra": 1}, "fields"),
        ({"held_out": []}, "held_out is empty"),
        ({"step_time": {"constant_s": -1.0}}, "step_time: constant_s"),
        ({"step_time": {"constant_s": "fast"}}, "step_time"),
    ],
)
def test_malformed_files_are_refused(change: dict[str, Any], message: str) -> None:
    values = load_step_time("cpu").to_dict() | change
    with pytest.raises(Ch15Error, match=message) as caught:
        StoredStepTime.from_dict(values, "step_time_x.json")
    assert str(caught.value).startswith("step_time_x.json")


def test_a_broken_file_names_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "step_time_cpu.json").write_text("{")
    monkeypatch.setattr(step_time_data, "_folder", lambda: tmp_path)
    with pytest.raises(Ch15Error, match=r"step_time_cpu\.json is not JSON"):
        load_step_time("cpu")


def test_rows_bend_the_line_and_the_fit_finds_the_bends() -> None:
    concave = StepTimeModel(0.03, 1e-3, 0.0, 0.0, 1e-3, few_row_s=2e-3)
    convex = StepTimeModel(0.006, 0.0, 0.0, 0.0, 0.0, many_row_s=2e-5)
    steps = [StepFeatures(n, n * n // 2, 1, d, 50 * d, 0) for n in (1, 9, 300, 900) for d in (1, 7)]
    steps += [StepFeatures(0, 0, 0, d, 99 * d, 0) for d in (1, 5, FEW_ROWS, 40, 2 * MANY_ROWS)]
    for truth in (concave, convex):
        seconds = [truth.step_s(each) for each in steps]
        fitted = StepTimeModel.fit(steps, seconds, "x")
        assert fitted.report(steps, seconds).p90_abs < 1e-9
        assert fitted.few_row_s == pytest.approx(truth.few_row_s, abs=1e-12)
        assert fitted.many_row_s == pytest.approx(truth.many_row_s, abs=1e-12)
        for each in steps[-5:]:
            decode_s = truth.decode_step_s(each.num_decodes, each.decode_context)
            assert decode_s == truth.step_s(each)
    first, later = (concave.step_s(StepFeatures(n, 0, 1, 0, 0, 0)) for n in (1, FEW_ROWS + 1))
    assert later - first == pytest.approx(3e-3 * FEW_ROWS - 2e-3)
    assert convex.estimates()["token_s"] == 2e-5


def test_load_is_relative_to_capacity() -> None:
    model, config = StepTimeModel(0.5), SchedulerConfig(max_num_seqs=2)
    two = Workload("w", tuple(WorkloadRequest(float(t), 1, 4) for t in range(4)))
    assert capacity_per_s(two, config, model) == 4 / (2 * 4 * 0.5)
    mix = Mix(50, 0.25, 0.1, 0.1)
    made = mix.workload(1, config, model)
    alone = capacity_per_s(made, config, model)
    # Gaps are random, so the rate is near the one asked for.
    assert made.stats.rate_per_s == pytest.approx(0.25 * alone, rel=0.4)


def test_a_sweep_is_fitted_and_tested_on_other_workloads(tiny: Transformer) -> None:
    seen: list[str] = []
    found = fit_on(tiny, SMALL, Timer.wall(), seen.append)
    assert len(seen) == len(SMALL.cells) + 1 + len(SMALL.tests)
    assert found.fit.num_steps > 20 and len(found.comparisons) == 1
    # On a busy machine the constant may be fitted away, but not the step.
    assert found.model.decode_step_s(4, 64) > 0
    assert "random:TINY in float32" in found.model.fitted_on
    for sweep in SWEEPS.values():
        names = {each.name for each in sweep.cell_workloads()}
        assert len(names) == len(sweep.cells)
        for batch, prompt, output in sweep.cells:
            assert batch <= sweep.max_num_seqs and prompt + output <= 8192


def test_the_command_prints_stores_where_told_and_refuses_nonsense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit_step_time, "SWEEPS", {"cpu": SMALL})
    import typer

    app = typer.Typer()
    app.command()(fit_step_time.main)
    arguments = ["--device", "cpu", "--model", "random:TINY"]
    done = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "held out: 6 requests at load 0.5: median TTFT" in " ".join(done.output.split())
    values = json.loads((tmp_path / "step_time_cpu.json").read_text())
    stored = StoredStepTime.from_dict(values)
    assert stored.provenance["sweep"]["cells"] == [list(cell) for cell in SMALL.cells]
    assert str(tmp_path) not in json.dumps(values)
    assert replace(stored.model, fitted_on="").to_dict() != StepTimeModel(1.0).to_dict()
    wrong = CliRunner().invoke(app, ["--device", "gpu"])
    assert wrong.exit_code == 1 and "error:" in wrong.output


def test_the_validator_fails_beyond_its_bound_and_shows_its_evidence(tiny: Transformer) -> None:
    assert callable(validator_of(TARGETS["continuous_batching"], TARGETS))
    threads = torch.get_num_threads()
    try:
        outcomes = [judge(tiny, SMALL, bound) for bound in (1e9, 0.0)]
    finally:
        torch.set_num_threads(threads)
    assert [each.passed for each in outcomes] == [True, False]
    assert "beyond the bound of 0%" in outcomes[1].report
    assert "6 requests at load 0.5: median TTFT" in outcomes[1].report
