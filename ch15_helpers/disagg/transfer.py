"""One movement of blocks between two ranks, its state and what arrived how; who moves them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from ch15_helpers.disagg.leases import Lease
from ch15_helpers.disagg.pool import BlockRef, Part, RegisteredPool


class TransferState(Enum):
    """PENDING turns into exactly one of the others, and that is final."""

    PENDING = "pending"
    DONE = "done"  # every message was sent, or received and examined
    FAILED = "failed"  # the connection broke
    CANCELLED = "cancelled"
    EXPIRED = "expired"  # its deadline passed


@dataclass(slots=True)
class Report:
    """What the checks found, as positions in ``Transfer.refs``.

    Attributes:
        landed: intact, and written to the pool.
        corrupted: came with the right tag and wrong bytes.
        exchanged: came with bytes that belong to another block of the message.
        missing: never came.
        duplicated: came more than once; the first intact one counts.
        num_stray: blocks that nobody asked for, or whose tags are damaged.
        num_out_of_order: intact blocks in another's place; they were put where they belong.
    """

    landed: set[int] = field(default_factory=set)
    corrupted: set[int] = field(default_factory=set)
    exchanged: set[int] = field(default_factory=set)
    missing: set[int] = field(default_factory=set)
    duplicated: set[int] = field(default_factory=set)
    num_stray: int = 0
    num_out_of_order: int = 0

    @property
    def is_clean(self) -> bool:
        """Whether everything came once, intact and in order."""
        bad = self.corrupted or self.exchanged or self.missing or self.duplicated
        return not bad and not self.num_stray and not self.num_out_of_order


@dataclass(eq=False, slots=True)
class Transfer:
    """A send or a receive. Read it freely; only its transport changes it.

    ``deadline_s``, ``started_s`` and ``finished_s`` are on the transport's clock. ``pack_s`` and
    ``place_s`` are the calling thread's time for copies into and out of messages, checksums
    included, as opposed to waiting for bytes.
    """

    sending: bool
    peer: int
    channel: int
    refs: Sequence[BlockRef]
    part: Part
    deadline_s: float
    started_s: float
    lease: Lease | None = None
    state: TransferState = TransferState.PENDING
    error: str | None = None
    report: Report = field(default_factory=Report)
    num_bytes: int = 0
    finished_s: float | None = None
    pack_s: float = 0.0
    place_s: float = 0.0
    # Of the transport:
    num_left: int = 0
    positions: dict[tuple[int, int], int] = field(default_factory=dict)
    table: Any = None  # of its blocks, on a GPU

    @property
    def done(self) -> bool:
        """Whether it is over, well or not. The blocks of a send are then free for other use."""
        return self.state is not TransferState.PENDING

    @property
    def ok(self) -> list[bool]:
        """For each block of a receive: whether its content is in the pool and proven right."""
        return [position in self.report.landed for position in range(len(self.refs))]

    @property
    def to_recompute(self) -> list[int]:
        """Logical indices of the blocks that must be computed again, ascending."""
        landed = self.report.landed
        return sorted(ref.index for i, ref in enumerate(self.refs) if i not in landed)


class Transport(Protocol):
    """What the pipeline needs of a transport. Not for several threads at a time."""

    def register(self, pool: RegisteredPool) -> None:
        """Name the pool whose blocks will travel."""

    def send(
        self,
        refs: Sequence[BlockRef],
        *,
        to: int,
        channel: int,
        part: Part | None = None,
        timeout_s: float | None = None,
    ) -> Transfer:
        """Start sending blocks; they must stay as they are until the transfer is done."""

    def receive(
        self,
        refs: Sequence[BlockRef],
        *,
        source: int,
        channel: int,
        part: Part | None = None,
        timeout_s: float | None = None,
        lease: Lease | None = None,
    ) -> Transfer:
        """Start receiving blocks into the pool."""

    def send_void(
        self, refs: Sequence[BlockRef], *, to: int, channel: int, part: Part | None = None
    ) -> None:
        """Send nothing in place of blocks that a receiver was promised."""

    def poll(self) -> list[Transfer]:
        """Let everything make progress without waiting; returns the transfers that are over."""

    def wait(self, *transfers: Transfer) -> None:
        """Make progress until all these are done, which their deadlines guarantee."""

    def extend(self, transfer: Transfer, timeout_s: float) -> None:
        """Move a deadline to ``timeout_s`` from now."""

    def cancel(self, transfer: Transfer) -> bool:
        """Give a transfer up; False when it is done already."""

    def close(self) -> None:
        """Give everything up and let go of the medium."""
