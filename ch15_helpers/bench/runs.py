"""A run as data: its options, what became of each target, and how it is stored."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ch15_helpers.bench import expectations, profiling
from ch15_helpers.bench.paths import expectations_dir, repo_root
from ch15_helpers.bench.schema import TargetResult
from ch15_helpers.bench.targets import Target
from ch15_helpers.errors import NotebookError, UnknownTargetError

RUN_SCHEMA_VERSION = 1
RESULTS_FILE = "results.json"
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class RunOptions:
    """Flags of ``ch15 run``; None means that the notebook's default stands."""

    profile: str = "none"
    iterations: int | None = None
    device: str = "auto"
    model: str | None = None
    simulate_network: bool = False
    ncu_replay_mode: str | None = None

    def __post_init__(self) -> None:
        profiling.check_profile(self.profile)
        if self.device not in DEVICES:
            raise UnknownTargetError(
                f"unknown device {self.device!r}; expected one of: {', '.join(DEVICES)}"
            )
        if self.iterations is not None and self.iterations < 1:
            raise UnknownTargetError(f"--iterations is {self.iterations}; expected 1 or more")
        modes = profiling.NCU_REPLAY_MODES
        if self.ncu_replay_mode is not None and self.ncu_replay_mode not in modes:
            raise UnknownTargetError(
                f"unknown ncu replay mode {self.ncu_replay_mode!r}; "
                f"expected one of: {', '.join(modes)}"
            )
        if self.ncu_replay_mode is not None and self.profile != "deep_dive":
            raise UnknownTargetError(
                "--ncu-replay-mode has an effect with --profile deep_dive only"
            )

    def parameters(self, profile_dir: Path) -> dict[str, Any]:
        """Notebook parameters: only what was asked for, so that defaults stand otherwise."""
        # A deep dive is timed without Nsight first, with a trace; then it runs under each tool.
        profile = "minimal" if self.profile == "deep_dive" else self.profile
        given: dict[str, Any] = {
            "iterations": self.iterations,
            "device": None if self.device == "auto" else self.device,
            "model": self.model,
            "simulate_network": self.simulate_network or None,
            "profile": None if profile == "none" else profile,
            "out_dir": None if profile == "none" else str(profile_dir),
        }
        return {name: value for name, value in given.items() if value is not None}

    def command(self, targets: Sequence[Target]) -> str:
        """The command line that repeats the run; stored as provenance."""
        words = ["ch15", "run", "--targets", "ch15:" + ",".join(t.name for t in targets)]
        if self.profile != "none":
            words += ["--profile", self.profile]
        if self.iterations is not None:
            words += ["--iterations", str(self.iterations)]
        if self.device != "auto":
            words += ["--device", self.device]
        if self.model is not None:
            words += ["--model", self.model]
        if self.simulate_network:
            words += ["--simulate-network"]
        if self.ncu_replay_mode is not None:
            words += ["--ncu-replay-mode", self.ncu_replay_mode]
        return shlex.join(words)


@dataclass(frozen=True)
class Outcome:
    """What became of one target.

    Attributes:
        result: what it recorded, or None if its notebook failed.
        error: what failed; a target can have both (its numbers stand, its profile is missing).
        comparisons: against the stored expectations of the result's hardware key.
        notes: things to tell the reader, e.g. a profiler that is not on PATH.
    """

    target: str
    result: TargetResult | None
    error: str | None = None
    comparisons: tuple[expectations.Comparison, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        if self.result is None:
            return "failed"
        return expectations.overall(self.comparisons)


@dataclass(frozen=True)
class Run:
    """A finished run, as ``results.json`` stores it."""

    directory: Path
    command: str
    commit: str
    time: str
    profile: str
    outcomes: tuple[Outcome, ...] = field(default=())

    @property
    def ok(self) -> bool:
        """No failure, no regression, no metric that disappeared."""
        bad = ("failed", "regressed", "missing")
        return all(o.error is None and o.verdict not in bad for o in self.outcomes)


def load_run(directory: Path) -> Run:
    """A stored run, judged against the expectations as they are now.

    Raises:
        NotebookError: no ``results.json`` there, or a malformed one.
    """
    path = directory / RESULTS_FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        outcomes = []
        for entry in data["outcomes"]:
            stored = entry["result"]
            result = None if stored is None else TargetResult.from_dict(stored)
            outcomes.append(judged(entry["target"], result, entry["error"], entry["notes"]))
        return Run(
            directory,
            data["command"],
            data["commit"],
            data["time"],
            data["profile"],
            tuple(outcomes),
        )
    except OSError as error:
        raise NotebookError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise NotebookError(f"{path}: not the results of a run: {error}") from error


def store_expectations(finished: Run) -> list[Path]:
    """Make the run's results the expectations; targets that failed keep theirs."""
    good = [o.result for o in finished.outcomes if o.result is not None and o.error is None]
    return expectations.update(
        expectations_dir(),
        good,
        commit=finished.commit,
        command=finished.command,
        time=finished.time,
    )


def commit_id() -> str:
    """HEAD's commit, with ``-dirty`` where chapters or package differ from it; else unknown.

    A machine that holds a copy without its history is told by the variable CH15_COMMIT.
    """
    if "CH15_COMMIT" in os.environ:
        return os.environ["CH15_COMMIT"]
    git = ["git", "-C", str(repo_root())]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return "unknown"
    status = [*git, "status", "--porcelain", "--", "book", "ch15_helpers"]
    changed = subprocess.run(status, capture_output=True, text=True).stdout.strip()
    return head.stdout.strip() + ("-dirty" if changed else "")


def judged(
    target: str, result: TargetResult | None, error: str | None, notes: Sequence[str]
) -> Outcome:
    """An outcome with its result compared to the stored expectations of its hardware key."""
    if result is None:
        return Outcome(target, None, error, notes=tuple(notes))
    stored = expectations.load_key(expectations_dir(), result.key)
    return Outcome(target, result, error, tuple(expectations.compare(result, stored)), tuple(notes))


def save_run(finished: Run) -> None:
    """Write ``results.json`` into the run's folder."""
    expectations.write_json_atomically(
        finished.directory / RESULTS_FILE,
        {
            "schema_version": RUN_SCHEMA_VERSION,
            "command": finished.command,
            "commit": finished.commit,
            "time": finished.time,
            "profile": finished.profile,
            "outcomes": [
                {
                    "target": o.target,
                    "verdict": o.verdict,
                    "error": o.error,
                    "notes": list(o.notes),
                    "comparisons": [
                        {"metric": c.name, "verdict": c.verdict, "reason": c.reason}
                        for c in o.comparisons
                    ],
                    "result": None if o.result is None else o.result.to_dict(),
                }
                for o in finished.outcomes
            ],
        },
    )
