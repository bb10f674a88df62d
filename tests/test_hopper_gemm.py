"""Which products the CUDA C++ kernels take, and what happens where they cannot be built."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from ch15_helpers.errors import HardwareError
from ch15_helpers.kernels import hopper_gemm
from ch15_helpers.kernels.hopper_gemm import choose_way, few_tile, fills, hopper_linear
from ch15_helpers.kernels.linear import gated_linear, linear


@pytest.fixture
def unbuilt(monkeypatch):
    """The kernels as if never asked for, and a machine without nvcc."""
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    hopper_gemm._library.cache_clear()
    yield
    hopper_gemm._library.cache_clear()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("num_rows", "width"), [(1, 8), (256, 256), (257, 264), (5000, 4096), (32000, 14336)]
)
def test_the_share_of_useful_time_is_that_of_the_busiest_pair_of_blocks(num_rows, width, gated):
    tile_width, pairs = (128 if gated else 256), 66
    work = [0.0] * pairs
    tiles = [(row, col) for row in range(0, num_rows, 256) for col in range(0, width, tile_width)]
    useful = 0.0
    for i, (row, col) in enumerate(tiles):
        work[i % pairs] += 1
        useful += min(256, num_rows - row) * min(tile_width, width - col) / (256 * tile_width)
    assert fills(num_rows, width, gated, 132) == pytest.approx(useful / (max(work) * pairs))


def test_whole_tiles_go_to_the_kernel_and_ragged_ones_to_cublas():
    # Llama-3-8B's products in a full step of 8192 tokens.
    for width, gated in ((6144, False), (4096, False), (14336, True)):
        assert choose_way(8192, width, gated, 132) == "many"
    assert choose_way(5000, 6144, False, 132) is None  # a last round of 18 of 66 tiles
    assert choose_way(1536, 14336, True, 132) is None
    assert choose_way(1024, 4096, False, 132) is None  # fills the GPU, but no gain was seen
    assert choose_way(1024, 14336, True, 132) == "many"


@pytest.mark.parametrize("processors", [78, 114, 132])
@pytest.mark.parametrize("width", [8, 96, 6144, 11008, 12288, 14336, 16896])
def test_a_tile_of_few_rows_is_the_narrowest_of_one_round(processors, width):
    tile = few_tile(width, processors)
    narrower = [t for t in (96, 112, 128) if tile is None or t < tile]
    assert all(t * processors < width for t in narrower)
    assert tile is None or tile * processors >= width


@pytest.mark.parametrize("processors", [78, 114, 132])
def test_few_rows_go_to_the_kernel_where_one_round_of_tiles_uses_most_of_the_gpu(processors):
    ways = {
        (rows, tiles): choose_way(rows, tiles * 128, True, processors)
        for rows in (1, 15, 16, 128)
        for tiles in (1, processors // 2, processors - 1, processors, processors + 1)
    }
    taken = {key for key, way in ways.items() if way == "few"}
    assert taken == {(rows, n) for rows in (16, 128) for n in (processors - 1, processors)}
    assert set(ways.values()) == {None, "few"}
    assert choose_way(64, processors * 256, False, processors) is None  # not gated


def test_without_nvcc_the_fall_back_is_said_once(unbuilt):
    with pytest.warns(UserWarning, match="no nvcc on PATH.*cuBLAS multiplies"):
        assert hopper_gemm._library() is None
    x, weight = torch.ones(2, 16), torch.ones(16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert hopper_gemm._library() is None
        with pytest.raises(HardwareError, match="not built"):
            hopper_gemm.multiply(x, weight, True, "few")


def test_a_build_that_fails_is_named_by_its_first_line(unbuilt, monkeypatch):
    def fail(*_args, **_kwargs):
        raise RuntimeError("Error building extension\nhundreds of lines")

    monkeypatch.setattr(cpp_extension, "CUDA_HOME", "somewhere")
    monkeypatch.setattr(cpp_extension, "load", fail)
    with pytest.warns(UserWarning, match=r"\(Error building extension\)") as caught:
        assert hopper_gemm._library() is None
    assert "hundreds" not in str(caught[0].message)


def test_other_devices_and_types_never_ask_for_the_kernels(monkeypatch):
    monkeypatch.setattr(hopper_gemm, "_library", lambda: pytest.fail("asked for"))
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.randn(8, 32).to(dtype), torch.randn(32, 32).to(dtype)
        assert hopper_linear(x, weight) is None
        assert linear(x, weight).shape == (8, 32)
        assert gated_linear(x, weight).shape == (8, 16)


def test_the_sources_lie_beside_the_module():
    folder = Path(hopper_gemm.__file__).parent
    for name in (*hopper_gemm._SOURCES, "hopper_parts.cuh"):
        assert (folder / name).is_file()
    included = (folder / "hopper_gemm.cu").read_text()
    assert '#include "hopper_parts.cuh"' in included
