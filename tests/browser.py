"""Finds Chromium for the tests, and installs it where that needs no question.

``python tests/browser.py --install`` is a step of ``make test``: it prints which browser will be
used, or installs Debian's when run as root, or says what to do. Without one the tests that need it
are skipped with that reason; under CI=true that is a failure.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MAC = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
HINT = (
    "no Chromium found: install it (Debian: apt-get install chromium; elsewhere: playwright "
    "install chromium), or name one in CH15_CHROMIUM"
)
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-sync",
    "--no-first-run",
)


def in_ci() -> bool:
    """Return whether a missing browser must fail."""
    return os.environ.get("CI", "").lower() in ("1", "true", "yes")


def find() -> str | None:
    """Return the path of a Chromium or Chrome, or None."""
    named = os.environ.get("CH15_CHROMIUM")
    if named:
        return named if Path(named).exists() else None
    for name in NAMES:
        if path := shutil.which(name):
            return path
    if MAC.exists():
        return str(MAC)
    downloads = Path.home() / ".cache" / "ms-playwright"
    found = sorted(downloads.glob("chromium-*/chrome-linux*/chrome"))
    return str(found[-1]) if found else None


def install() -> str | None:
    """Return a browser, installing Debian's when this process may; None when it cannot."""
    path = find()
    if path or os.environ.get("CH15_CHROMIUM"):
        return path
    if os.name == "posix" and os.geteuid() == 0 and shutil.which("apt-get"):
        quiet = {
            "stdout": subprocess.DEVNULL,
            "env": {**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        }
        subprocess.run(["apt-get", "update", "-qq"], check=False, **quiet)
        subprocess.run(["apt-get", "install", "-y", "-qq", "chromium"], check=False, **quiet)
    return find()


@contextmanager
def launched() -> Iterator[Any]:
    """Yield a running browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        running = play.chromium.launch(executable_path=find(), args=list(FLAGS))
        try:
            yield running
        finally:
            running.close()


def new_tab(running: Any, **context: Any) -> tuple[Any, list[str]]:
    """Return (page, refused): a page that reaches only this machine, what it asked of others."""
    refused: list[str] = []

    def local_only(route: Any) -> None:
        url = route.request.url
        if url.startswith(("http://127.0.0.1", "http://localhost", "file:", "data:", "blob:")):
            route.continue_()
        else:
            refused.append(url)
            route.abort()

    page = running.new_context(**context).new_page()
    page.route("**/*", local_only)
    return page, refused


@contextmanager
def chromium(**context: Any) -> Iterator[tuple[Any, list[str]]]:
    """Yield (page, refused) in a browser of its own; see :func:`new_tab`."""
    with launched() as running:
        yield new_tab(running, **context)


def main() -> int:
    """Say which browser the tests will use."""
    path = install() if "--install" in sys.argv else find()
    print(f"browser: {path}" if path else f"browser: {HINT}; its tests will be skipped")
    return 1 if path is None and in_ci() else 0


if __name__ == "__main__":
    sys.exit(main())
