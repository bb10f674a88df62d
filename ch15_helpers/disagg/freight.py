"""Packs blocks into messages and lands what is intact: the part of a transport that sees data."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ch15_helpers.disagg.checksum import Checksum
from ch15_helpers.disagg.clock import Clock
from ch15_helpers.disagg.message import Tags, split, write_tags, write_void
from ch15_helpers.disagg.pool import RegisteredPool
from ch15_helpers.disagg.transfer import Transfer, TransferState
from ch15_helpers.disagg.wire import WireMessage

_IN_CACHE_BYTES = 1024**2
_APART_BYTES = 256 * 1024  # rows of this size and more travel apart from their tags: no copy
# A piece costs a lock and a wake-up on each side; the last digest waits for one.
_PIECE_BYTES = 3 * 1024**2


@dataclass(slots=True)
class Batch:
    """Blocks ``start .. stop - 1`` of a transfer, as its message number ``number``.

    ``apart`` rows travel apart from their tags, as they may lie in a pool the way they travel.
    ``early`` has the digests of pieces that arrived while others were under way; ``seen`` and
    ``partials`` the tags and the parts of digests that a GPU left on the host.
    """

    transfer: Transfer
    number: int
    start: int
    stop: int
    row_bytes: int
    apart: bool
    early: dict[int, Tensor] = field(default_factory=dict)
    seen: Tensor | None = None
    partials: Tensor | None = None

    def __len__(self) -> int:
        return self.stop - self.start

    def runs(self) -> list[slice]:
        """Its rows as they travel, piece by piece before the tags; none: all in one piece."""
        count, size = len(self), self.row_bytes
        if not self.apart or count * size < _APART_BYTES:
            return []
        step = max(1, _PIECE_BYTES // size)
        return [slice(first, min(first + step, count)) for first in range(0, count, step)]


class Freight:
    """Fills messages from one pool, and the pool from messages.

    Attributes:
        processor_s: time of the calling thread's processor for that, digests included.
    """

    def __init__(self, pool: RegisteredPool, clock: Clock, verify: bool) -> None:
        self.pool = pool
        self._clock, self._verify = clock, verify
        self._checksums: dict[int, Checksum] = {}
        self.processor_s = 0.0

    def pack(self, batch: Batch, message: WireMessage, zero_copy: bool) -> None:
        """Divide a message that is sent; the wire has it filled piece by piece.

        The peer waits for it even when its transfer has been given up. Rows that are sent from the
        pool itself may be overwritten if the transfer is given up meanwhile; their digests tell.
        """
        self._divide(batch, message, zero_copy)
        message.filling = self._filling(batch, message)

    def _divide(self, batch: Batch, message: WireMessage, zero_copy: bool) -> None:
        """Choose the pieces of a message, each memory of the pool where that is possible."""
        runs = batch.runs()
        if not runs:
            message.pieces = [message.buffer]
            return
        tags, rows = split(message.buffer, len(batch))
        pieces = [rows[run].view(-1) for run in runs]
        if zero_copy and batch.transfer.state is TransferState.PENDING:
            blocks = [ref.block for ref in batch.transfer.refs[batch.start : batch.stop]]
            tables = [blocks[run] for run in runs]
            for number, own in enumerate(self.pool.memory(tables, batch.transfer.part)):
                if own is not None:
                    pieces[number] = own.view(-1)
                    message.own.add(number)
        message.pieces = [*pieces, tags.view(-1)]

    def _filling(self, batch: Batch, message: WireMessage) -> Iterator[None]:
        """Make piece after piece ready, and the tags when all of them may move.

        Rows of the pool itself are read for their digests only then, while the wire copies them.
        """
        transfer, runs, size = batch.transfer, batch.runs(), batch.row_bytes
        tags, rows = split(message.buffer, len(batch))
        if transfer.state is not TransferState.PENDING:
            write_void(tags)
            return
        refs = transfer.refs[batch.start : batch.stop]
        blocks = [ref.block for ref in refs]
        digests: list[list[Tensor]] = []
        for number, run in enumerate(runs or [slice(0, len(batch))]):
            digests.append([])
            for some in self._groups(rows[run]) if number not in message.own else ():
                with self._timed(transfer):
                    piece = rows[run][some]
                    self.pool.pack(blocks[run][some], transfer.part, piece)
                    digests[number].append(self._digests(piece))
            if runs:
                yield
        with self._timed(transfer):
            for number in message.own:
                digests[number].append(self._digests(message.pieces[number].view(-1, size)))
            write_tags(tags, refs, transfer.part, torch.cat([d for each in digests for d in each]))

    def aim(self, batch: Batch, message: WireMessage, zero_copy: bool) -> None:
        """Divide a message that is received, like ``pack``; into the pool where that is possible.

        It is under a lease: what the wire writes to the blocks when the lease is over does no
        harm, as a pinned lease keeps them.
        """
        lease = batch.transfer.lease
        held = lease is not None and lease.holds(self._clock())
        self._divide(batch, message, zero_copy and held)
        if message.own and self._verify:
            self._checksum(batch.row_bytes)
            message.arrived = partial(self._arrived, batch, message)

    def _arrived(self, batch: Batch, message: WireMessage, number: int) -> None:
        """Digests of a piece while the next one is under way; on any thread."""
        if number in message.own and batch.transfer.state is TransferState.PENDING:
            rows = message.pieces[number].view(-1, batch.row_bytes)
            digests = torch.empty(len(rows), dtype=torch.int64)
            self._checksums[batch.row_bytes].into(rows, digests)
            batch.early[number] = digests

    def land(self, batch: Batch, message: WireMessage) -> None:
        """Examine a message and write what is intact to the pool, where it is not there yet."""
        with self._timed(batch.transfer):
            self._land(batch, message)

    @contextmanager
    def _timed(self, transfer: Transfer) -> Iterator[None]:
        began_s, processor_s = self._clock(), time.thread_time()
        yield
        self.processor_s += time.thread_time() - processor_s
        if transfer.sending:
            transfer.pack_s += self._clock() - began_s
        else:
            transfer.place_s += self._clock() - began_s

    def _land(self, batch: Batch, message: WireMessage) -> None:
        transfer = batch.transfer
        buffer_tags, rows = split(message.buffer, len(batch))
        tags = Tags(self._on_host(batch, buffer_tags), transfer.part) if self._verify else None
        if tags is not None and tags.void:
            return
        blocks = [ref.block for ref in transfer.refs[batch.start : batch.stop]]
        for number, run in enumerate(batch.runs() or [slice(0, len(batch))]):
            own = number in message.own
            piece = message.pieces[number].view(-1, batch.row_bytes) if own else rows[run]
            if tags is not None:
                self._land_verified(batch, tags, run.start, piece, own, batch.early.get(number))
            elif not own:
                self.pool.unpack(piece, blocks[run], transfer.part)
        if tags is None:
            transfer.report.landed.update(range(batch.start, batch.stop))

    def _on_host(self, batch: Batch, tags: Tensor) -> Tensor:
        return tags

    def _land_verified(
        self,
        batch: Batch,
        tags: Tags,
        first: int,
        rows: Tensor,
        own: bool,
        early: Tensor | None,
    ) -> None:
        """Rows ``first ..`` of a message; those that are the pool's ``own`` memory stay there."""
        transfer, report = batch.transfer, batch.transfer.report
        for some in self._groups(rows) if early is None else [slice(0, len(rows))]:
            digests = (self._digests(rows[some]) if early is None else early).tolist()
            chosen: dict[int, int] = {}  # position in the transfer: row
            for row, digest in enumerate(digests, some.start):
                tag, place = first + row, batch.start + first + row
                key = tags.keys[tag]
                position = None if key is None else transfer.positions.get(key)
                if position is None:
                    report.num_stray += 1
                elif position in report.landed or position in chosen:
                    report.duplicated.add(position)
                elif digest == tags.promised[tag] and not (own and position != place):
                    chosen[position] = row
                    report.num_out_of_order += position != place
                else:
                    mixed_up = tags.exchanged(digest)
                    (report.exchanged if mixed_up else report.corrupted).add(position)
            report.landed |= chosen.keys()
            if chosen and not own:
                blocks = [transfer.refs[position].block for position in chosen]
                whole = len(chosen) == len(digests)
                taken = rows[some] if whole else rows[list(chosen.values())]
                self.pool.unpack(taken, blocks, transfer.part)

    def _groups(self, rows: Tensor) -> list[slice]:
        """On a CPU, what fits into its caches: then a digest costs little beside the copy."""
        count = len(rows)
        step = max(1, _IN_CACHE_BYTES // rows.shape[1]) if rows.device.type == "cpu" else count
        return [slice(start, min(start + step, count)) for start in range(0, count, step)]

    def _digests(self, rows: Tensor) -> Tensor:
        if not self._verify:
            return torch.zeros(len(rows), dtype=torch.int64)
        return self._checksum(rows.shape[1])(rows)

    def _checksum(self, row_bytes: int) -> Checksum:
        if row_bytes not in self._checksums:
            self._checksums[row_bytes] = Checksum(row_bytes // 8, self.pool.device)
        return self._checksums[row_bytes]
