"""Builds the site once for all tests: the stored chapters and a page of every widget."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import pytest
from screenshots import served

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "book"

DEMO = [
    "# Widgets\n\nEvery kind of widget, and a formula: $b = 2\\,n\\,d$.",
    """
from ch15_helpers.viz import Axis, Curve, Readout, Slider, explore_formula, explore_grid
from ch15_helpers.viz import line_chart, show_figure
kv = dict(py=lambda p: p.batch * p.context * 22.5, js="p.batch * p.context * 22.5")
weights = dict(py=lambda p: 269e3, js="269e3")
sliders = [Slider("batch", 1, 256, value=16, log=True, label="Batch", unit="requests"),
           Slider("context", 128, 8192, value=2048, log=True, label="Context", unit="tokens")]
readouts = [Readout("now", "KV cache", unit="KiB", digits=7, **kv)]
curves = [Curve("w", "weights", **weights), Curve("k", "KV cache", **kv)]
""",
    """
explore_formula("Lines", sliders, curves, "context", readouts)
""",
    'explore_formula("Areas", sliders, curves, "context", chart="area", y_label="KiB")',
    'explore_formula("Bars", sliders, curves, chart="bar", y_label="KiB")',
    """
def draw(batch, context):
    ys = [batch * context * i for i in range(1, 5)]
    return line_chart([1, 2, 3, 4], {"tokens": ys}, x_label="step", y_label="tokens")
show_figure(draw(1, 2), alt="One line that rises from 2 to 8 tokens.", caption="A line.")
""",
    """
explore_grid(draw, {"batch": Axis([1, 4, 16], "Batch", "requests"), "context": [128, 512]},
             alt="Line at batch {batch}, context {context}", caption="Batch {batch}", live=draw)
""",
]


def demo_notebook() -> dict[str, Any]:
    """The page of every widget, not executed."""
    import nbformat

    cells = [nbformat.v4.new_markdown_cell(DEMO[0])]
    cells += [nbformat.v4.new_code_cell(source.strip()) for source in DEMO[1:]]
    kernel = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
    language = {"name": "python", "pygments_lexer": "ipython3"}
    metadata = {"kernelspec": kernel, "language_info": language}
    return dict(nbformat.v4.new_notebook(cells=cells, metadata=metadata))


def write_demo(path: Path, execute: bool) -> None:
    """Write the page of every widget, with or without outputs."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.from_dict(demo_notebook())
    if execute:
        NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    nbformat.write(notebook, path)


def run_jupyter_book(source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """Build a book as ``make book`` does; warnings are errors."""
    tool = Path(sys.executable).with_name("jupyter-book")
    strict = ["-n", "-W", "--keep-going"]
    command = [
        tool,
        "build",
        source,
        "--config",
        ROOT / "_config.yml",
        "--path-output",
        out,
        *strict,
    ]
    return subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "NO_COLOR": "1"},
    )


def vendor() -> None:
    """Copy the site's scripts if they are missing or older than the tool that chooses them."""
    tool = ROOT / "tools" / "vendor.py"
    copied = ROOT / "_build" / "extra" / "vendor" / "config.js"
    if not copied.exists() or copied.stat().st_mtime < tool.stat().st_mtime:
        subprocess.run([sys.executable, str(tool)], check=True)


def fingerprint() -> str:
    """Hash of everything that the built site depends on."""
    digest = hashlib.sha256()
    places = (BOOK, ROOT / "ch15_helpers" / "viz")
    single = [ROOT / "_config.yml", ROOT / "tools" / "vendor.py", Path(__file__)]
    files = [*single, *(p for d in places for p in d.rglob("*"))]
    for file in sorted(files):
        if file.is_file() and "__pycache__" not in file.parts:
            digest.update(f"\0{file}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def build_site() -> Path:
    """Return the folder of the built pages, built once for all workers."""
    base = ROOT / "_build" / "tests"
    base.mkdir(parents=True, exist_ok=True)
    target = base / f"site-{fingerprint()}"
    with (base / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (target / "done").exists():
            for old in base.glob("site-*"):
                shutil.rmtree(old)
            vendor()
            source = target / "book"
            shutil.copytree(BOOK, source, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
            write_demo(source / "demo.ipynb", execute=True)
            toc = source / "_toc.yml"
            toc.write_text(f"{toc.read_text().rstrip()}\n      - file: demo\n")
            done = run_jupyter_book(source, target)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
            (target / "done").touch()
    return target / "_build" / "html"


@pytest.fixture(scope="session")
def site() -> Path:
    """Folder of the built pages."""
    return build_site()


@pytest.fixture(scope="session")
def site_url(site: Path) -> Iterator[str]:
    """Address of the served pages."""
    with served(site) as base:
        yield base


@pytest.fixture
def need_browser() -> None:
    """Skip, or fail in CI, without a browser."""
    if browser.find() is None:
        pytest.fail(browser.HINT) if browser.in_ci() else pytest.skip(browser.HINT)


def chapters() -> list[Path]:
    """The book's notebooks."""
    return sorted(BOOK.glob("*.ipynb"))


def cells_of(path: Path) -> list[dict[str, Any]]:
    """Cells of a notebook with joined sources."""
    cells: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["cells"]
    for cell in cells:
        cell["source"] = "".join(cell["source"])
    return cells
