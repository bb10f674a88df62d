"""The order in which experts work: (token, choice) pairs sorted by expert, cut into tiles.

A grouped matrix product needs the rows of one expert side by side. ``sort_by_expert`` makes that
order with no word to the host: it is sized for the worst case, and says in a tensor how much of it
is used. Padding each expert's rows to a multiple of a tile is MegaBlocks' idea (Gale et al., 2023)
as in vLLM's ``moe_align_block_size``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ch15_helpers.kernels.dispatch import use_triton


@dataclass(frozen=True)
class ExpertOrder:
    """Pairs sorted by expert. Pair ``t * top_k + j`` is token t's choice j.

    Attributes:
        rows: int32 [capacity], pair of each row; ``num_pairs`` in padding, undefined past the end.
        positions: int32 [num_pairs], row of each pair; -1 where its expert is not one of ours.
        tiles: int32 [max_tiles, 4]: expert, first row, rows that are not padding; and, apart from
            these three, which tile is the n-th when those more than half full come first.
        counters: int32 [3]: how many of ``tiles`` are defined; then, for each of the two products,
            how many work items its programs have claimed, 0 at first.
    """

    rows: Tensor
    positions: Tensor
    tiles: Tensor
    counters: Tensor

    @property
    def capacity(self) -> int:
        """Rows of a buffer in this order."""
        return self.rows.shape[0]


def max_tiles(num_pairs: int, num_experts: int, tile: int) -> int:
    """Most tiles that any routing can make: one for each expert in use, the rest full."""
    used = min(num_pairs, num_experts)
    return used + (num_pairs - used) // tile


def sort_by_expert(experts: Tensor, num_experts: int, align: int, tile: int) -> ExpertOrder:
    """Sorts pairs by expert, stable, and lists the tiles of at most ``tile`` rows.

    Args:
        experts: int32 or int64 [num_tokens, top_k], contiguous. An id outside
            ``0..num_experts-1`` (an expert of another rank) gets no row.
        align: each expert's first row is a multiple of it.
        tile: rows of a tile, a multiple of ``align``.
    """
    num_pairs = experts.numel()
    capacity = max_tiles(num_pairs, num_experts, align) * align
    tiles = max_tiles(num_pairs, num_experts, tile)
    if num_pairs and use_triton(experts):
        from ch15_helpers.kernels.moe_permute_triton import sort_by_expert_triton

        return ExpertOrder(
            *sort_by_expert_triton(experts, num_experts, align, tile, capacity, tiles)
        )
    return _sort_reference(experts.flatten(), num_experts, align, tile, capacity, tiles)


def _sort_reference(
    ids: Tensor, num_experts: int, align: int, tile: int, capacity: int, most_tiles: int
) -> ExpertOrder:
    num_pairs, device = ids.numel(), ids.device
    ours = (ids >= 0) & (ids < num_experts)
    keys = torch.where(ours, ids, num_experts)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=device)
    counts.scatter_add_(0, keys, torch.ones_like(keys))
    order = keys.argsort(stable=True)
    padded = (counts + align - 1) // align * align
    starts = padded.cumsum(0) - padded
    begins = counts.cumsum(0) - counts
    rank = torch.empty_like(keys)
    rank[order] = torch.arange(num_pairs, device=device)
    positions = torch.where(ours, starts[keys] + rank - begins[keys], -1)
    rows = torch.full((capacity + 1,), num_pairs, dtype=torch.int32, device=device)
    rows[torch.where(ours, positions, capacity)] = torch.arange(
        num_pairs, dtype=torch.int32, device=device
    )
    tiles = torch.zeros((most_tiles, 4), dtype=torch.int32, device=device)
    per_expert = (counts[:num_experts] + tile - 1) // tile
    ends = per_expert.cumsum(0)
    index = torch.arange(most_tiles, device=device)
    expert = torch.searchsorted(ends, index, right=True).clamp(max=num_experts - 1)
    offset = (index - (ends - per_expert)[expert]) * tile
    tiles[:, 0] = expert
    tiles[:, 1] = starts[expert] + offset
    tiles[:, 2] = (counts[expert] - offset).clamp(0, tile)
    # Tiles that are not there go last in either order.
    late = (2 * tiles[:, 2] <= tile).int() + (tiles[:, 2] == 0).int()
    tiles[:, 3] = late.argsort(stable=True)
    counters = torch.zeros(3, dtype=torch.int32, device=device)
    counters[0] = ends[-1]
    return ExpertOrder(rows[:capacity], positions.int(), tiles, counters)
