"""Expert parallelism between real gloo processes against a float64 dense reference."""

from __future__ import annotations

from pathlib import Path

import moe_workers
import pytest


@pytest.mark.parametrize("world_size", [2, 4])
def test_many_ranks_equal_one_and_bytes_are_counted(world_size: int, tmp_path: Path) -> None:
    answers = moe_workers.run_ranks(world_size, "random", tmp_path)
    for rank, cases in answers.items():
        assert len(cases) > 20
        wrong = [c for c in cases if not (c["error"] < 1e-6 and c["links"])]
        assert not wrong, f"rank {rank}"
    assert sum(c["bytes"] for c in answers[0]) > 100_000
