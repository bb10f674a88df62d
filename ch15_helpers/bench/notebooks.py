"""Notebooks as programs: their parameters, and executing them with papermill.

As a command, ``python -m ch15_helpers.bench.notebooks execute [--force] [NOTEBOOK…]`` executes
chapters in place (``make execute``), and ``… stage`` a copy of the book in ``_build/notebooks``
from which the site is built (``make book``). Both skip what has not changed.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ch15_helpers.errors import NotebookError, UnknownTargetError

PARAMETERS_TAG = "parameters"
KERNEL_NAME = "python3"
CELL_TIMEOUT_S = 600

OnCell = Callable[[int, int], None]


@dataclass(frozen=True)
class NotebookParameters:
    """What a notebook can be told.

    Attributes:
        defaults: name to default value, as the cell tagged ``parameters`` assigns them.
        used: those that a later cell reads. A parameter that no cell reads has no effect.
    """

    defaults: Mapping[str, Any]
    used: frozenset[str]


def read(path: Path) -> dict[str, Any]:
    """Parsed notebook.

    Raises:
        NotebookError: not there, or not a notebook.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise NotebookError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise NotebookError(f"{path}: not a notebook: {error}") from error
    if not isinstance(data, dict) or "cells" not in data or data.get("nbformat") != 4:
        raise NotebookError(f"{path}: not a notebook of format 4")
    return data


def inspect_parameters(path: Path) -> NotebookParameters:
    """Parameters of a notebook with their defaults, and which of them are read.

    Raises:
        NotebookError: the notebook cannot be read, or one of its cells is not Python.
    """
    defaults: dict[str, Any] = {}
    read_names: set[str] = set()
    for number, cell in enumerate(read(path)["cells"]):
        if cell["cell_type"] != "code":
            continue
        tree = _parse_cell(cell, f"{path}, cell {number}")
        if not defaults and PARAMETERS_TAG in cell["metadata"].get("tags", []):
            defaults = _assignments(tree)
        else:
            read_names |= {
                n.id
                for n in ast.walk(tree)
                if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)
            }
    return NotebookParameters(defaults, frozenset(defaults) & read_names)


def check_parameters(path: Path, parameters: Mapping[str, Any]) -> None:
    """Papermill only warns about a parameter that a notebook lacks; here it is an error.

    Raises:
        UnknownTargetError: the notebook does not declare one of the parameters, or declares it
            and reads it in no cell; lists those that have an effect.
    """
    known = inspect_parameters(path)
    for name in parameters:
        if name in known.used:
            continue
        what = "declares but never uses" if name in known.defaults else "has no"
        raise UnknownTargetError(
            f"{path.name} {what} parameter {name!r}; parameters with an effect: "
            f"{', '.join(sorted(known.used)) or 'none'}"
        )


def execute(
    source: Path,
    output: Path,
    parameters: Mapping[str, Any] | None = None,
    *,
    cwd: Path | None = None,
    cell_timeout_s: int = CELL_TIMEOUT_S,
    on_cell: OnCell | None = None,
) -> dict[str, Any]:
    """Execute a notebook with papermill in a fresh kernel.

    Args:
        source: not changed. output: written as it runs; on failure it keeps the traceback.
        parameters: checked with :func:`check_parameters` first.
        cwd: of the kernel, by default the notebook's folder.
        cell_timeout_s: a cell that runs longer fails.
        on_cell: called with (cells done, cells in all) after each cell.

    Returns:
        The executed notebook, parsed.

    Raises:
        UnknownTargetError: an unknown parameter.
        NotebookError: a cell failed or took too long, or the kernel died.
    """
    check_parameters(source, parameters or {})
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _quiet_kernel():
            papermill.execute_notebook(
                str(source),
                str(output),
                parameters=dict(parameters or {}),
                engine_name=_register_engine(),
                kernel_name=KERNEL_NAME,
                language="python",
                extra_arguments=["--log-level=ERROR"],  # no remark on sockets for each kernel
                cwd=str(cwd or source.parent),
                progress_bar=False,
                execution_timeout=cell_timeout_s,
                on_cell=on_cell,
            )
    except papermill.PapermillExecutionError as error:
        raise NotebookError(
            f"{source.name}: cell {error.exec_count} failed with "
            f"{error.ename}: {error.evalue} (notebook with traceback: {output})"
        ) from error
    except CellTimeoutError as error:
        raise NotebookError(
            f"{source.name}: a cell ran for more than {cell_timeout_s} s (notebook: {output})"
        ) from error
    except DeadKernelError as error:
        raise NotebookError(f"{source.name}: the kernel died (notebook: {output})") from error
    return read(output)


def _register_engine() -> str:
    """Papermill engine that reports each finished cell; papermill's own only draws a bar."""
    from papermill.engines import NBClientEngine, papermill_engines

    class ReportingEngine(NBClientEngine):  # type: ignore[misc]
        @classmethod
        def execute_managed_notebook(
            cls, nb_man: Any, kernel_name: str, on_cell: OnCell | None = None, **kwargs: Any
        ) -> None:
            complete, total = nb_man.cell_complete, len(nb_man.nb.cells)

            def cell_complete(cell: Any, cell_index: int = 0, **extra: Any) -> None:
                complete(cell, cell_index=cell_index, **extra)
                if on_cell is not None:
                    on_cell(cell_index + 1, total)

            nb_man.cell_complete = cell_complete
            super().execute_managed_notebook(nb_man, kernel_name, **kwargs)

    papermill_engines.register("ch15", ReportingEngine)
    return "ch15"


@contextlib.contextmanager
def _quiet_kernel() -> Iterator[None]:
    """The kernel's debugger warns about frozen modules on stderr; nobody debugs here."""
    name = "PYDEVD_DISABLE_FILE_VALIDATION"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _parse_cell(cell: Mapping[str, Any], where: str) -> ast.Module:
    source = "".join(cell["source"])
    if any(line.lstrip().startswith(("%", "!")) for line in source.splitlines()):
        from IPython.core.inputtransformer2 import TransformerManager

        source = TransformerManager().transform_cell(source)
    try:
        return ast.parse(source)
    except SyntaxError as error:
        raise NotebookError(f"{where}: not Python: {error}") from error


def _assignments(tree: ast.Module) -> dict[str, Any]:
    """Names that a parameters cell assigns, with literal defaults (others as source text)."""
    found: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            targets, value = [node.target], node.value
        else:
            continue
        try:
            default = ast.literal_eval(value)
        except ValueError:
            default = ast.unparse(value)
        found.update({t.id: default for t in targets if isinstance(t, ast.Name)})
    return found


if __name__ == "__main__":
    from ch15_helpers.bench.staging import app

    app()
