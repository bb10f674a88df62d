"""Writes one step's keys and values into their slots of the paged cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ch15_helpers.kernels.dispatch import use_triton


def write_kv(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    slot_mapping: Tensor,
    scratch: dict[Any, Any] | None = None,
) -> None:
    """Scatters K and V of the flat batch into the pages of one layer, in place.

    Args:
        k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim], any strides.
        k, v: [num_tokens, num_kv_heads, head_dim].
        slot_mapping: int64 [num_tokens], ``block * block_size + offset``; -1 is not written.
        scratch: the batch's, where the CPU keeps what it derives from ``slot_mapping`` for the
            other layers of the step.
    """
    if use_triton(k_cache, v_cache, k, v) and k_cache.stride() == v_cache.stride():
        from ch15_helpers.kernels.kv_write_triton import write_kv_triton

        write_kv_triton(k_cache, v_cache, k, v, slot_mapping)
        return
    block_size = k_cache.shape[1]
    if slot_mapping.device.type == "cpu":
        keep, index = _host_index(slot_mapping, block_size, {} if scratch is None else scratch)
        if keep is not None:
            k, v = k[keep], v[keep]
    else:
        slot_mapping, k, v = _padding_to_duplicates(k_cache, v_cache, k, v, slot_mapping)
        index = (slot_mapping // block_size, slot_mapping % block_size)
    k_cache.index_put_(index, k.to(k_cache.dtype))
    v_cache.index_put_(index, v.to(v_cache.dtype))


def _host_index(
    slot_mapping: Tensor, block_size: int, scratch: dict[Any, Any]
) -> tuple[Tensor | None, tuple[Tensor, Tensor]]:
    """Rows to keep (None: all), and their blocks and offsets."""
    key = ("write_kv", block_size)
    if key not in scratch:
        keep = slot_mapping >= 0
        slots = slot_mapping if bool(keep.all()) else slot_mapping[keep]
        kept = None if slots is slot_mapping else keep
        scratch[key] = kept, (slots // block_size, slots % block_size)
    result: tuple[Tensor | None, tuple[Tensor, Tensor]] = scratch[key]
    return result


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
