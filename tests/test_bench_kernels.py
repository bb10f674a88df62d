"""The kernel benchmark counts what the kernels must read and compute."""

from __future__ import annotations

import pytest
import torch

from ch15_helpers.bench.kernel_rows import pointwise_rows, sampling_rows
from ch15_helpers.bench.kernels import (
    Case,
    attention_row,
    cpu_cases,
    gpu_cases,
    make_inputs,
)
from ch15_helpers.bench.records import ATTENTION
from ch15_helpers.hardware import Ceilings, HardwareProfile

SMALL = Case("decode", "small", (1, 3), (40, 7), heads=4, kv_heads=2, head_dim=16)


def _profile() -> HardwareProfile:
    ceilings = Ceilings(10.0, 10.0, {"float32": 0.1}, 1.0, None)
    return HardwareProfile("cpu", "test", "cpu", None, torch.__version__, None, 1, 1, ceilings)


def test_bytes_and_operations() -> None:
    assert SMALL.kv_bytes(torch.float32) == 47 * 2 * 2 * 16 * 4
    # The first sequence's query sees 40 keys; the second's see 5, 6 and 7.
    assert SMALL.operations() == 2 * 2 * 4 * 16 * (40 + 5 + 6 + 7)
    fp8 = Case("decode", "fp8", (1,), (40,), kv_dtype=torch.float8_e4m3fn)
    assert fp8.kv_bytes(torch.bfloat16) == 40 * 2 * 8 * 128


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_a_row_is_the_rate_of_the_measured_time(kind: str) -> None:
    case = Case(kind, "small", (1, 3), (40, 7), heads=4, kv_heads=2, head_dim=16)  # type: ignore[arg-type]
    row = attention_row(case, _profile(), torch.float32)
    work = case.kv_bytes(torch.float32) if kind == "decode" else case.operations()
    assert row.achieved == pytest.approx(work / row.time_s / 1e12)
    assert row.fraction == pytest.approx(row.achieved / (0.01 if kind == "decode" else 0.1))
    assert row.peer is None
    assert row.ratio is None


def test_the_timed_call_attends_over_its_own_pages() -> None:
    """Every block of every sequence is another one, and layers differ."""
    call, batch = make_inputs(SMALL, torch.device("cpu"), torch.float32)
    used = [*batch.block_tables[0, :3].tolist(), *batch.block_tables[1, :1].tolist()]
    assert sorted(used) == [0, 1, 2, 3]
    first, second = call(0), call(1)
    assert isinstance(first, torch.Tensor)
    assert first.shape == (4, 4, 16)
    assert not torch.equal(first, second)
    assert torch.equal(first, call(2))


def test_cases_have_distinct_names_and_peers_belong_to_some() -> None:
    names = [(case.kernel, case.name) for case in gpu_cases()]
    assert len(names) == len(set(names))
    assert {("decode", name) for name in ATTENTION} <= set(names)
    assert {case.kernel for case in cpu_cases()} == {"decode", "prefill"}


def test_every_other_kernel_has_a_row() -> None:
    rows = pointwise_rows(_profile(), torch.float32)
    assert [row.kernel for row in rows] == ["rms_norm", "rope_and_write_kv", "swiglu"]
    tokens = 256
    # Two tensors of 4096 read and two written; a gate and an up read, their product written.
    assert rows[0].achieved * rows[0].time_s * 1e12 == pytest.approx(4 * tokens * 4096 * 4)
    assert rows[2].achieved * rows[2].time_s * 1e12 == pytest.approx(3 * tokens * 14336 * 4)
    sampling = sampling_rows(_profile(), torch.float32)
    assert [row.shape for row in sampling][:2] == ["4 greedy", "4 temperature"]
    assert sampling[0].achieved * sampling[0].time_s * 1e12 == pytest.approx(4 * 49152 * 4)
