"""The rows of the MoE and product benchmarks: what a fraction divides by."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ch15_helpers.bench.moe import MoERow, block_work
from ch15_helpers.bench.products import layer_products, measure_product
from ch15_helpers.hardware import Ceilings, HardwareProfile
from ch15_helpers.model.config import LLAMA3_8B, TINY, TINY_MOE


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


def test_rows_of_products_count_both_halves_of_a_gated_one():
    assert layer_products(LLAMA3_8B) == {
        "qkv": (6144, 4096, False),
        "o": (4096, 4096, False),
        "gate_up": (28672, 4096, True),
        "down": (4096, 14336, False),
    }
    ceilings = Ceilings(1e-3, 1e-3, {"float32": 0.1}, 1.0, None)  # 1 MB/s: memory is the limit
    profile = HardwareProfile("cpu", "test", "cpu", None, "2", None, 1, 1, ceilings)
    row = measure_product("gate_up", TINY, 4, profile)
    assert row.way == "library"
    weight_bytes = 2 * TINY.intermediate_size * TINY.hidden_size * 4
    assert row.large_s == pytest.approx(weight_bytes / 1e6)
    assert row.of_large == pytest.approx(row.large_s / row.ours_s)
    assert row.speedup == pytest.approx(row.library_s / row.ours_s)
