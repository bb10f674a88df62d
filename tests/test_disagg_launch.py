"""The forms for several nodes, here with two processes on one: torchrun, and mpirun over UCX."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ch15_helpers import Engine, EngineConfig, SamplingParams, load_model

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import mpi  # noqa: E402

WORK = ["--model", "random:TINY", "--requests", "3", "--prompt-tokens", "40", "--max-tokens", "6"]


def expected() -> list[list[int]]:
    """Tokens of one engine for the prompts of ``launch.coordinate``."""
    engine = Engine(load_model("random:TINY", device="cpu"), EngineConfig(num_blocks=64))
    prompts = [[1 + (7 * number + k) % 97 for k in range(40)] for number in range(3)]
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    return [output.token_ids for output in engine.generate(prompts, params)]


def make(target: str, *, arguments: list[str], **variables: Any) -> list[dict[str, Any]]:
    """Run a make target in this environment; returns the JSON lines that it printed."""
    words = " ".join([*arguments, "--engine", """'{"num_blocks": 64}'"""])
    settings = [f"{name}={value}" for name, value in variables.items()]
    command = ["make", "-o", f"{sys.prefix}/.ready", f"VENV={sys.prefix}", f"ARGS={words}"]
    done = subprocess.run(
        [*command, *settings, target],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def check(lines: list[dict[str, Any]], transport: str) -> None:
    *answers, summary = lines
    assert [answer["tokens"] for answer in answers] == expected()
    assert {(answer["prefill_rank"], answer["decode_rank"]) for answer in answers} == {(0, 1)}
    assert summary["transport"] == transport and summary["MB_handed_over"] > 0


def test_two_ranks_of_torchrun() -> None:
    arguments = [*WORK, "--simulate-network", "100g", "--whole"]
    lines = make("torchrun-decode", arguments=arguments, NNODES=1, NP=2)
    check(lines, "gloo")
    assert lines[-1]["kind"] == "modelled"


def test_two_ranks_of_mpirun_over_ucx() -> None:
    if mpi.find() is None and os.environ.get("CI", "").lower() not in ("1", "true", "yes"):
        pytest.skip(mpi.HINT)
    lines = make("mpi-decode", arguments=WORK, NP=2)
    check(lines, "mpi")
    assert lines[-1]["kind"] == "measured"
