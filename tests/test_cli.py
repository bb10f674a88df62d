"""``ch15`` on small notebooks: exit statuses, messages, what is written."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import MappingProxyType
from typing import Any

import nbformat
import pytest
from click.testing import Result
from nbformat import v4
from typer.testing import CliRunner

from ch15_helpers.bench import targets
from ch15_helpers.bench.nsight import METRICS
from ch15_helpers.bench.results import MIME_TYPE
from ch15_helpers.bench.targets import Target, Validation
from ch15_helpers.cli import app

PARAMETERS = """
iterations = 3
device = "auto"
model = "smollm2"
profile = "none"
out_dir = ""
simulate_network = False
key = "cpu"
"""
# Reads iterations, model, profile and out_dir; declares simulate_network and does not read it.
CHAPTER = """
from pathlib import Path
from IPython.display import display
hardware = {{"name": "Test", "driver": None, "torch": "2", "triton": None, "ceilings": {{
    "read_GBps": 1.0, "copy_GBps": 1.0, "matmul_tflops": {{"float32": 1.0}}, "launch_us": 1.0,
    "host_link_GBps": None}}}}
def metric(name, value, unit, direction):
    return {{"name": name, "value": value, "unit": unit, "kind": "measured", "tolerance": 0.2,
             "direction": direction}}
if profile != "none":
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    (Path(out_dir) / f"{{profile}}.trace.json").write_text("[]")
same = {{"name": "same_tokens", "value": {same}, "unit": "", "kind": "exact", "tolerance": 0.0,
        "direction": "equal"}}
display({{"{mime}": {{
    "target": "{name}", "key": key, "hardware": hardware,
    "parameters": {{"model": model, "device": device}}, "sample_count": iterations, "timings": {{}},
    "metrics": [same, metric("baseline_s", 4.0, "s", "lower"),
                metric("optimised_s", 4.0 / {speedup}, "s", "lower"),
                metric("speedup", {speedup}, "x", "higher")]}}, "text/plain": ""}}, raw=True)
"""


class Book:
    """A checkout with notebooks that record a fixed result, without importing torch."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.runner = CliRunner()

    def chapter(self, name: str, speedup: float = 2.0, same: bool = True) -> None:
        source = CHAPTER.format(name=name, speedup=speedup, same=same, mime=MIME_TYPE)
        self.write(name, PARAMETERS, source)

    def write(self, name: str, parameters: str, *sources: str) -> None:
        cells = [v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
        cells += [v4.new_code_cell(s) for s in sources]
        nbformat.write(v4.new_notebook(cells=cells), self.root / "book" / f"{name}.ipynb")

    def ch15(self, *arguments: str) -> Result:
        return self.runner.invoke(app, list(arguments))

    @property
    def run_dir(self) -> Path:
        return max((self.root / "runs").iterdir())

    @property
    def results(self) -> dict[str, Any]:
        return dict(json.loads((self.run_dir / "results.json").read_text()))

    @property
    def stored(self) -> dict[str, Any]:
        path = self.root / "expectations" / "cpu.json"
        return dict(json.loads(path.read_text())) if path.exists() else {}


@pytest.fixture
def book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Book:
    for folder in ("book", "expectations"):
        (tmp_path / folder).mkdir()
    monkeypatch.setenv("CH15_ROOT", str(tmp_path))
    registry = {n: Target(n, f"{n}.ipynb", f"chapter {n}") for n in ("alpha", "beta", "absent")}
    registry["gpu_only"] = Target("gpu_only", "alpha.ipynb", "needs GPUs", cuda=True, ranks=64)
    monkeypatch.setattr(targets, "TARGETS", MappingProxyType(registry))
    return Book(tmp_path)


def test_help_is_quick_and_does_not_import_torch() -> None:
    times = []
    for _ in range(3):
        start_s = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "ch15_helpers", "--help"],
            capture_output=True,
            text=True,
            check=True,
        )
        times.append(time.perf_counter() - start_s)
        modules = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
        assert not {"torch", "numpy", "papermill", "IPython"} & modules
        for command in ("list-targets", "run", "compare", "validate"):
            assert command in done.stdout
    assert min(times) < 1.0


def test_list_targets_shows_those_with_a_notebook_and_their_needs(book: Book) -> None:
    book.chapter("alpha")
    done = book.ch15("list-targets")
    assert done.exit_code == 0
    lines = done.output.splitlines()
    assert any("alpha" in line and "cpu" in line and "chapter alpha" in line for line in lines)
    assert any("gpu_only" in line and "cuda, 64 ranks" in line for line in lines)
    assert "absent" not in done.output


def test_a_run_shows_stores_and_judges(book: Book) -> None:
    book.chapter("alpha")
    done = book.ch15("run", "--targets", "ch15:alpha")
    assert done.exit_code == 0, done.output
    for part in ("4 s", "2 s", "2×", "new", "nothing is stored for alpha on cpu"):
        assert part in done.output
    assert book.stored == {}  # reading never writes
    assert book.results["outcomes"][0]["verdict"] == "new"
    assert (book.run_dir / "alpha.ipynb").exists()

    assert book.ch15("run", "--targets", "ch15:alpha", "--update-expectations").exit_code == 0
    provenance = book.stored["targets"]["alpha"]["provenance"]
    assert provenance["command"] == "ch15 run --targets ch15:alpha"
    assert provenance["parameters"]["model"] == "smollm2"
    assert provenance["parameters"]["simulate_network"] is False  # a default counts too
    stored = book.stored
    again = book.ch15("run", "--targets", "ch15:alpha")
    assert again.exit_code == 0
    assert book.results["outcomes"][0]["verdict"] == "ok"
    assert book.stored == stored


def test_a_regression_exits_1_and_an_update_accepts_it(book: Book) -> None:
    book.chapter("alpha", speedup=4.0)
    book.ch15("run", "--targets", "ch15:alpha", "--update-expectations")
    book.chapter("alpha", speedup=2.0)
    done = book.ch15("run", "--targets", "ch15:alpha")
    assert done.exit_code == 1
    assert "regressed speedup: 2×, expected 4× (-50.0%)" in done.output
    assert book.stored["targets"]["alpha"]["metrics"][-1]["value"] == 4.0
    accepted = book.ch15("run", "--targets", "ch15:alpha", "--update-expectations")
    assert accepted.exit_code == 0
    assert book.stored["targets"]["alpha"]["metrics"][-1]["value"] == 2.0


def test_a_failing_cell_exits_1_keeps_the_traceback_and_runs_the_others(book: Book) -> None:
    book.write("alpha", PARAMETERS, "1/0")
    book.chapter("beta")
    done = book.ch15("run", "--targets", "ch15:alpha,beta", "--update-expectations")
    assert done.exit_code == 1
    assert "alpha.ipynb: cell 2 failed with ZeroDivisionError: division by zero" in done.output
    assert "ZeroDivisionError" in (book.run_dir / "alpha.ipynb").read_text()
    assert [o["verdict"] for o in book.results["outcomes"]] == ["failed", "new"]
    assert list(book.stored["targets"]) == ["beta"]  # only what ran is stored


def test_a_failure_keeps_the_old_expectation(book: Book) -> None:
    book.chapter("alpha")
    book.ch15("run", "--targets", "ch15:alpha", "--update-expectations")
    stored = book.stored
    book.write("alpha", PARAMETERS, "1/0")
    assert book.ch15("run", "--targets", "ch15:alpha", "--update-expectations").exit_code == 1
    assert book.stored == stored


def test_wrong_tokens_exit_1_and_cannot_be_stored(book: Book) -> None:
    book.chapter("alpha")
    book.ch15("run", "--targets", "ch15:alpha", "--update-expectations")
    stored = book.stored
    book.chapter("alpha", same=False)
    done = book.ch15("run", "--targets", "ch15:alpha")
    assert done.exit_code == 1
    assert "regressed same_tokens: no, expected yes" in done.output
    update = book.ch15("run", "--targets", "ch15:alpha", "--update-expectations")
    assert update.exit_code != 0
    assert "tokens differ" in update.output
    assert book.stored == stored


def test_a_notebook_that_records_nothing_exits_1(book: Book) -> None:
    book.write("alpha", PARAMETERS, "print('hello')")
    done = book.ch15("run", "--targets", "ch15:alpha")
    assert done.exit_code == 1
    assert "recorded no result for alpha" in done.output


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--targets", "ch15:gamma"], ["unknown target 'gamma'", "alpha, beta"]),
        (["--targets", "ch14"], ["unknown target 'ch14'", "ch15:alpha"]),
        (["--targets", "alpha"], ["unknown target 'alpha'", "ch15:alpha"]),
        (["--targets", "ch15:"], ["unknown target ''", "alpha, beta"]),
        (["--targets", "ch15:absent"], ["unknown target 'absent'"]),
        (["--targets", "ch15:alpha", "--profile", "full"], ["none, minimal, deep_dive"]),
        (["--targets", "ch15:alpha", "--device", "tpu"], ["auto, cpu, cuda"]),
        (["--targets", "ch15:alpha", "--iterations", "0"], ["expected 1 or more"]),
        (["--targets", "ch15:alpha", "--iterations", "few"], ["--iterations", "int"]),
        (["--targets", "ch15:alpha", "--simulate-network"], ["never uses", "simulate_network"]),
        (["--targets", "ch15:beta", "--model", "random:TINY"], ["has no parameter 'model'"]),
        (["--targets", "ch15:alpha", "--ncu-replay-mode", "kernel"], ["deep_dive only"]),
        (
            ["--targets", "ch15:alpha", "--profile", "deep_dive", "--ncu-replay-mode", "x"],
            ["kernel, application"],
        ),
        (["--targets", "ch15:gpu_only"], ["needs cuda, 64 ranks", "here are: cpu"]),
        (["--targets", "ch15:alpha", "--turbo"], ["--turbo"]),
        ([], ["--targets"]),
    ],
)
def test_a_wrong_request_exits_2_says_what_is_valid_and_runs_nothing(
    book: Book, arguments: list[str], messages: list[str]
) -> None:
    book.chapter("alpha")
    book.write("beta", "iterations = 3", "print(iterations)")
    done = book.ch15("run", *arguments)
    assert done.exit_code == 2, done.output
    for message in messages:
        assert message in done.output
    assert not (book.root / "runs").exists()


def test_an_absent_device_exits_2(book: Book, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    book.chapter("alpha")
    done = book.ch15("run", "--targets", "ch15:alpha", "--device", "cuda")
    assert done.exit_code == 2
    assert "'cuda' is not here; expected auto or one of: cpu" in done.output


def test_a_malformed_expectations_file_exits_2_before_anything_runs(book: Book) -> None:
    book.chapter("alpha")
    (book.root / "expectations" / "h200.json").write_text('{"schema_version": 9}')
    done = book.ch15("run", "--targets", "ch15:alpha")
    assert done.exit_code == 2
    assert "h200.json" in done.output
    assert not (book.root / "runs").exists()


def test_flags_reach_the_notebook_and_out_takes_the_run(book: Book, tmp_path: Path) -> None:
    book.chapter("alpha")
    out = tmp_path / "my run"
    arguments = ["--iterations", "5", "--device", "cpu", "--model", "random:TINY"]
    done = book.ch15("run", "--targets", "ch15:alpha", *arguments, "--out", str(out))
    assert done.exit_code == 0, done.output
    run = json.loads((out / "results.json").read_text())
    result = run["outcomes"][0]["result"]
    assert result["sample_count"] == 5
    assert result["parameters"]["model"] == "random:TINY"
    assert result["parameters"]["device"] == "cpu"
    assert run["command"] == "ch15 run --targets ch15:alpha " + " ".join(arguments)
    assert not (book.root / "runs").exists()


def test_other_parameters_are_said_to_be_not_comparable(book: Book) -> None:
    book.chapter("alpha", speedup=4.0)
    book.ch15("run", "--targets", "ch15:alpha", "--update-expectations")
    book.chapter("alpha", speedup=2.0)
    done = book.ch15("run", "--targets", "ch15:alpha", "--model", "random:TINY")
    assert done.exit_code == 0
    assert "not comparable: model is 'random:TINY', stored with 'smollm2'" in done.output


def test_compare_shows_a_stored_run_and_judges_it_now(book: Book) -> None:
    book.chapter("alpha")
    book.chapter("beta", speedup=3.0)
    fresh = book.ch15("compare", "--examples", "alpha", "beta")
    assert fresh.exit_code == 0
    assert "2×" in fresh.output
    assert "3×" in fresh.output
    run_dir = str(book.run_dir)
    only = book.ch15("compare", "--from", run_dir, "--examples", "beta")
    assert "alpha" not in only.output.split("results:")[0].split("\n", 2)[2]
    book.chapter("alpha", speedup=8.0)
    book.ch15("run", "--targets", "ch15:alpha", "--update-expectations")
    judged = book.ch15("compare", "--from", run_dir)
    assert judged.exit_code == 1
    assert "regressed speedup: 2×, expected 8×" in judged.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["--from", "nowhere"],
        ["--examples", "gamma"],
        ["gamma"],
        ["--profile", "full"],
        ["--from", "RUN", "--examples", "gamma"],
        ["--from", "RUN", "--profile", "minimal"],
    ],
)
def test_compare_refuses_what_is_not_there(book: Book, arguments: list[str]) -> None:
    book.chapter("alpha")
    run = {"schema_version": 1, "command": "c", "commit": "x", "time": "t", "profile": "none"}
    folder = book.root / "RUN"
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({**run, "outcomes": []}))
    done = book.ch15("compare", *[a.replace("RUN", str(folder)) for a in arguments])
    assert done.exit_code == 2, done.output


def test_a_broken_stored_run_exits_2(book: Book, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"outcomes": [{}]}')
    done = book.ch15("compare", "--from", str(tmp_path))
    assert done.exit_code == 2
    assert "not the results of a run" in done.output.replace("\n", " ")


# Profiles


def test_minimal_profile_lands_in_the_run(book: Book) -> None:
    book.chapter("alpha")
    done = book.ch15("run", "--targets", "ch15:alpha", "--profile", "minimal")
    assert done.exit_code == 0, done.output
    trace = book.run_dir / "profiles" / "alpha" / "minimal.trace.json"
    assert trace.exists()
    assert str(trace) in done.output


def test_a_chapter_that_profiles_nothing_is_a_failure(book: Book) -> None:
    book.chapter("alpha")
    path = book.root / "book" / "alpha.ipynb"
    path.write_text(path.read_text().replace('profile != \\"none\\"', "out_dir == profile"))
    done = book.ch15("run", "--targets", "ch15:alpha", "--profile", "minimal")
    assert done.exit_code == 1
    assert "the chapter profiled nothing" in done.output


FAKE_TOOL = """#!/bin/sh
echo "$@" >> "{log}"
if [ "$1" = --import ]; then cat "{log}.csv"; exit; fi
for word in "$@"; do
  case "$word" in
    --export=*) report="${{word#--export=}}.ncu-rep";;
    --output=*) report="${{word#--output=}}.nsys-rep";;
  esac
done
while :; do case "$1" in -*|profile) shift;; *) break;; esac; done
"$@" || exit $?
{last}
"""


def fake_tool(folder: Path, name: str, last: str) -> Path:
    """A profiler that runs what it wraps and then writes its report, or does not."""
    folder.mkdir(exist_ok=True)
    log = folder / f"{name}.args"
    path = folder / name
    path.write_text(FAKE_TOOL.format(log=log, last=last))
    path.chmod(0o755)
    return log


def test_deep_dive_wraps_the_notebook_and_says_what_is_not_installed(
    book: Book, monkeypatch: pytest.MonkeyPatch
) -> None:
    book.chapter("alpha")
    log = fake_tool(book.root / "bin", "ncu", 'touch "$report"')
    header = ",".join(f'"{name}"' for name in ("ID", "Kernel Name", *METRICS.values()))
    rows = '"","","ns","%","%"\n"0","attend(int)","5,000","91.0","20.0"\n'
    log.with_suffix(".args.csv").write_text(f"{header}\n{rows}")
    monkeypatch.setenv("PATH", f"{book.root / 'bin'}:/usr/bin:/bin")
    done = book.ch15(
        "run", "--targets", "ch15:alpha", "--profile", "deep_dive",
        "--ncu-replay-mode", "application", "--iterations", "2",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "--replay-mode=application" in log.read_text()
    profiles = book.run_dir / "profiles" / "alpha"
    wrapped = (profiles / "ncu.ipynb").read_text()
    assert 'profile = \\"deep_dive\\"' in wrapped
    assert "iterations = 2" in wrapped
    # The wrapped run is another execution; the recorded times are from the one without Nsight.
    assert 'profile = \\"minimal\\"' in (book.run_dir / "alpha.ipynb").read_text()
    assert str(profiles / "nsight_compute.ncu-rep") in done.output
    assert "attend: 1 launches of 5.0 µs, DRAM at 91%" in done.output
    assert "nsys is not on PATH" in done.output


@pytest.mark.parametrize(
    ("last", "message"),
    [("exit 9", "ended with status 9"), ("true", "wrote no nsight_systems.nsys-rep")],
)
def test_a_profiler_that_fails_is_a_failure(
    book: Book, monkeypatch: pytest.MonkeyPatch, last: str, message: str
) -> None:
    book.chapter("alpha")
    fake_tool(book.root / "bin", "nsys", last)
    monkeypatch.setenv("PATH", f"{book.root / 'bin'}:/usr/bin:/bin")
    done = book.ch15("run", "--targets", "ch15:alpha", "--profile", "deep_dive")
    assert done.exit_code == 1
    assert message in done.output
    assert book.results["outcomes"][0]["result"] is not None  # the times stand


# validate


def passing() -> Validation:
    return Validation(True, "p99 decode latency 3 ms, budget 5 ms")


def failing() -> Validation:
    return Validation(False, "p99 decode latency 7 ms, budget 5 ms")


@pytest.mark.parametrize(("function", "status"), [("passing", 0), ("failing", 1)])
def test_validate_reports_and_exits_by_the_bound(
    book: Book, monkeypatch: pytest.MonkeyPatch, function: str, status: int
) -> None:
    book.chapter("alpha")
    bound = Target("alpha", "alpha.ipynb", "", validator=f"{__name__}:{function}")
    monkeypatch.setattr(targets, "TARGETS", MappingProxyType({"alpha": bound}))
    done = book.ch15("validate", "alpha")
    assert done.exit_code == status
    assert "budget 5 ms" in done.output


def test_validate_without_a_bound_says_which_targets_have_one(
    book: Book, monkeypatch: pytest.MonkeyPatch
) -> None:
    book.chapter("alpha")
    book.chapter("beta")
    registry = {
        "alpha": Target("alpha", "alpha.ipynb", ""),
        "beta": Target("beta", "beta.ipynb", "", validator=f"{__name__}:passing"),
    }
    monkeypatch.setattr(targets, "TARGETS", MappingProxyType(registry))
    done = book.ch15("validate", "alpha")
    assert done.exit_code == 2
    assert "targets with one: beta" in done.output
    assert book.ch15("validate", "gamma").exit_code == 2


def test_every_registered_target_of_the_book_is_listed() -> None:
    """The real registry: names are keys, notebooks end in .ipynb, validators can be imported."""
    for name, target in targets.TARGETS.items():
        assert name == target.name
        assert target.notebook.endswith(".ipynb")
        assert target.summary
        if target.validator:
            assert callable(targets.validator_of(target, targets.TARGETS))
