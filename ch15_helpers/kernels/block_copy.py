"""Gathers KV blocks into one buffer, and scatters them back: the device half of an offload.

A host or a peer is reached best with one large copy, and the blocks of a request lie anywhere in
the pool. Bytes: each block is read once and written once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ch15_helpers.kernels.dispatch import triton_installed


def gather_blocks(pages: Tensor, ids: Tensor, out: Tensor | None = None) -> Tensor:
    """Copies some blocks, in order, into a contiguous buffer.

    Args:
        pages: [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim], block-major or
            layer-major, any type.
        ids: integer [n], the blocks, on the pages' device.
        out: [n, num_layers, 2, block_size, num_kv_heads, head_dim] contiguous, or None for a new
            one. Must not overlap ``pages``.

    Returns:
        ``out``.
    """
    if out is None:
        out = torch.empty((len(ids), *pages.shape[1:]), dtype=pages.dtype, device=pages.device)
    _check(pages, ids, out, "out")
    if _takes_triton(pages, ids, out):
        from ch15_helpers.kernels.block_copy_triton import copy_blocks_triton

        copy_blocks_triton(pages, ids, out, scatter=False)
        return out
    # As bytes: torch cannot index every one-byte type.
    out.view(torch.uint8).copy_(pages.view(torch.uint8).index_select(0, ids))
    return out


def scatter_blocks(pages: Tensor, ids: Tensor, data: Tensor) -> None:
    """Overwrites some blocks with what :func:`gather_blocks` returned; ``ids`` are distinct."""
    _check(pages, ids, data, "data")
    if _takes_triton(pages, ids, data):
        from ch15_helpers.kernels.block_copy_triton import copy_blocks_triton

        copy_blocks_triton(pages, ids, data, scatter=True)
        return
    pages.view(torch.uint8).index_copy_(0, ids.long(), data.view(torch.uint8))


def _takes_triton(pages: Tensor, ids: Tensor, buffer: Tensor) -> bool:
    """Whether all is on one GPU, and K or V of one layer of a block is one run of bytes."""
    return (
        pages.is_cuda
        and pages.device == ids.device == buffer.device
        and buffer.is_contiguous()
        and pages[0, 0, 0].is_contiguous()
        and triton_installed()
    )


def _check(pages: Tensor, ids: Tensor, buffer: Tensor, name: str) -> None:
    expected = (len(ids), *pages.shape[1:])
    if tuple(buffer.shape) != expected or buffer.dtype != pages.dtype:
        raise ValueError(
            f"{name} must be {pages.dtype} of shape {expected}, got {buffer.dtype} of shape "
            f"{tuple(buffer.shape)}"
        )
