"""Profiles: what each writes, and what wraps Nsight."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ch15_helpers.bench import profiling
from ch15_helpers.errors import UnknownTargetError


def test_none_writes_nothing(tmp_path: Path) -> None:
    with profiling.profiled("step", "none", tmp_path):
        torch.ones(4).sum()
    assert list(tmp_path.iterdir()) == []


def test_minimal_writes_a_summary_and_a_chrome_trace(tmp_path: Path) -> None:
    with profiling.profiled("step", "minimal", tmp_path / "new"):
        torch.mm(torch.ones(64, 64), torch.ones(64, 64))
    assert "aten::mm" in (tmp_path / "new" / "step.summary.txt").read_text()
    trace = json.loads((tmp_path / "new" / "step.trace.json").read_text())
    assert any(event.get("name") == "aten::mm" for event in trace["traceEvents"])


def test_an_error_in_the_body_is_not_swallowed(tmp_path: Path) -> None:
    for profile in profiling.PROFILES:
        with pytest.raises(ZeroDivisionError), profiling.profiled("step", profile, tmp_path):
            raise ZeroDivisionError


def test_unknown_names_list_the_valid_ones(tmp_path: Path) -> None:
    with (
        pytest.raises(UnknownTargetError, match="none, minimal, deep_dive"),
        profiling.profiled("step", "full", tmp_path),
    ):
        pass
    with pytest.raises(UnknownTargetError, match="kernel, application"):
        profiling.deep_dive_tools(tmp_path, "range")


def test_only_tools_on_path_are_used_and_the_others_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "bin" / "ncu"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(fake.parent))
    tools, missing = profiling.deep_dive_tools(tmp_path, "application")
    (ncu,) = tools
    assert ncu.prefix[0] == "ncu"
    assert "--replay-mode=application" in ncu.prefix
    assert "--target-processes=all" in ncu.prefix  # the kernel is a child process
    assert f"--export={ncu.report.with_suffix('')}" in ncu.prefix
    assert missing == ["nsys is not on PATH: no nsight_systems.nsys-rep was made"]
