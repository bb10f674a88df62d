"""Every stored chapter keeps the contract, and every clause of the contract bites."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from contract import headings, problems
from site_build import BOOK, cells_of, chapters

CHAPTERS = chapters()
WHOLE = BOOK / "measuring.ipynb"  # a chapter to break
Notebook = dict[str, Any]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_chapter_keeps_the_contract(path: Path) -> None:
    assert not problems(path)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_stored_form_is_normalised(path: Path) -> None:
    from ch15_helpers.bench import normalise

    text = path.read_text(encoding="utf-8")
    assert normalise.dumps(normalise.normalise(json.loads(text))) == text


def test_the_table_of_contents_lists_every_page() -> None:
    toc = yaml.safe_load((BOOK / "_toc.yml").read_text())
    listed = {toc["root"]} | {c["file"] for part in toc["parts"] for c in part["chapters"]}
    stored = {p.stem for p in (*BOOK.glob("*.ipynb"), *BOOK.glob("*.md"))}
    assert listed == stored


def code(notebook: Notebook, number: int) -> Notebook:
    """The n-th code cell."""
    cells: list[Notebook] = [c for c in notebook["cells"] if c["cell_type"] == "code"]
    return cells[number]


def strip(notebook: Notebook) -> None:
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell.update(execution_count=None, outputs=[])


def skip_a_count(notebook: Notebook) -> None:
    code(notebook, 3)["execution_count"] += 1


def store_an_error(notebook: Notebook) -> None:
    error = {"output_type": "error", "ename": "ZeroDivisionError", "evalue": "", "traceback": []}
    code(notebook, 2)["outputs"] = [error]


def lose_the_parameters(notebook: Notebook) -> None:
    code(notebook, 0)["metadata"]["tags"] = []


def drop_a_parameter(notebook: Notebook) -> None:
    source = "".join(code(notebook, 0)["source"])
    code(notebook, 0)["source"] = source.replace("device", "devise")


def write_a_long_cell(notebook: Notebook) -> None:
    code(notebook, 1)["source"] = "x = 1\n" * 26


def measure_untagged(notebook: Notebook) -> None:
    cell = code(notebook, 2)
    cell["metadata"]["tags"] = []
    cell["source"] = "print(measure(f))"
    cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "1"}]


def drop_alt_text(notebook: Notebook) -> None:
    data = {"text/html": '<figure><img src="data:" alt=""></figure>', "text/plain": ""}
    code(notebook, 2)["outputs"] = [{"output_type": "display_data", "data": data, "metadata": {}}]


def show_a_bare_picture(notebook: Notebook) -> None:
    data = {"image/png": "", "text/plain": ""}
    code(notebook, 2)["outputs"] = [{"output_type": "display_data", "data": data, "metadata": {}}]


def warn(notebook: Notebook) -> None:
    code(notebook, 2)["outputs"] = [{"output_type": "stream", "name": "stderr", "text": "warning"}]


def swap_sections(notebook: Notebook) -> None:
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if source.startswith("## Predict first"):
            cell["source"] = source.replace("## Predict first", "## Later")


def type_a_number(notebook: Notebook) -> None:
    cell = next(c for c in notebook["cells"] if "## What you should see" in "".join(c["source"]))
    cell["source"] = "## What you should see\n\nThe engine reaches 120 tok/s, 3.1× more."


def name_a_place(notebook: Notebook) -> None:
    code(notebook, 2)["source"] = 'open("/home/somebody/weights")'


def grow(notebook: Notebook) -> None:
    code(notebook, 2)["source"] = "#" + "x" * 1_000_000


@pytest.mark.parametrize(
    ("break_it", "complaint"),
    [
        (strip, "execution counts"),
        (strip, "stripped"),
        (skip_a_count, "execution counts"),
        (store_an_error, "stores an error: ZeroDivisionError"),
        (lose_the_parameters, "tagged `parameters`"),
        (drop_a_parameter, "lacks ['device']"),
        (write_a_long_cell, "lines; at most 25"),
        (measure_untagged, "nbval-ignore-output"),
        (drop_alt_text, "without alt text"),
        (show_a_bare_picture, "bare picture"),
        (warn, "standard error"),
        (swap_sections, "no section 'Predict first'"),
        (type_a_number, "types measured numbers"),
        (name_a_place, "/home/somebody"),
        (grow, "bytes; at most"),
    ],
)
def test_every_clause_bites(
    tmp_path: Path, break_it: Callable[[Notebook], None], complaint: str
) -> None:
    notebook = json.loads(WHOLE.read_text(encoding="utf-8"))
    before = set(problems(WHOLE))
    break_it(notebook)
    broken = tmp_path / "broken.ipynb"
    broken.write_text(json.dumps(notebook, ensure_ascii=False), encoding="utf-8")
    new = [p for p in problems(broken) if p not in before]
    assert any(complaint in p for p in new), new


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_sections_have_text(path: Path) -> None:
    cells = cells_of(path)
    starts = headings(cells)
    for (begin, text), (end, _) in zip(starts, [*starts[1:], (len(cells), "")], strict=True):
        words = sum(len(c["source"].split()) for c in cells[begin:end])
        assert words > 25 or begin == end, f"section {text!r} is empty"
