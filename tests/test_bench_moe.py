"""The MoE benchmark's rows: what a fraction divides by."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ch15_helpers.bench.moe import MoERow, block_work
from ch15_helpers.model.config import TINY_MOE


def test_fractions_divide_by_the_limit_of_the_same_state_of_the_chip():
    row = MoERow("m", 8, eager_s=4.0, captured_s=2.0, limit_s=1.0, peer_s=8.0)
    assert (row.fraction, row.ratio) == (0.5, 0.5)
    assert row.sustained_fraction is None
    loaded = replace(row, sustained_s=5.0, sustained_limit_s=4.5)
    assert loaded.sustained_fraction == pytest.approx(0.9)
    assert loaded.fraction == 0.5


def test_work_counts_used_experts_once_and_each_pair():
    work = block_work(TINY_MOE, num_tokens=10, touched=3, itemsize=2)
    expert = 3 * TINY_MOE.hidden_size * TINY_MOE.moe_intermediate_size
    assert work.bytes == 3 * expert * 2
    assert work.flops == 2 * expert * 10 * TINY_MOE.num_experts_per_tok
