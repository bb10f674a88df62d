"""Copies blocks between the device pool and rows of bytes in memory.

Two movers, one interface: plain copies for a cache in RAM, and ordered asynchronous copies for a
cache on CUDA (``mover_cuda``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ch15_helpers.kv.payload import BlockPayload
from ch15_helpers.kv.ticket import Ticket


class Mover(Protocol):
    """What a TieredStore needs. ``rows`` are uint8 [slots, payload bytes]."""

    def new_rows(self, num_slots: int) -> Tensor:
        """RAM that this mover copies from and to at full speed."""

    def is_near(self, rows: Tensor) -> bool:
        """Whether starting a ``load`` from there takes next to nothing: one launch for all."""

    def fence(self) -> Ticket:
        """Everything that the compute stream was given before now."""

    def store(self, blocks: Sequence[int], rows: Tensor, slots: Sequence[int]) -> Ticket:
        """Copy blocks into slots. After the return, work that is given to the compute stream may
        overwrite the blocks."""

    def load(
        self,
        rows: Tensor,
        slots: Sequence[int],
        blocks: Sequence[int],
        after: Sequence[Ticket] = (),
    ) -> Ticket:
        """Copy slots into blocks, once the tickets ``after`` are over."""

    def copy_rows(
        self, source: Tensor, from_slots: Sequence[int], target: Tensor, to_slots: Sequence[int]
    ) -> Ticket:
        """Copy between two tiers in memory, after all earlier stores."""


class CpuMover:
    """Copies with the calling thread. numpy does it in one thread and without the GIL, so that
    the model's threads keep their cores."""

    def __init__(self, payload: BlockPayload) -> None:
        self._payload = payload
        self._flat = (
            [(part.numpy(), start, stop) for part, start, stop in payload.flat()]
            if payload.contiguous
            else []
        )

    def new_rows(self, num_slots: int) -> Tensor:
        return torch.empty((num_slots, self._payload.num_bytes), dtype=torch.uint8)

    def is_near(self, rows: Tensor) -> bool:
        return False

    def fence(self) -> Ticket:
        return Ticket()

    def store(self, blocks: Sequence[int], rows: Tensor, slots: Sequence[int]) -> Ticket:
        if self._flat:
            target = rows.numpy()
            for part, start, stop in self._flat:
                for block, slot in zip(blocks, slots, strict=True):
                    np.copyto(target[slot, start:stop], part[block])
        else:
            for block, slot in zip(blocks, slots, strict=True):
                views = self._payload.views(rows[slot : slot + 1])
                for view, strided in zip(views, self._payload.parts, strict=True):
                    view[0].copy_(strided[block])
        return Ticket()

    def load(
        self,
        rows: Tensor,
        slots: Sequence[int],
        blocks: Sequence[int],
        after: Sequence[Ticket] = (),
    ) -> Ticket:
        if self._flat:
            source = rows.numpy()
            for part, start, stop in self._flat:
                for block, slot in zip(blocks, slots, strict=True):
                    np.copyto(part[block], source[slot, start:stop])
        else:
            for block, slot in zip(blocks, slots, strict=True):
                views = self._payload.views(rows[slot : slot + 1])
                for view, strided in zip(views, self._payload.parts, strict=True):
                    strided[block].copy_(view[0])
        return Ticket()

    def copy_rows(
        self, source: Tensor, from_slots: Sequence[int], target: Tensor, to_slots: Sequence[int]
    ) -> Ticket:
        for start, stop in zip(from_slots, to_slots, strict=True):
            np.copyto(target.numpy()[stop], source.numpy()[start])
        return Ticket()


def runs(first: Sequence[int], second: Sequence[int], longest: int) -> Iterator[tuple[int, int]]:
    """(start, length) of stretches in which both sequences count up by one."""
    start = 0
    for end in range(1, len(first) + 1):
        goes_on = (
            end < len(first)
            and end - start < longest
            and first[end] == first[end - 1] + 1
            and second[end] == second[end - 1] + 1
        )
        if not goes_on:
            yield start, end - start
            start = end
