"""One request between two ranks: what each side knows of it, and notes for ``results``.

A plan has [first block, last block, first layer, last layer] of each part, ends excluded. It is
made when a prompt is computed in one step, goes with the request for blocks, and spares each part
a message of its own; the other side starts to receive all of them when it grants the blocks. So a
part that will not be sent after all must be sent void.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from ch15_helpers.disagg.leases import Lease
from ch15_helpers.disagg.pool import BlockRef, Part
from ch15_helpers.disagg.transfer import Transfer
from ch15_helpers.serving.request import Request, SamplingParams


@dataclass(eq=False, slots=True)
class ReadyPart:
    """Blocks whose part is computed; ``name`` is the table that keeps them."""

    name: tuple[str, int, int]
    refs: list[BlockRef]
    part: Part
    ready_s: float


@dataclass(eq=False, slots=True)
class Handover:
    """One request on its way to a decode rank."""

    attempt: int
    target: int
    prompt: list[int]
    params: SamplingParams
    arrival_s: float
    granted: bool = False
    num_blocks: int = 0  # leading blocks of which every part is computed
    refs: list[BlockRef] = field(default_factory=list)  # of blocks ``refs_of``
    refs_of: tuple[int, int] = (0, 0)
    queue: deque[ReadyPart] = field(default_factory=deque)  # computed, and not sent
    under_way: dict[Transfer, ReadyPart] = field(default_factory=dict)
    num_parts: int = 0
    plan: list[list[int]] = field(default_factory=list)
    num_sent: int = 0  # parts
    token: int | None = None
    first_s: float = 0.0
    asked_s: float | None = None
    final_sent: bool = False
    spoken_s: float = 0.0
    notes: dict[str, Any] = field(
        default_factory=lambda: {
            "parts": [], "steps": [], "began_s": None, "metadata_s": 0.0, "control_s": 0.0,
            "pack_s": 0.0, "num_messages": 0, "metadata_bytes": 0,
        }
    )  # fmt: skip

    def promise(self, num_blocks: int, ends: Sequence[int]) -> None:
        """Plan parts of all blocks, each of the layers up to the next end."""
        self.plan = [[0, num_blocks, *layers] for layers in pairwise([0, *ends])]

    def add(self, name: tuple[str, int, int], table: Sequence[int], first: int, part: Part) -> None:
        """A part of blocks ``first ..``, which lie in ``table``, is computed."""
        blocks = first, first + len(table)
        if self.refs_of != blocks:  # the parts of a chunk have the same blocks
            pairs = enumerate(table, first)
            self.refs = [BlockRef(block, self.attempt, index) for index, block in pairs]
            self.refs_of = blocks
        self.queue.append(ReadyPart(name, self.refs, part, time.monotonic()))
        self.num_parts += 1

    def computed(self, start_s: float, end_s: float) -> None:
        """A step of its prompt was run."""
        self.notes["steps"].append((start_s, end_s))
        if self.notes["began_s"] is None:
            self.notes["began_s"] = start_s


@dataclass(eq=False, slots=True)
class Arrival:
    """One request on its way here."""

    attempt: int
    source: int
    request: Request
    asked_s: float
    ticket: int = -1  # of the reservation
    token: int = -1
    first_s: float = 0.0
    lease: Lease | None = None
    refs: list[BlockRef] = field(default_factory=list)  # of all blocks of the lease
    transfers: list[Transfer] = field(default_factory=list)
    plan: list[list[int]] = field(default_factory=list)
    num_parts: int | None = None  # known at the end
    damaged: set[int] = field(default_factory=set)
    notes: dict[str, Any] = field(
        default_factory=lambda: {
            "blocked_s": 0.0, "control_s": 0.0, "place_s": 0.0, "num_messages": 0,
            "metadata_bytes": 0,
        }
    )  # fmt: skip

    @property
    def is_complete(self) -> bool:
        """Whether all parts have been looked at."""
        return self.num_parts == len(self.transfers) and all(t.done for t in self.transfers)


def nowhere(
    about: Sequence[int], attempt: int, heads: tuple[int, int]
) -> tuple[list[BlockRef], Part]:
    """A part as in a plan, with references that say how much it is and not where."""
    first, last, low, high = about
    refs = [BlockRef(index - first, attempt, index) for index in range(first, last)]
    return refs, Part((low, high), heads)
