"""Starting the ranks of a study from Python or by torchrun.

``launch_studies`` starts one process for each rank on this machine and waits for their answers. For
more machines run ``torchrun … -m ch15_helpers.moe.worker STUDIES.json FOLDER`` on each of them,
with a folder that all can write, and collect the answers with ``read_answers``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ch15_helpers.errors import MoEError
from ch15_helpers.moe.drift_study import DriftRow, DriftStudy
from ch15_helpers.moe.model_study import ModelRow, ModelStudy
from ch15_helpers.moe.overlap_model import PhaseTimes
from ch15_helpers.moe.stack_study import StackRow, StackStudy
from ch15_helpers.moe.study import LayerStudy, StudyRow

Study = LayerStudy | ModelStudy | DriftStudy | StackStudy
Parts = tuple[dict[str, Any], ...]
"""One row as plain data, from every rank."""

_LOG_TAIL = 2000
_LOOK_S = 0.05


def launch_study(study: LayerStudy, timeout_s: float = 300.0) -> list[StudyRow]:
    """Run a study on processes of this machine: rows of all versions, point by point.

    Raises:
        MoEError: a rank failed or did not finish in time; says what it wrote.
    """
    return layer_rows(launch_studies([study], timeout_s)[0])


def launch_studies(studies: Sequence[Study], timeout_s: float = 300.0) -> list[list[Parts]]:
    """Run some studies on the same processes, which start once.

    Returns:
        Rows of each study, as each rank wrote them: for :func:`layer_rows`, :func:`model_rows`,
        :func:`stack_rows` or :func:`drift_rows`.

    Raises:
        MoEError: studies for other numbers of ranks or other devices; or as ``launch_study``.
    """
    places = {(study.num_ranks, study.device) for study in studies}
    if len(places) != 1:
        raise MoEError(f"studies for ranks and devices {sorted(places)}; expected one of each")
    num_ranks = studies[0].num_ranks
    with tempfile.TemporaryDirectory(prefix="ch15-moe-") as name:
        folder = Path(name)
        spec = folder / "studies.json"
        entries = [{"kind": type(s).__name__, "fields": s.to_dict()} for s in studies]
        spec.write_text(json.dumps(entries), encoding="utf-8")
        threads = max(1, (os.cpu_count() or 1) // num_ranks)
        processes: list[subprocess.Popen[bytes]] = []
        try:
            processes.extend(
                _start(spec, folder, rank, num_ranks, threads) for rank in range(num_ranks)
            )
            _wait(processes, folder, timeout_s)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                process.wait()
        return read_answers(folder, num_ranks)


def _start(
    spec: Path, folder: Path, rank: int, num_ranks: int, threads: int
) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "OMP_NUM_THREADS": str(threads),
        "CH15_MOE_MEET": f"file://{folder / 'meet'}",
    }
    with (folder / f"log{rank}").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "ch15_helpers.moe.worker", str(spec), str(folder)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _wait(processes: Sequence[subprocess.Popen[bytes]], folder: Path, timeout_s: float) -> None:
    """Until all have ended well. The first that fails ends the others: they would wait for it."""
    end_s = time.monotonic() + timeout_s
    while True:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code:
                raise MoEError(f"rank {rank} ended with {code} and wrote:\n{_tail(folder, rank)}")
        running = [rank for rank, code in enumerate(codes) if code is None]
        if not running:
            return
        if time.monotonic() > end_s:
            raise MoEError(
                f"ranks {running} did not finish in {timeout_s:g} s; the first wrote:\n"
                f"{_tail(folder, running[0])}"
            )
        try:
            processes[running[0]].wait(_LOOK_S)
        except subprocess.TimeoutExpired:
            continue


def _tail(folder: Path, rank: int) -> str:
    text = (folder / f"log{rank}").read_text(encoding="utf-8", errors="replace")
    return text[-_LOG_TAIL:]


def read_answers(folder: Path, num_ranks: int) -> list[list[Parts]]:
    """Rows of each study, as each rank wrote them."""
    answers: list[list[list[dict[str, Any]]]] = []
    for rank in range(num_ranks):
        path = folder / f"rank{rank}.json"
        if not path.exists():
            raise MoEError(f"{path} is missing: rank {rank} did not answer")
        answers.append(json.loads(path.read_text(encoding="utf-8")))
    return [list(zip(*ranks, strict=True)) for ranks in zip(*answers, strict=True)]


def layer_rows(rows: Sequence[Parts]) -> list[StudyRow]:
    """Rows of a ``LayerStudy`` put together: links of all ranks, the largest error."""
    found = []
    for parts in rows:
        links = Counter({tuple(link): count for part in parts for *link, count in part["links"]})
        found.append(
            StudyRow(
                parts[0]["version"], tuple(parts[0]["tokens"]), tuple(parts[0]["samples_s"]),
                max(part["error"] for part in parts), links, PhaseTimes(**parts[0]["phases"]),
            )
        )  # fmt: skip
    return found


def model_rows(rows: Sequence[Parts]) -> list[ModelRow]:
    """Rows of a ``ModelStudy`` put together: tokens are the same if they are on every rank."""
    return [
        ModelRow(
            parts[0]["version"],
            all(part["same_tokens"] for part in parts),
            tuple(parts[0]["samples_s"]),
        )
        for parts in rows
    ]


def stack_rows(rows: Sequence[Parts]) -> list[StackRow]:
    """Rows of a ``StackStudy`` put together: the largest error."""
    return [
        StackRow(
            parts[0]["version"], parts[0]["sequences"], parts[0]["length"],
            tuple(parts[0]["samples_s"]), max(part["error"] for part in parts),
        )
        for parts in rows
    ]  # fmt: skip


def drift_rows(rows: Sequence[Parts]) -> list[DriftRow]:
    """Rows of a ``DriftStudy`` put together: bytes of all ranks, the largest error."""
    return [
        DriftRow(
            parts[0]["version"], tuple(parts[0]["samples_s"]), tuple(parts[0]["stalls_s"]),
            sum(part["moved_bytes"] for part in parts), tuple(parts[0]["max_over_mean"]),
            max(part["error"] for part in parts),
        )
        for parts in rows
    ]  # fmt: skip
