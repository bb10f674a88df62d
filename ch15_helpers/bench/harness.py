"""Running targets headlessly: execute notebooks, read what they recorded, judge it."""

from __future__ import annotations

import datetime as dt
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ch15_helpers.bench import expectations, notebooks, nsight, profiling, results
from ch15_helpers.bench.paths import book_dir, expectations_dir, runs_dir
from ch15_helpers.bench.runs import Outcome, Run, RunOptions, commit_id, judged, save_run
from ch15_helpers.bench.schema import SchemaError, TargetResult
from ch15_helpers.bench.targets import Target
from ch15_helpers.errors import Ch15Error, NotebookError

DEEP_DIVE_TIMEOUT_S = 3600

# (notebook, cells done, cells in all)
OnProgress = Callable[[str, int, int], None]


def check(targets: Sequence[Target], options: RunOptions) -> None:
    """Everything that can be refused before a notebook is executed.

    Raises:
        UnknownTargetError: a flag that one of the chapters cannot honour.
        HardwareError: a device that is not here or that a target needs.
        ExpectationsError: a malformed expectations file.
    """
    expectations.load_all(expectations_dir())
    if options.device == "cuda":
        from ch15_helpers.hardware import resolve_device

        resolve_device("cuda")
    for target in targets:
        target.check_needs(options.device)
        notebooks.check_parameters(book_dir() / target.notebook, options.parameters(Path()))


def run(
    targets: Sequence[Target],
    options: RunOptions,
    out: Path | None = None,
    on_progress: OnProgress | None = None,
) -> Run:
    """Execute the targets' notebooks, each once, and judge what they recorded.

    A notebook that fails does not stop the others. Writes ``results.json`` and the executed
    notebooks into ``out`` (default ``runs/<time>/``), nothing else.

    Raises:
        As :func:`check`, before anything is executed.
    """
    check(targets, options)
    now = dt.datetime.now(dt.UTC)
    directory = (out or _fresh_directory(now)).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    by_notebook: dict[str, list[Target]] = {}
    for target in targets:
        by_notebook.setdefault(target.notebook, []).append(target)
    outcomes: dict[str, Outcome] = {}
    for notebook, group in by_notebook.items():
        for outcome in _run_notebook(notebook, group, options, directory, on_progress):
            outcomes[outcome.target] = outcome
    finished = Run(
        directory=directory,
        command=options.command(targets),
        commit=commit_id(),
        time=now.isoformat(timespec="seconds"),
        profile=options.profile,
        outcomes=tuple(outcomes[t.name] for t in targets),
    )
    save_run(finished)
    return finished


def _run_notebook(
    notebook: str,
    group: Sequence[Target],
    options: RunOptions,
    directory: Path,
    on_progress: OnProgress | None,
) -> list[Outcome]:
    source, profile_dir = book_dir() / notebook, directory / "profiles" / Path(notebook).stem
    parameters = options.parameters(profile_dir)

    def on_cell(done: int, total: int) -> None:
        if on_progress is not None:
            on_progress(notebook, done, total)

    try:
        executed = notebooks.execute(source, directory / notebook, parameters, on_cell=on_cell)
        recorded = {r.target: r for r in results.read_results(executed)}
    except (NotebookError, SchemaError) as error:
        return [Outcome(t.name, None, str(error)) for t in group]
    problem, notes = _profile_outcome(source, parameters, options, profile_dir)
    outcomes = []
    for target in group:
        result = recorded.get(target.name)
        if result is None:
            reason = f"{notebook} ran, but recorded no result for {target.name}"
            outcomes.append(Outcome(target.name, None, reason))
            continue
        defaults = notebooks.inspect_parameters(source).defaults
        result = _with_parameters(result, {**defaults, **parameters})
        outcomes.append(judged(target.name, result, problem, notes))
    return outcomes


def _profile_outcome(
    source: Path, parameters: Mapping[str, Any], options: RunOptions, profile_dir: Path
) -> tuple[str | None, list[str]]:
    """What is wrong with the profile that was asked for, and what to tell about it."""
    if options.profile == "none":
        return None, []
    traces = sorted(profile_dir.glob("*.trace.json"))
    if not traces:
        return f"no trace was written to {profile_dir}: the chapter profiled nothing", []
    notes = [f"profile: {trace}" for trace in traces]
    if options.profile == "minimal":
        return None, notes
    mode = options.ncu_replay_mode or "kernel"
    tools, missing = profiling.deep_dive_tools(profile_dir, mode)
    problems = []
    for tool in tools:
        problem = _run_under(tool, source, {**parameters, "profile": "deep_dive"}, profile_dir)
        if problem:
            problems.append(problem)
        else:
            notes.append(f"profile: {tool.report}")
            notes += _kernel_notes(tool)
    return "; ".join(problems) or None, notes + missing


def _kernel_notes(tool: profiling.Tool) -> list[str]:
    """What Nsight Compute measured of the kernels that took most time."""
    if tool.name != "ncu":
        return []
    try:
        return nsight.describe(nsight.kernel_figures(tool.report))
    except Ch15Error as error:
        return [str(error)]


def _run_under(
    tool: profiling.Tool, source: Path, parameters: Mapping[str, Any], profile_dir: Path
) -> str | None:
    """Execute the notebook again in a process of its own under a profiler; None if that worked.

    The profiler follows child processes, so it sees the kernel, and it ends after the kernel has
    shut down, so the report is complete.
    """
    log = profile_dir / f"{tool.name}.log"
    command = [
        *tool.prefix,
        *(sys.executable, "-m", "papermill", str(source)),
        *(str(profile_dir / f"{tool.name}.ipynb"), "--cwd", str(source.parent)),
        *("--kernel", notebooks.KERNEL_NAME, "--language", "python", "--no-progress-bar"),
        *("--parameters_yaml", json.dumps(dict(parameters))),
    ]
    with log.open("w", encoding="utf-8") as file:
        try:
            done = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, timeout=DEEP_DIVE_TIMEOUT_S
            )
        except subprocess.TimeoutExpired:
            return f"{tool.name} ran for more than {DEEP_DIVE_TIMEOUT_S} s; its output: {log}"
    if done.returncode:
        return f"{tool.name} ended with status {done.returncode}; its output: {log}"
    if not tool.report.exists():
        return f"{tool.name} wrote no {tool.report.name}; its output: {log}"
    return None


def _with_parameters(result: TargetResult, given: Mapping[str, Any]) -> TargetResult:
    """The notebook's parameters beside those it recorded; the recorded, resolved ones win."""
    exempt = expectations.INCOMPARABLE_EXEMPT
    merged = {k: v for k, v in given.items() if k not in exempt} | dict(result.parameters)
    if "iterations" in given:
        merged.setdefault("iterations", given["iterations"])
    return TargetResult.from_dict({**result.to_dict(), "parameters": merged})


def _fresh_directory(now: dt.datetime) -> Path:
    stem = now.strftime("%Y%m%dT%H%M%SZ")
    candidates = [runs_dir() / stem, *(runs_dir() / f"{stem}-{i}" for i in range(2, 100))]
    free = next((c for c in candidates if not c.exists()), None)
    if free is None:
        raise Ch15Error(f"no free folder for this run under {runs_dir()}; pass --out DIR")
    return free
