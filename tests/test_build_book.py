"""The checks bite: a failing notebook, a changed output and a warning each stop the build."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from site_build import ROOT, vendor

pytestmark = pytest.mark.book

GOOD = "numbers = [1, 2, 3]\nprint(sum(numbers))"
BAD = "1/0"


def write_notebook(path: Path, source: str, output: str | None = None) -> Path:
    """Write a notebook with one code cell and, if given, its stored output."""
    cell = nbformat.v4.new_code_cell(source)
    if output is not None:
        cell.execution_count = 1
        cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=output)]
    kernel = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
    cells = [nbformat.v4.new_markdown_cell("# A page"), cell]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


def nbval(path: Path) -> subprocess.CompletedProcess[str]:
    """Compare a notebook with its stored outputs as ``make test`` does."""
    flags = ["--nbval", "--nbval-sanitize-with", str(ROOT / "tests" / "nbval_sanitize.cfg")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *flags, str(path)]
    return subprocess.run(command, cwd=path.parent, capture_output=True, text=True, check=False)


def test_nbval_accepts_what_is_true(tmp_path: Path) -> None:
    done = nbval(write_notebook(tmp_path / "page.ipynb", GOOD, "6\n"))
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout


def test_nbval_finds_a_tampered_output(tmp_path: Path) -> None:
    done = nbval(write_notebook(tmp_path / "page.ipynb", GOOD, "7\n"))
    assert done.returncode == 1
    assert "mismatch" in done.stdout


def test_nbval_finds_a_failing_cell(tmp_path: Path) -> None:
    done = nbval(write_notebook(tmp_path / "page.ipynb", BAD, ""))
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stdout


def test_nbval_ignores_only_pictures_addresses_and_places(tmp_path: Path) -> None:
    true = 'print("data:image/png;base64,AAAA", hex(2**40), "speed-up 3.0")'
    stored = f"data:image/png;base64,BBBB {hex(2**41)} speed-up 3.0\n"
    assert nbval(write_notebook(tmp_path / "page.ipynb", true, stored)).returncode == 0
    wrong = stored.replace("3.0", "3.1")
    assert nbval(write_notebook(tmp_path / "page.ipynb", true, wrong)).returncode == 1


def test_papermill_stops_at_a_failing_cell(tmp_path: Path) -> None:
    from ch15_helpers.bench import notebooks
    from ch15_helpers.errors import NotebookError

    source = write_notebook(tmp_path / "page.ipynb", BAD)
    with pytest.raises(NotebookError, match="ZeroDivisionError"):
        notebooks.execute(source, tmp_path / "out.ipynb")
    assert "ZeroDivisionError" in (tmp_path / "out.ipynb").read_text()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A small book in a folder with a space in its name, with this environment and scripts."""
    vendor()
    copy = tmp_path / "a small book"
    (copy / "book").mkdir(parents=True)
    for name in ("Makefile", "_config.yml", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, copy / name)
    for name in ("tools", "book/_ext", "expectations"):
        shutil.copytree(ROOT / name, copy / name)
    (copy / "_build").mkdir()
    (copy / "_build" / "extra").symlink_to(ROOT / "_build" / "extra")
    (copy / ".venv").symlink_to(Path(sys.prefix))
    book = copy / "book"
    (book / "_toc.yml").write_text("format: jb-book\nroot: intro\nchapters:\n  - file: page\n")
    (book / "intro.md").write_text("# A small book\n\nIt has one page: [](page.ipynb).\n")
    (book / "references.bib").write_text("")
    write_notebook(book / "page.ipynb", GOOD)
    return copy


def make_book(checkout: Path) -> subprocess.CompletedProcess[str]:
    """Run ``make book`` without touching the environment or fetching scripts."""
    assumed = ["-o", ".venv/.ready", "-o", "_build/extra/vendor/config.js"]
    environment = {k: v for k, v in os.environ.items() if k not in {"CH15_ROOT", "MAKEFLAGS"}}
    return subprocess.run(
        ["make", *assumed, "book"],
        cwd=checkout,
        capture_output=True,
        text=True,
        check=False,
        env=environment | {"NO_COLOR": "1"},
    )


def test_make_book_builds_what_changed_and_no_more(checkout: Path) -> None:
    done = make_book(checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = checkout / "_build" / "html"
    assert f"The book is in {pages}/index.html" in done.stdout
    assert "<pre>6" in (pages / "page.html").read_text().replace("<span></span>", "")
    stored = json.loads((checkout / "book" / "page.ipynb").read_text())
    assert stored["cells"][1]["execution_count"] is None  # the checkout did not change

    page, intro = ((pages / f"{n}.html").stat().st_mtime_ns for n in ("page", "intro"))
    again = make_book(checkout)
    assert again.returncode == 0
    assert "1 of 1 notebooks are up to date" in again.stdout
    assert (pages / "page.html").stat().st_mtime_ns == page

    (checkout / "book" / "intro.md").write_text("# A small book\n\nNew: [](page.ipynb).\n")
    assert make_book(checkout).returncode == 0
    assert (pages / "page.html").stat().st_mtime_ns == page
    assert (pages / "intro.html").stat().st_mtime_ns > intro


def test_make_book_stops_at_a_failing_notebook(checkout: Path) -> None:
    write_notebook(checkout / "book" / "page.ipynb", BAD)
    done = make_book(checkout)
    assert done.returncode != 0
    assert "page.ipynb" in done.stderr
    assert "ZeroDivisionError" in done.stderr
    assert not (checkout / "_build" / "html").exists()


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        ("[](missing.md)", "missing"),
        ("![](picture.png)", "alt text"),
        ("{cite:p}`nobody1999`", "nobody1999"),
    ],
)
def test_make_book_stops_at_a_warning_every_time(checkout: Path, text: str, warning: str) -> None:
    shutil.copy(
        ROOT / "book" / "_ext" / "static" / "favicon.svg", checkout / "book" / "picture.svg"
    )
    text = text.replace("picture.png", "picture.svg")
    (checkout / "book" / "intro.md").write_text(f"# A small book\n\n{text}\n")
    for _ in range(2):
        done = make_book(checkout)
        assert done.returncode != 0
        assert warning in done.stderr + done.stdout
