"""Notebook parameters, execution, normalising, and the staged book."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat import v4
from typer.testing import CliRunner

from ch15_helpers.bench import normalise, notebooks, staging
from ch15_helpers.errors import NotebookError, UnknownTargetError

PARAMETERS = 'device = "auto"\niterations: int = 3\nunused = None\npath = str("x")'
WIDGETS = """
import ipywidgets as w
slider = w.IntSlider(max=3)
stack = w.Stack([w.HTML(f"<b>{i}</b>") for i in range(4)], selected_index=0)
link = w.jslink((slider, "value"), (stack, "selected_index"))
other = w.jslink((slider, "value"), (w.IntText(), "value"))
w.VBox([slider, stack])
"""


def code(source: str, *tags: str) -> Any:
    return v4.new_code_cell(source, metadata={"tags": list(tags)})


def write(path: Path, *cells: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(v4.new_notebook(cells=list(cells)), path)
    return path


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with an empty book; its path has a space in it."""
    folder = tmp_path / "a book"
    (folder / "book").mkdir(parents=True)
    (folder / "expectations").mkdir()
    monkeypatch.setenv("CH15_ROOT", str(folder))
    return folder


# Parameters


def test_parameters_with_defaults_and_whether_they_are_read(tmp_path: Path) -> None:
    path = write(
        tmp_path / "n.ipynb",
        v4.new_markdown_cell("unused"),
        code(PARAMETERS, "parameters"),
        code("%matplotlib inline\nprint(device, [path for _ in range(iterations)])"),
        code("unused = 5", "parameters"),
    )
    found = notebooks.inspect_parameters(path)
    assert found.defaults == {
        "device": "auto",
        "iterations": 3,
        "unused": None,
        "path": "str('x')",
    }
    assert found.used == {"device", "iterations", "path"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nope", "has no parameter 'nope'; parameters with an effect: device"),
        ("unused", "declares but never uses parameter 'unused'"),
    ],
)
def test_a_parameter_without_effect_is_refused_before_execution(
    tmp_path: Path, name: str, message: str
) -> None:
    path = write(tmp_path / "n.ipynb", code(PARAMETERS, "parameters"), code("print(device)"))
    with pytest.raises(UnknownTargetError, match=message):
        notebooks.execute(path, tmp_path / "out.ipynb", {name: 1})
    assert not (tmp_path / "out.ipynb").exists()


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"nbformat": 3, "cells": []}'])
def test_what_is_no_notebook_is_an_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "n.ipynb"
    path.write_text(content)
    with pytest.raises(NotebookError, match=r"n\.ipynb"):
        notebooks.read(path)


def test_a_cell_that_is_no_python_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "n.ipynb", code("x = 1"), code("x = = 2"))
    with pytest.raises(NotebookError, match="cell 1: not Python"):
        notebooks.inspect_parameters(path)


# Execution


def test_execution_sets_parameters_runs_in_the_folder_and_reports_cells(tmp_path: Path) -> None:
    path = write(
        tmp_path / "sub" / "n.ipynb",
        code("iterations = 3", "parameters"),
        code("import os\nprint(iterations, os.path.basename(os.getcwd()))"),
    )
    before = path.read_bytes()
    seen: list[tuple[int, int]] = []
    executed = notebooks.execute(
        path, tmp_path / "out" / "n.ipynb", {"iterations": 7}, on_cell=lambda *c: seen.append(c)
    )
    assert executed["cells"][-1]["outputs"][0]["text"] == ["7 sub\n"]
    assert seen == [(1, 3), (2, 3), (3, 3)]  # papermill adds a cell with the parameters
    assert path.read_bytes() == before


def test_a_failing_cell_is_named_and_its_traceback_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "n.ipynb", code("a = 1"), code("1/0"), code("print('after')"))
    out = tmp_path / "out.ipynb"
    with pytest.raises(NotebookError, match=r"n\.ipynb: cell 2 failed with ZeroDivisionError"):
        notebooks.execute(path, out)
    text = out.read_text()
    assert "Traceback" in text
    assert "ZeroDivisionError" in text
    assert "after\\n" not in text.replace("print('after')", "")


def test_a_cell_that_takes_too_long_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "n.ipynb", code("while True: pass"))
    with pytest.raises(NotebookError, match="more than 2 s"):
        notebooks.execute(path, tmp_path / "out.ipynb", cell_timeout_s=2)


def test_a_dead_kernel_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "n.ipynb", code("import os\nos._exit(3)"))
    with pytest.raises(NotebookError, match="kernel died"):
        notebooks.execute(path, tmp_path / "out.ipynb")


# Normal form


@pytest.fixture(scope="module")
def executions(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The same widget notebook, executed in two kernels."""
    folder = tmp_path_factory.mktemp("widgets")
    cells = [
        v4.new_markdown_cell("# Widgets"),
        code("iterations = 3", "parameters"),
        code(WIDGETS),
        code("assert iterations == 4\nprint('a', flush=True)\nprint('b', flush=True)\nobject()"),
        code("slider"),
    ]
    runs = []
    for number in range(2):
        path = write(folder / f"{number}.ipynb", *copy.deepcopy(cells))
        runs.append(notebooks.execute(path, folder / f"{number}-out.ipynb", {"iterations": 4}))
    return runs


def test_two_executions_give_the_same_bytes(executions: list[dict[str, Any]]) -> None:
    assert json.dumps(executions[0]) != json.dumps(executions[1])
    first, second = (normalise.dumps(normalise.normalise(n)) for n in executions)
    assert first == second


def test_normalising_is_idempotent_and_pure(executions: list[dict[str, Any]]) -> None:
    before = json.dumps(executions[0])
    once = normalise.normalise(executions[0])
    assert json.dumps(executions[0]) == before
    assert normalise.normalise(once) == once
    text = normalise.dumps(once)
    assert normalise.dumps(normalise.normalise(json.loads(text))) == text


def test_widgets_still_point_at_each_other(executions: list[dict[str, Any]]) -> None:
    nb = normalise.normalise(executions[0])
    state = nb["metadata"]["widgets"][normalise.STATE_MIME]["state"]
    old = executions[0]["metadata"]["widgets"][normalise.STATE_MIME]["state"]
    assert len(state) == len(old)
    assert not set(state) & set(old)
    references = set(re.findall(r"IPY_MODEL_([0-9a-f]{32})", json.dumps(state)))
    assert references
    assert references <= set(state)
    shown = [
        o["data"][normalise.VIEW_MIME]["model_id"]
        for c in nb["cells"]
        for o in c.get("outputs", [])
        if normalise.VIEW_MIME in o.get("data", {})
    ]
    assert [state[m]["model_name"] for m in shown] == ["VBoxModel", "IntSliderModel"]
    links = [m["state"] for m in state.values() if m["model_name"] == "LinkModel"]
    targets = {state[m["target"][0].removeprefix("IPY_MODEL_")]["model_name"] for m in links}
    assert targets == {"StackModel", "IntTextModel"}
    assert {m["source"][0].removeprefix("IPY_MODEL_") for m in links} == {shown[1]}


def test_normal_form_drops_what_tools_add(executions: list[dict[str, Any]]) -> None:
    nb = normalise.normalise(executions[0])
    assert [c["metadata"] for c in nb["cells"]] == [{}, {"tags": ["parameters"]}, {}, {}, {}]
    assert set(nb["metadata"]) == {"kernelspec", "language_info", "widgets"}
    assert "iterations = 4" not in json.dumps(nb)  # the injected cell
    code_cells = [c for c in nb["cells"] if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in code_cells] == [1, 2, 3, 4]
    stream, shown = code_cells[2]["outputs"]
    assert stream["text"] == "a\nb\n"
    assert shown["execution_count"] == 3
    assert shown["data"]["text/plain"] == "<object at 0x0>"
    nbformat.validate(nbformat.from_dict(nb))


def test_cell_ids_follow_content_and_stay_unique() -> None:
    def ids(*sources: str) -> list[str]:
        nb = v4.new_notebook(cells=[v4.new_code_cell(s) for s in sources])
        return [c["id"] for c in normalise.normalise(nb)["cells"]]

    assert ids("a", "b", "c") == [*ids("a"), *ids("b"), *ids("c")]
    assert len(set(ids("a", "a", "a"))) == 3
    assert ids("x", "a")[1] == ids("a")[0]


def test_a_stripped_notebook_stays_stripped() -> None:
    nb = normalise.normalise(v4.new_notebook(cells=[v4.new_code_cell("1")]))
    assert nb["cells"][0]["execution_count"] is None


# The staged book


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def test_staging_executes_what_changed_and_leaves_the_checkout_alone(root: Path) -> None:
    book, staged = root / "book", root / "_build" / "notebooks"
    write(book / "one.ipynb", code("print(6 * 7)"))
    write(book / "two.ipynb", code("print('two')"))
    (book / "intro.md").write_text("# Intro")
    (book / "old.md").write_text("old")
    before = snapshot(book)
    assert [p.name for p in staging.stage_book()] == ["one.ipynb", "two.ipynb"]
    assert snapshot(book) == before
    assert notebooks.read(staged / "one.ipynb")["cells"][0]["outputs"][0]["text"] == ["42\n"]
    first = snapshot(staged)
    assert sorted(first) == ["intro.md", "old.md", "one.ipynb", "two.ipynb"]

    assert staging.stage_book() == []
    assert snapshot(staged) == first  # nor a time stamp, so Sphinx builds nothing again

    write(book / "two.ipynb", code("print('new')"))
    (book / "old.md").unlink()
    assert [p.name for p in staging.stage_book()] == ["two.ipynb"]
    second = snapshot(staged)
    assert sorted(second) == ["intro.md", "one.ipynb", "two.ipynb"]
    assert second["one.ipynb"] == first["one.ipynb"]
    assert staging.stage_book(force=True) == [book / "one.ipynb", book / "two.ipynb"]
    assert snapshot(staged) == second


def test_expectations_and_sources_decide_outputs_do_not(root: Path) -> None:
    path = write(root / "book" / "n.ipynb", code("1 + 1"))
    before = staging.fingerprint(path)
    nb = notebooks.read(path)
    nb["cells"][0]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "x"}]
    path.write_text(json.dumps(nb))
    assert staging.fingerprint(path) == before
    nb["cells"][0]["metadata"]["tags"] = ["nbval-ignore-output"]
    path.write_text(json.dumps(nb))
    tagged = staging.fingerprint(path)
    assert tagged != before
    (root / "expectations" / "cpu.json").write_text("{}")
    assert staging.fingerprint(path) != tagged


@pytest.mark.parametrize("run", [staging.execute_in_place, staging.stage_book])
def test_a_failing_notebook_is_kept_and_the_book_unchanged(
    root: Path, run: Callable[[], list[Path]]
) -> None:
    write(root / "book" / "bad.ipynb", code("1/0"))
    before = snapshot(root / "book")
    for _ in range(2):  # a failure leaves no stamp
        with pytest.raises(NotebookError, match=r"runs/failed/bad\.ipynb"):
            run()
    assert snapshot(root / "book") == before
    assert "ZeroDivisionError" in (root / "runs" / "failed" / "bad.ipynb").read_text()
    assert not (root / "_build" / "notebooks" / "bad.ipynb").exists()


def test_execute_command_rewrites_in_place_once(root: Path) -> None:
    path = write(root / "book" / "n.ipynb", code("print('hello')"))
    runner = CliRunner()
    done = runner.invoke(staging.app, ["execute"])
    assert (done.exit_code, "executed n.ipynb" in done.output) == (0, True)
    first = path.read_bytes()
    assert b"hello" in first
    assert json.loads(first)["cells"][0]["execution_count"] == 1
    again = runner.invoke(staging.app, ["execute", str(path)])
    assert "1 of 1 notebooks are up to date" in again.output
    forced = runner.invoke(staging.app, ["execute", "--force", str(path)])
    assert "executed n.ipynb" in forced.output
    assert path.read_bytes() == first
    assert runner.invoke(staging.app, ["execute", "nowhere.ipynb"]).exit_code == 2
    write(root / "book" / "bad.ipynb", code("1/0"))
    failed = runner.invoke(staging.app, ["stage"])
    assert failed.exit_code == 1
    assert "cell 1 failed with ZeroDivisionError" in failed.output
