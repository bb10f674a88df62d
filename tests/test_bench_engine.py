"""The engine benchmark: what it counts, and that it runs where there is no GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ch15_helpers.bench import engine as bench
from ch15_helpers.bench.engine import EngineRow, Load, gpu_suites
from ch15_helpers.bench.records import ENGINE
from ch15_helpers.bench.roofline import generate_limit_s
from ch15_helpers.hardware import Ceilings
from ch15_helpers.model.config import LLAMA3_8B, TINY

CEILINGS = Ceilings(4350.0, 4300.0, {"bfloat16": 757.0}, 17.0, 55.0)


def test_limits_are_those_of_the_comparison() -> None:
    """shared/PERFORMANCE.md: about 7,700 tok/s, 3.5 ms a token, 0.68 s on an H200."""
    named = {load.name: load for suite in gpu_suites() for load in suite.loads}
    assert set(ENGINE) <= set(named)
    many = named["128 requests"]
    assert sum(many.prompts) == pytest.approx(72_700, abs=100)

    def limit(name: str) -> float:
        load = named[name]
        return load.value(load.limit_s(LLAMA3_8B, CEILINGS, torch.bfloat16))

    assert limit("128 requests") == pytest.approx(7700, rel=0.03)
    assert limit("1 request") == pytest.approx(3.5, rel=0.03)
    assert limit("4 prompts of 8000") == pytest.approx(0.68, rel=0.03)


def test_a_limit_counts_each_request_as_long_as_it_runs() -> None:
    even = Load("even", (5, 9), (4, 4))
    least = generate_limit_s(TINY, (5, 9), 4, CEILINGS, torch.bfloat16, 2)
    assert even.limit_s(TINY, CEILINGS, torch.bfloat16) == pytest.approx(least)
    ragged = Load("ragged", (5, 9), (2, 4)).limit_s(TINY, CEILINGS, torch.bfloat16)
    assert Load("short", (5, 9), (2, 2)).limit_s(TINY, CEILINGS, torch.bfloat16) < ragged < least


def test_units_and_ratios_point_the_right_way() -> None:
    assert Load("a", (1,), (50,), "ms/token").value(0.1) == pytest.approx(2.0)
    assert Load("b", (1, 1), (30, 20)).value(0.1) == pytest.approx(500.0)
    fast = EngineRow("m", "l", "tok/s", 90.0, 100.0, 60.0, (1.0,), 1)
    assert (fast.fraction, fast.ratio) == (pytest.approx(0.9), pytest.approx(1.5))
    slow = EngineRow("m", "l", "ms/token", 5.0, 4.0, 4.5, (1.0,), 1)
    assert (slow.fraction, slow.ratio) == (pytest.approx(0.8), pytest.approx(0.9))


def test_it_runs_on_a_cpu_and_stores_every_row(tmp_path: Path) -> None:
    import typer

    app = typer.Typer()
    app.command()(bench.main)
    result = CliRunner().invoke(app, ["--device", "cpu", "--rounds", "1", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "set up: engine" in result.output
    stored = json.loads((tmp_path / "engine.json").read_text())
    assert [row["unit"] for row in stored["rows"]] == ["tok/s", "ms/token", "s", "ms/step"]
    for row in stored["rows"]:
        assert row["achieved"] > 0 and row["peer"] is None and row["steps"] > 0
        assert row["fraction"] is None or 0 < row["fraction"] < 1
    refused = CliRunner().invoke(app, ["--device", "cpu", "--profile"])
    assert refused.exit_code == 2 and "--out" in refused.output
