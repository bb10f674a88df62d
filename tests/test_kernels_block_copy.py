"""Gathering and scattering blocks copies bytes, exactly, in both layouts."""

from __future__ import annotations

import pytest
import torch

from ch15_helpers.kernels.block_copy import gather_blocks, scatter_blocks

TYPES = [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn]
LAYOUTS = ["block_major", "layer_major"]


def _pages(layout: str, dtype: torch.dtype, device: str, head_dim: int = 16) -> torch.Tensor:
    """Random bytes: every bit pattern, NaN included, must survive."""
    blocks, layers, tail = 13, 3, (4, 2, head_dim * dtype.itemsize)
    shape = (blocks, layers, 2, *tail) if layout == "block_major" else (layers, 2, blocks, *tail)
    pages = torch.randint(0, 256, shape, dtype=torch.uint8, device=device).view(dtype)
    return pages if layout == "block_major" else pages.permute(2, 0, 1, 3, 4, 5)


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 3])
def test_gather_and_scatter(layout: str, dtype: torch.dtype, head_dim: int, device: str) -> None:
    pages = _pages(layout, dtype, device, head_dim)
    ids = torch.tensor([7, 0, 12, 3], device=device)
    data = gather_blocks(pages, ids)
    assert data.is_contiguous()
    assert torch.equal(_bytes(data), _bytes(pages)[ids])

    expected = _bytes(pages).clone()
    new = _pages("block_major", dtype, device, head_dim)[:4].contiguous()
    expected[ids] = _bytes(new)
    scatter_blocks(pages, ids, new)
    assert torch.equal(_bytes(pages), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gather_into_a_given_buffer(layout: str, device: str) -> None:
    pages = _pages(layout, torch.int8, device)
    buffer = torch.empty((3, *pages.shape[1:]), dtype=torch.int8, device=device)
    ids = torch.tensor([5, 5, 1], dtype=torch.int32, device=device)
    assert gather_blocks(pages, ids, buffer) is buffer
    assert torch.equal(buffer, pages[ids.long()])


def test_no_blocks(device: str) -> None:
    pages = _pages("block_major", torch.int8, device)
    before = pages.clone()
    ids = torch.empty(0, dtype=torch.int64, device=device)
    scatter_blocks(pages, ids, gather_blocks(pages, ids))
    assert torch.equal(pages, before)


def test_a_buffer_of_another_shape_or_type_is_refused(device: str) -> None:
    pages = _pages("block_major", torch.int8, device)
    ids = torch.tensor([1, 2], device=device)
    with pytest.raises(ValueError, match="of shape"):
        scatter_blocks(pages, ids, torch.empty(1, *pages.shape[1:], dtype=torch.int8))
    with pytest.raises(ValueError, match=r"must be torch\.int8"):
        gather_blocks(pages, ids, torch.empty(2, *pages.shape[1:], device=device))
