"""Starting the ranks of a study from Python or by torchrun.

``launch_study`` starts one process for each rank on this machine and waits for their answers. For
more machines run ``torchrun … -m ch15_helpers.moe.worker STUDY.json FOLDER`` on each of them, with
a folder that all can write, and collect the answers with ``read_answers``.
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
from ch15_helpers.moe.overlap_model import PhaseTimes
from ch15_helpers.moe.study import LayerStudy, StudyRow

_LOG_TAIL = 2000
_LOOK_S = 0.05


def launch_study(study: LayerStudy, timeout_s: float = 300.0) -> list[StudyRow]:
    """Run a study on processes of this machine: rows of all versions, point by point.

    Raises:
        MoEError: a rank failed or did not finish in time; says what it wrote.
    """
    with tempfile.TemporaryDirectory(prefix="ch15-moe-") as name:
        folder = Path(name)
        spec = folder / "study.json"
        spec.write_text(json.dumps(study.to_dict()), encoding="utf-8")
        threads = max(1, (os.cpu_count() or 1) // study.num_ranks)
        processes: list[subprocess.Popen[bytes]] = []
        try:
            processes.extend(
                _start(spec, folder, rank, study.num_ranks, threads)
                for rank in range(study.num_ranks)
            )
            _wait(processes, folder, timeout_s)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                process.wait()
        return read_answers(folder, study.num_ranks)


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


def read_answers(folder: Path, num_ranks: int) -> list[StudyRow]:
    """Rows of all ranks put together: links of all, the largest error."""
    answers: list[list[dict[str, Any]]] = []
    for rank in range(num_ranks):
        path = folder / f"rank{rank}.json"
        if not path.exists():
            raise MoEError(f"{path} is missing: rank {rank} did not answer")
        answers.append(json.loads(path.read_text(encoding="utf-8")))
    rows = []
    for parts in zip(*answers, strict=True):
        links = Counter({tuple(link): count for part in parts for *link, count in part["links"]})
        rows.append(
            StudyRow(
                parts[0]["version"], tuple(parts[0]["tokens"]), tuple(parts[0]["samples_s"]),
                max(part["error"] for part in parts), links, PhaseTimes(**parts[0]["phases"]),
            )
        )  # fmt: skip
    return rows
