"""Executing the book: in place for a commit, or in a staged copy that the site is built from.

A notebook is executed again when its sources, the package, the stored expectations or the
versions below it have changed since its stamp in ``_build/stamps`` was written. The committed
notebooks change with ``make execute`` only; ``make book`` leaves the checkout as it was.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ch15_helpers.bench import normalise, notebooks
from ch15_helpers.bench.paths import book_dir, build_dir, expectations_dir, runs_dir
from ch15_helpers.errors import Ch15Error, NotebookError

app = typer.Typer(add_completion=False, help="Execute the book's notebooks.")

PACKAGE_FILES = ("*.py", "*.js", "*.css", "*.json")


def fingerprint(notebook: Path) -> str:
    """Hash of all that a notebook's outputs depend on; its own outputs do not count."""
    digest = hashlib.sha256()
    cells = notebooks.read(notebook)["cells"]
    sources = [(c["cell_type"], "".join(c["source"]), c["metadata"].get("tags", [])) for c in cells]
    versions = [sys.version, *(f"{p} {version(p)}" for p in ("torch", "ipykernel", "ipywidgets"))]
    digest.update(json.dumps([sources, versions], sort_keys=True).encode())
    package = Path(__file__).resolve().parents[1]
    files = [f for pattern in PACKAGE_FILES for f in package.rglob(pattern)]
    files += expectations_dir().glob("*.json")
    for file in sorted(files):
        digest.update(f"\0{file.name}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def execute_in_place(paths: Sequence[Path] = (), *, force: bool = False) -> list[Path]:
    """Execute chapters and write them back in normalised form (``make execute``).

    Args:
        paths: notebooks, by default all of the book's.
        force: also those that have not changed.

    Returns:
        Notebooks that were executed.

    Raises:
        NotebookError: a notebook failed; it is unchanged and the copy with the traceback lies
            under ``runs/failed``.
    """
    chosen = list(paths) or sorted(book_dir().glob("*.ipynb"))
    return _execute_all([(p, p) for p in chosen], "execute", force)


def stage_book(
    src: Path | None = None, dst: Path | None = None, *, force: bool = False
) -> list[Path]:
    """Copy the book to ``dst`` with freshly executed notebooks; ``src`` does not change.

    Files keep their time stamps where their content is the same, so that Sphinx builds again
    only what changed. What is no longer in ``src`` is removed from ``dst``.

    Returns:
        Notebooks that were executed.

    Raises:
        NotebookError: as :func:`execute_in_place`.
    """
    src, dst = src or book_dir(), dst or build_dir() / "notebooks"
    wanted = {
        p.relative_to(src)
        for p in src.rglob("*")
        if p.is_file() and not {".ipynb_checkpoints", "__pycache__"} & set(p.parts)
    }
    dst.mkdir(parents=True, exist_ok=True)
    for old in [p for p in dst.rglob("*") if p.is_file()]:
        if old.relative_to(dst) not in wanted:
            old.unlink()
    pairs = []
    for name in sorted(wanted):
        if name.suffix == ".ipynb":
            pairs.append((src / name, dst / name))
        else:
            _write_if_changed(dst / name, (src / name).read_bytes())
    return _execute_all(pairs, "stage", force)


def _execute_all(pairs: list[tuple[Path, Path]], purpose: str, force: bool) -> list[Path]:
    stamps = build_dir() / "stamps"
    todo = [
        (source, target)
        for source, target in pairs
        if force or not _up_to_date(source, target, _stamp(stamps, purpose, source))
    ]
    console = Console()
    for number, (source, target) in enumerate(todo, start=1):
        start_s = time.perf_counter()
        _execute_one(source, target, f"[{number}/{len(todo)}] {source.stem}", console)
        stamp = _stamp(stamps, purpose, source)
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.write_text(fingerprint(source), encoding="utf-8")
        console.print(f"executed {source.name} in {time.perf_counter() - start_s:.0f} s")
    if len(todo) < len(pairs):
        console.print(f"{len(pairs) - len(todo)} of {len(pairs)} notebooks are up to date")
    return [source for source, _ in todo]


def _execute_one(source: Path, target: Path, label: str, console: Console) -> None:
    """Execute into a work file, then put the normalised result in place in one step."""
    work = build_dir() / "work" / source.name
    with cell_progress(console) as progress:
        task = progress.add_task(label, total=None)
        try:
            executed = notebooks.execute(
                source,
                work,
                on_cell=lambda done, total: progress.update(task, completed=done, total=total),
            )
        except NotebookError as error:
            kept = runs_dir() / "failed" / source.name
            if work.exists():  # not where a parameter or a source was wrong
                kept.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(work, kept)
            raise NotebookError(str(error).replace(str(work), str(kept))) from error
    text = normalise.dumps(normalise.normalise(executed))
    _write_if_changed(target, text.encode())
    work.unlink()


def cell_progress(console: Console) -> Progress:
    """Progress bar over the cells of a notebook."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total} cells"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,  # a log gets one line per notebook instead
    )


def _stamp(stamps: Path, purpose: str, source: Path) -> Path:
    return stamps / f"{purpose}-{source.stem}"


def _up_to_date(source: Path, target: Path, stamp: Path) -> bool:
    if not (stamp.exists() and target.exists()):
        return False
    return stamp.read_text(encoding="utf-8") == fingerprint(source)


def _write_if_changed(path: Path, data: bytes) -> None:
    if path.exists() and path.read_bytes() == data:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_bytes(data)
    temporary.replace(path)


@app.command("execute")
def execute_command(
    paths: Annotated[list[Path] | None, typer.Argument(help="Default: all chapters.")] = None,
    force: Annotated[bool, typer.Option(help="Also what has not changed.")] = False,
) -> None:
    """Execute chapters in place, normalised for a commit."""
    chosen = paths or []
    for path in chosen:
        if not path.is_file():
            typer.echo(f"error: no notebook {path}", err=True)
            raise typer.Exit(2)
    _exit_on_error(lambda: execute_in_place(chosen, force=force))


@app.command("stage")
def stage_command(
    src: Annotated[Path | None, typer.Option(help="Default: book/")] = None,
    dst: Annotated[Path | None, typer.Option(help="Default: _build/notebooks")] = None,
    force: Annotated[bool, typer.Option(help="Also what has not changed.")] = False,
) -> None:
    """Execute a copy of the book for the site; the checkout does not change."""
    _exit_on_error(lambda: stage_book(src, dst, force=force))


def _exit_on_error(work: Callable[[], object]) -> None:
    try:
        work()
    except Ch15Error as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
