"""Copies of tokens on a GPU: what ``dispatch.Copies`` holds, in a few launches and no tables.

Rows are chosen, packed and unpacked by ``kernels.wire_rows_triton``; slots and weights of a copy
are looked up while it is packed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ch15_helpers.kernels.moe_permute import sort_by_expert

_TILE = 1 << 20  # tiles of the order are not used here: as few as possible


@dataclass(frozen=True)
class DeviceCopies:
    """Copies of a batch, on the device.

    Attributes:
        slots, weights: of the batch, [num_tokens, k].
        size: slots of a destination.
        positions: int32 [num_tokens, k], places of a token's copies, -1 where there is none.
        order: pair of each row and destination of each pair, both int32; or the fixed number of
            rows of each message: then token t is row t of all of them.
        counts: int64 [num_destinations], copies for each; None where messages are fixed.
        ones: float32 [num_tokens, k], factors of the sum.
    """

    slots: Tensor
    weights: Tensor
    size: int
    positions: Tensor
    order: tuple[Tensor, Tensor] | int
    counts: Tensor | None
    ones: Tensor


def make_device_copies(
    slots: Tensor,
    weights: Tensor,
    slots_per_destination: int,
    num_destinations: int,
    dedup: bool,
    fixed_rows: int | None = None,
) -> DeviceCopies:
    """:func:`ch15_helpers.moe.dispatch.make_copies` in one launch, or four without fixed rows."""
    from ch15_helpers.kernels.wire_rows_triton import choose_homes_triton, place_fixed_triton

    slots, weights = slots.contiguous(), weights.contiguous()
    ones = torch.ones_like(weights, dtype=torch.float32)
    if fixed_rows is not None:
        positions = place_fixed_triton(slots, slots_per_destination, fixed_rows)
        return DeviceCopies(
            slots, weights, slots_per_destination, positions, fixed_rows, None, ones
        )
    homes, counts = choose_homes_triton(slots, slots_per_destination, num_destinations, dedup)
    if not slots.numel():
        return DeviceCopies(
            slots, weights, slots_per_destination, homes, (homes.flatten(), homes), counts, ones
        )
    order = sort_by_expert(homes, num_destinations, 1, _TILE)
    return DeviceCopies(
        slots, weights, slots_per_destination, order.positions.view(slots.shape),
        (order.rows, homes), counts, ones,
    )  # fmt: skip


def sum_device_copies(rows: Tensor, copies: DeviceCopies, dtype: torch.dtype) -> Tensor:
    """Each token's results [C, hidden] added up in order of choice: [num_tokens, hidden]."""
    num_tokens = len(copies.slots)
    if not num_tokens or not len(rows):
        return rows.new_zeros((num_tokens, rows.shape[1]), dtype=dtype)
    from ch15_helpers.kernels.moe_permute_triton import combine_triton

    return combine_triton(rows, copies.positions.flatten(), copies.ones).to(dtype)
