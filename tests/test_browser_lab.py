"""JupyterLab in Chromium: a notebook opens, runs in its kernel, and its sliders change outputs."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import pytest
from site_build import BOOK, need_browser, write_demo  # noqa: F401  (a fixture)

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.usefixtures("need_browser")]

CHAPTER = "measuring.ipynb"
FAILED = ".jp-RenderedText[data-mime-type*=error]"
SETTINGS = {
    "@jupyterlab/notebook-extension/tracker.jupyterlab-settings": {"windowingMode": "none"},
    "@jupyterlab/apputils-extension/notification.jupyterlab-settings": {
        "fetchNews": "false",
        "checkForUpdates": False,
    },
}


def clear(path: Path) -> None:
    """Remove stored outputs and counts, so that what the test sees was computed now."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    notebook["metadata"].pop("widgets", None)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell.update(execution_count=None, outputs=[])
            source = "".join(cell["source"])
            if "parameters" in cell["metadata"].get("tags", []):  # fewer rounds, the same cells
                source = re.sub(r"^iterations = \d+", "iterations = 2", source, flags=re.MULTILINE)
            cell["source"] = source
    path.write_text(json.dumps(notebook), encoding="utf-8")


def free_port() -> int:
    """Return a port that nothing uses now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """(address, token) of a JupyterLab with the small page of every widget and one chapter."""
    root = tmp_path_factory.mktemp("lab")
    work = root / "checkout" / "book"
    shutil.copytree(BOOK, work)
    shutil.copytree(BOOK.parent / "expectations", root / "checkout" / "expectations")
    for path in work.glob("*.ipynb"):
        clear(path)
    write_demo(work / "demo.ipynb", execute=False)
    for name, value in SETTINGS.items():
        path = root / "settings" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
    port, token = free_port(), secrets.token_hex(16)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",  # threads that wait for each other are slow beside other tests
        "JUPYTERLAB_SETTINGS_DIR": str(root / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(root / "workspaces"),
        "JUPYTER_RUNTIME_DIR": str(root / "runtime"),
        "JUPYTER_CONFIG_DIR": str(root / "config"),
    }
    command = [sys.executable, "-m", "jupyterlab", "--allow-root", "--no-browser", "--ip=127.0.0.1"]
    command += [
        f"--port={port}",
        f"--IdentityProvider.token={token}",
        f"--ServerApp.root_dir={work}",
    ]
    with (root / "log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        base = f"http://127.0.0.1:{port}"
        try:
            wait_for(f"{base}/api?token={token}", server, root / "log")
            yield base, token
        finally:
            server.terminate()
            server.wait(30)


def wait_for(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the server answers."""
    end = time.monotonic() + 90
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.3)
    pytest.fail(f"JupyterLab did not start: {log.read_text()[-3000:]}")


def run_all(page: Any, lab: tuple[str, str], notebook: str, limit_s: int) -> None:
    """Open a notebook, run all cells and wait until each has its count and none failed.

    Each notebook has a workspace of its own: a shared one would reopen the notebook of the test
    before, and the menu would run that one.
    """
    base, token = lab
    workspace = Path(notebook).stem
    page.goto(f"{base}/lab/workspaces/{workspace}/tree/{notebook}?token={token}")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=60_000)
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=60_000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    prompts = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(p => p.innerText)"
    counted = f"{prompts}.every(t => /^\\[[0-9]+\\]:$/.test(t))"
    end = time.monotonic() + limit_s
    question = page.locator(".jp-Dialog .jp-mod-accept")  # which kernel, if none was ready yet
    while not page.evaluate(counted):
        assert time.monotonic() < end, "the notebook did not finish"
        assert page.locator(FAILED).count() == 0, page.locator(FAILED).first.inner_text()
        if question.is_visible():
            question.click()
        page.wait_for_timeout(200)
    assert (
        page.locator(
            ".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr']"
        ).count()
        == 0
    )
    assert page.locator(FAILED).count() == 0


def test_every_widget_is_live(lab: tuple[str, str]) -> None:
    with browser.chromium(viewport={"width": 1400, "height": 1000}) as (page, refused):
        run_all(page, lab, "demo.ipynb", 120)
        explorer = page.locator(".ch15-explorer").first
        explorer.wait_for(timeout=30_000)
        assert explorer.locator(".fault").count() == 0
        number = explorer.locator("dd[data-name=now]")
        before, picture = number.inner_text(), explorer.locator(".chart svg").inner_html()
        explorer.locator("input[name=batch]").focus()
        page.keyboard.press("ArrowRight")
        assert number.inner_text() != before
        assert explorer.locator(".chart svg").inner_html() != picture

        grid = page.locator(".ch15-grid").first
        caption = grid.locator("figcaption:visible")
        assert "stored with the book" in caption.inner_text()
        drag_left(page, grid)
        grid.locator("figcaption:visible", has_text="computed in this kernel").wait_for(
            timeout=20_000
        )
        assert "Batch 1 " in caption.inner_text()
        assert not refused, "JupyterLab asked another server"


def drag_left(page: Any, grid: Any) -> None:
    """Drag the first slider of a grid to its left end."""
    handle = grid.locator(".noUi-handle").first
    handle.scroll_into_view_if_needed()
    box, track = handle.bounding_box(), grid.locator(".noUi-target").first.bounding_box()
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] / 2, y)
    page.mouse.down()
    page.mouse.move(track["x"] + 2, y, steps=5)
    page.mouse.up()


@pytest.mark.skipif(not (BOOK / CHAPTER).exists(), reason=f"no chapter {CHAPTER}")
@pytest.mark.timeout(600)
def test_a_chapter_runs_and_its_slider_moves(lab: tuple[str, str]) -> None:
    with browser.chromium(viewport={"width": 1400, "height": 1000}) as (page, _):
        run_all(page, lab, CHAPTER, 500)
        widget = page.locator(".ch15-explorer").first
        widget.wait_for(timeout=30_000)
        widget.scroll_into_view_if_needed()
        before = widget.locator(".chart svg").inner_html()
        widget.locator("input[type=range]").first.focus()
        page.keyboard.press("ArrowRight")
        assert widget.locator(".chart svg").inner_html() != before
