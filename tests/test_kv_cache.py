"""The paged storage: layouts, copies between blocks and pools, damage on purpose."""

from __future__ import annotations

import pytest
import torch

from ch15_helpers.errors import CapacityError
from ch15_helpers.kv.cache import PagedKVCache, block_bytes, num_blocks_for_memory, swap_blocks
from ch15_helpers.model.config import LLAMA3_8B, TINY

LAYOUTS = ["block_major", "layer_major"]


def filled(layout: str = "block_major", blocks: int = 6) -> PagedKVCache:
    cache = PagedKVCache(TINY, blocks, 4, layout=layout)
    generator = torch.Generator().manual_seed(blocks)
    cache.pages.copy_(torch.randn(cache.pages.shape, generator=generator))
    return cache


def test_llama3_block_of_16_tokens_is_2_mib() -> None:
    assert block_bytes(LLAMA3_8B, 16, torch.bfloat16) == 2 * 2**20


def test_num_blocks_for_memory() -> None:
    assert num_blocks_for_memory(5 * 2**20, LLAMA3_8B, 16, torch.bfloat16) == 2
    with pytest.raises(CapacityError, match="one block of 16 tokens takes 2097152"):
        num_blocks_for_memory(2**20, LLAMA3_8B, 16, torch.bfloat16)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_layouts_show_the_same_view_over_their_own_strides(layout: str) -> None:
    cache = PagedKVCache(TINY, 5, 4, layout=layout)
    layers, heads, dim = TINY.num_hidden_layers, TINY.num_key_value_heads, TINY.head_dim
    assert cache.pages.shape == (5, layers, 2, 4, heads, dim)
    assert cache.pages[0].is_contiguous() == (layout == "block_major")
    assert cache.pages[:, 0, 0].is_contiguous() == (layout == "layer_major")
    assert cache.nbytes == cache.pages.numel() * 4 == 5 * cache.block_bytes
    assert not cache.pages.any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_copies_happen_as_if_at_once(layout: str) -> None:
    cache = filled(layout)
    before = cache.pages.clone()
    cache.copy_blocks([(0, 1), (1, 2), (5, 0)])  # 1 and 0 are both read and written
    expected = before[[5, 0, 1, 3, 4, 5]]
    assert torch.equal(cache.pages, expected)
    cache.copy_blocks([])
    assert torch.equal(cache.pages, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_read_and_write_round_trip(layout: str) -> None:
    cache, other = filled(layout), PagedKVCache(TINY, 6, 4, layout=layout)
    data = cache.read_blocks([4, 1])
    assert data.is_contiguous() and torch.equal(data, cache.pages[[4, 1]])
    other.write_blocks([0, 3], data)
    assert torch.equal(other.pages[[0, 3]], data)
    assert not other.pages[[1, 2, 4, 5]].any()
    with pytest.raises(ValueError, match="data has shape"):
        other.write_blocks([0], data)


@pytest.mark.parametrize("block", [-1, 6])
def test_a_block_that_does_not_exist_is_refused(block: int) -> None:
    cache = filled()
    with pytest.raises(IndexError, match=r"0\.\.5"):
        cache.read_blocks([block])
    with pytest.raises(IndexError):
        cache.copy_blocks([(0, block)])
    with pytest.raises(IndexError):
        swap_blocks(cache, filled(blocks=9), [(block, 0)])
    with pytest.raises(IndexError):
        swap_blocks(filled(blocks=9), cache, [(0, block)])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_swap_moves_runs_and_single_blocks(layout: str) -> None:
    device_pool, host_pool = filled(layout), PagedKVCache(TINY, 8, 4)
    pairs = [(0, 3), (1, 4), (2, 5), (4, 0), (5, 7)]
    swap_blocks(device_pool, host_pool, pairs)
    for source, target in pairs:
        assert torch.equal(host_pool.pages[target], device_pool.pages[source])
    assert not host_pool.pages[[1, 2, 6]].any()


def test_swap_refuses_pools_of_other_shape() -> None:
    with pytest.raises(ValueError, match="pools differ"):
        swap_blocks(filled(), PagedKVCache(TINY, 6, 8), [(0, 0)])
    with pytest.raises(ValueError, match="pools differ"):
        swap_blocks(filled(), PagedKVCache(TINY, 6, 4, dtype=torch.bfloat16), [(0, 0)])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_damage_touches_one_block_only(layout: str) -> None:
    for damage in ("scramble", "zero"):
        cache = filled(layout)
        before = cache.pages.clone()
        cache.corrupt_block(2, damage)
        assert not torch.equal(cache.pages[2], before[2])
        rest = [0, 1, 3, 4, 5]
        assert torch.equal(cache.pages[rest], before[rest])
    cache = filled(layout)
    cache.exchange_blocks(1, 4)
    assert torch.equal(cache.pages, before[[0, 4, 2, 3, 1, 5]])
    with pytest.raises(ValueError, match="scramble or zero"):
        cache.corrupt_block(0, "burn")


def test_bad_geometry_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        PagedKVCache(TINY, 0)
    with pytest.raises(ValueError, match="layout must be"):
        PagedKVCache(TINY, 2, layout="token_major")
