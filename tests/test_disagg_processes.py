"""The same transport between real processes: gloo, and NIXL where it is installed."""

from __future__ import annotations

import multiprocessing
import queue
from pathlib import Path
from typing import Any

import disagg_workers
import pytest

from ch15_helpers.disagg.wire_nixl import why_no_nixl

REASON = why_no_nixl()
MEDIA = [
    "gloo",
    pytest.param("nixl", marks=pytest.mark.skipif(REASON is not None, reason=str(REASON))),
]


def launch(medium: str, job: str, folder: Path, world_size: int = 2) -> dict[int, Any]:
    """Run a job on some ranks, and return what each of them found."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    init = f"file://{folder / 'meet'}"
    ranks = [
        context.Process(
            target=disagg_workers.main, args=(medium, rank, world_size, init, job, results)
        )
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    answers: dict[int, Any] = {}
    try:
        expected = world_size - (job in disagg_workers.DEADLY)
        while len(answers) < expected:
            rank, answer = results.get(timeout=100)
            assert not isinstance(answer, str), f"rank {rank}: {answer}"
            answers[rank] = answer
    except queue.Empty:
        pytest.fail(f"ranks {set(range(world_size)) - set(answers)} did not answer")
    finally:
        for process in ranks:
            process.join(5)
            if process.is_alive():
                process.kill()
    return answers


@pytest.mark.parametrize("medium", MEDIA)
def test_two_processes_exchange_blocks_and_give_up_in_time(medium: str, tmp_path: Path) -> None:
    found = launch(medium, "tour", tmp_path)
    both = {"clean": True, "equal": True, "kept": True, "channels": True}
    assert found[0] == both
    rest = {"expired": "expired", "untouched": True, "late": 1, "after": True}
    assert found[1] == {**both, **rest}


@pytest.mark.parametrize("medium", MEDIA)
def test_a_corrupted_block_is_found_between_processes(medium: str, tmp_path: Path) -> None:
    found = launch(medium, "damaged", tmp_path)
    # Row 2 of message 0 of each transfer.
    assert found[1] == {"recompute": [2], "state": "done"}


def test_heads_are_split_and_joined_by_four_processes(tmp_path: Path) -> None:
    found = launch("gloo", "split_heads", tmp_path, world_size=4)
    assert found == {0: {}, 1: {}, 2: {"2to1": True, "1to2": True}, 3: {"1to2": True}}


def test_a_modelled_network_around_real_processes(tmp_path: Path) -> None:
    found = launch("gloo", "simulated", tmp_path)
    assert found[0] == {"kind": "modelled", "messages": disagg_workers.BLOCKS // 5}
    assert found[1] == {"waited": True, "clean": True, "equal": True}


def test_a_dead_sender_is_an_error_and_loses_nobody(tmp_path: Path) -> None:
    found = launch("gloo", "dying", tmp_path)
    assert found == {1: {"state": "failed", "missing": disagg_workers.BLOCKS}}
