"""Where the book, the expectations and the runs lie, whichever folder a notebook runs in."""

from __future__ import annotations

import os
from pathlib import Path

from ch15_helpers.errors import Ch15Error

ROOT_VARIABLE = "CH15_ROOT"
EXPECTATIONS_VARIABLE = "CH15_EXPECTATIONS"


def repo_root() -> Path:
    """The folder that holds ``book/`` and ``expectations/``.

    In order: the environment variable CH15_ROOT; the nearest such folder at or above the working
    directory (a notebook runs in ``book/`` or in a staged copy of it); the checkout that this
    package was imported from.

    Raises:
        Ch15Error: none of them exists.
    """
    override = os.environ.get(ROOT_VARIABLE)
    if override:
        root = Path(override).expanduser().resolve()
        if not root.is_dir():
            raise Ch15Error(f"{ROOT_VARIABLE} is {override!r}, which is not a folder")
        return root
    cwd = Path.cwd().resolve()
    package = Path(__file__).resolve().parents[2]
    for candidate in (cwd, *cwd.parents, package):
        if (candidate / "book").is_dir() and (candidate / "expectations").is_dir():
            return candidate
    raise Ch15Error(
        f"no folder with book/ and expectations/ at or above {cwd}; run inside a checkout of the "
        f"book, or set {ROOT_VARIABLE} to one"
    )


def book_dir() -> Path:
    """Folder of the chapters' notebooks."""
    return repo_root() / "book"


def expectations_dir() -> Path:
    """Folder of ``{hardware_key}.json``; the environment variable CH15_EXPECTATIONS overrides."""
    override = os.environ.get(EXPECTATIONS_VARIABLE)
    return Path(override).expanduser() if override else repo_root() / "expectations"


def runs_dir() -> Path:
    """Folder of what runs leave behind; git does not track it."""
    return repo_root() / "runs"


def build_dir() -> Path:
    """Folder of the rendered site and of the stamps that say what is up to date."""
    return repo_root() / "_build"
