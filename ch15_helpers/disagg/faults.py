"""A wire that damages messages on purpose, to prove that the checks bite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ch15_helpers.disagg.message import TAG_BYTES, split
from ch15_helpers.disagg.wire import Wire, WireMessage

Fault = Literal["corrupt", "exchange", "reorder", "drop", "duplicate"]
"""``corrupt``: a bit flips in two of a block's words (of float32, the highest of an exponent).
``exchange``: the bytes of two blocks trade places, their tags do not.
``reorder``: two blocks trade places, tags and all.
``drop``: a block and its tag are erased.
``duplicate``: a block comes a second time, in place of the next one."""


class FaultyWire:
    """Passes messages on to another wire; those it sends may be damaged first."""

    def __init__(self, inner: Wire, fault: Fault, *, row: int = 0, number: int = 0) -> None:
        """Damage block ``row`` (and the one after it) of message ``number`` of each transfer."""
        self.inner, self.fault, self.row, self.number = inner, fault, row, number
        self.rank, self.world_size = inner.rank, inner.world_size
        self.device, self.window, self.in_order = inner.device, inner.window, inner.in_order
        self.zero_copy = False  # a message is damaged, not the pool

    def new_buffer(self, num_bytes: int) -> Tensor:
        return self.inner.new_buffer(num_bytes)

    def start(self, messages: Sequence[WireMessage]) -> None:
        for message in messages:
            message.seal()
            if message.sending and message.number == self.number:
                damage(message.buffer, message.num_blocks, self.fault, self.row)
        self.inner.start(messages)

    def finished(self) -> list[tuple[WireMessage, str | None]]:
        return self.inner.finished()

    def next_event_s(self) -> float | None:
        return self.inner.next_event_s()

    def wait(self, timeout_s: float) -> None:
        self.inner.wait(timeout_s)

    def close(self) -> None:
        self.inner.close()


def damage(buffer: Tensor, num_blocks: int, fault: Fault, row: int) -> None:
    """Apply a fault to a message, in place; ``row + 1`` is the other block, where it takes two."""
    tags, rows = split(buffer, num_blocks)
    last = row + (fault in ("exchange", "reorder", "duplicate"))
    if last >= num_blocks:
        raise ValueError(f"fault {fault!r} at block {row}: the message has {num_blocks} blocks")
    pair = torch.tensor([row, last], device=buffer.device)
    if fault == "corrupt":
        rows[row, 3 :: rows.shape[1] // 2] ^= 0x40
    elif fault == "exchange":
        rows[pair] = rows[pair.flip(0)]
    elif fault == "reorder":
        rows[pair], tags[pair] = rows[pair.flip(0)], tags[pair.flip(0)]
    elif fault == "drop":
        rows[row].zero_()
        tags[row].zero_()
    elif fault == "duplicate":
        rows[row + 1], tags[row + 1] = rows[row], tags[row]
    else:
        raise ValueError(f"there is no fault {fault!r}; tags take {TAG_BYTES} bytes each")
