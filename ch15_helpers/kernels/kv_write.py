"""Writes one step's keys and values into their slots of the paged cache."""

from __future__ import annotations

import torch
from torch import Tensor

from ch15_helpers.kernels.dispatch import use_triton


def write_kv(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
    """Scatters K and V of the flat batch into the pages of one layer, in place.

    Args:
        k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim], any strides.
        k, v: [num_tokens, num_kv_heads, head_dim].
        slot_mapping: int64 [num_tokens], ``block * block_size + offset``; -1 is not written.
    """
    if use_triton(k_cache, v_cache, k, v) and k_cache.stride() == v_cache.stride():
        from ch15_helpers.kernels.kv_write_triton import write_kv_triton

        write_kv_triton(k_cache, v_cache, k, v, slot_mapping)
        return
    block_size = k_cache.shape[1]
    if slot_mapping.device.type == "cpu":
        if slot_mapping.numel() and int(slot_mapping.min()) < 0:
            keep = slot_mapping >= 0
            slot_mapping, k, v = slot_mapping[keep], k[keep], v[keep]
    else:
        slot_mapping, k, v = _padding_to_duplicates(k_cache, v_cache, k, v, slot_mapping)
    index = (slot_mapping // block_size, slot_mapping % block_size)
    k_cache.index_put_(index, k.to(k_cache.dtype))
    v_cache.index_put_(index, v.to(v_cache.dtype))


def _padding_to_duplicates(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slot_mapping: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Makes every padding row repeat the first real row, so that no row count depends on data.

    Dropping rows would make the host wait for the device and could not be captured in a graph.
    A batch of nothing but padding writes slot 0's own content back to it.
    """
    valid = slot_mapping >= 0
    first = valid.to(torch.uint8).argmax()
    rows = torch.where(valid, torch.arange(len(slot_mapping), device=valid.device), first)
    slots = slot_mapping.index_select(0, rows).clamp_(min=0)
    some = valid.any()
    k_rows = torch.where(some, k.index_select(0, rows).to(k_cache.dtype), k_cache[0, 0])
    v_rows = torch.where(some, v.index_select(0, rows).to(v_cache.dtype), v_cache[0, 0])
    return slots, k_rows, v_rows
