"""Packs blocks into messages and lands what is intact: the part of a transport that sees data."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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


@dataclass(slots=True)
class Batch:
    """Blocks ``start .. stop - 1`` of a transfer, as its message number ``number``."""

    transfer: Transfer
    number: int
    start: int
    stop: int
    row_bytes: int

    def __len__(self) -> int:
        return self.stop - self.start


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

    def pieces(self, batch: Batch, buffer: Tensor) -> list[Tensor]:
        """How a message is divided, the same on both sides."""
        tags, rows = split(buffer, len(batch))
        return [buffer] if rows.numel() < _APART_BYTES else [rows.view(-1), tags.view(-1)]

    def pack(self, batch: Batch, message: WireMessage, zero_copy: bool) -> None:
        """Fill a message. The peer waits for it even when its transfer has been given up.

        Rows that are sent from the pool itself may be overwritten if the transfer is given up
        meanwhile; their digests tell. Those are computed when the wire takes the tags.
        """
        with self._timed(batch.transfer):
            self._fill(batch, message, zero_copy)

    def _fill(self, batch: Batch, message: WireMessage, zero_copy: bool) -> None:
        transfer = batch.transfer
        tags, rows = split(message.buffer, len(batch))
        message.pieces = self.pieces(batch, message.buffer)
        if transfer.state is not TransferState.PENDING:
            write_void(tags)
            return
        refs = transfer.refs[batch.start : batch.stop]
        blocks = [ref.block for ref in refs]
        own = None
        if zero_copy and len(message.pieces) > 1:
            own = self.pool.memory(blocks, transfer.part)
        if own is not None:
            message.pieces[0] = own.view(-1)
            message.complete = partial(self._seal, batch, tags, own)
        else:
            digests = []
            for some in self._groups(rows):
                self.pool.pack(blocks[some], transfer.part, rows[some])
                digests.append(self._digests(rows[some]) if self._verify else _no_digests(some))
            write_tags(tags, refs, transfer.part, torch.cat(digests))

    def _seal(self, batch: Batch, tags: Tensor, rows: Tensor) -> None:
        transfer = batch.transfer
        with self._timed(transfer):
            groups = self._groups(rows)
            digests = [self._digests(rows[g]) if self._verify else _no_digests(g) for g in groups]
            refs = transfer.refs[batch.start : batch.stop]
            write_tags(tags, refs, transfer.part, torch.cat(digests))

    def aim(self, batch: Batch) -> Tensor | None:
        """Memory of the pool that a message's rows may be received into, if there is any.

        Blocks must be neighbours, and held by a lease: what the wire writes there when the lease
        is over does no harm, as a pinned lease keeps the blocks.
        """
        transfer = batch.transfer
        lease = transfer.lease
        small = batch.row_bytes * len(batch) < _APART_BYTES
        if small or lease is None or not lease.holds(self._clock()):
            return None
        if transfer.state is not TransferState.PENDING:
            return None
        refs = transfer.refs[batch.start : batch.stop]
        return self.pool.memory([ref.block for ref in refs], transfer.part)

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
        tags, rows = split(message.buffer, len(batch))
        if message.direct:
            rows = message.pieces[0].view(len(batch), -1)
        if self._verify:
            self._land_verified(batch, Tags(tags, transfer.part), rows, message.direct)
        else:
            blocks = [ref.block for ref in transfer.refs[batch.start : batch.stop]]
            if not message.direct:
                self.pool.unpack(rows, blocks, transfer.part)
            transfer.report.landed.update(range(batch.start, batch.stop))

    def _land_verified(self, batch: Batch, tags: Tags, rows: Tensor, direct: bool) -> None:
        if tags.void:
            return
        transfer, report = batch.transfer, batch.transfer.report
        for some in self._groups(rows):
            digests = self._digests(rows[some]).tolist()
            chosen: dict[int, int] = {}  # position in the transfer: row
            for row, digest in enumerate(digests, some.start):
                key = tags.keys[row]
                position = None if key is None else transfer.positions.get(key)
                if position is None:
                    report.num_stray += 1
                elif position in report.landed or position in chosen:
                    report.duplicated.add(position)
                elif digest == tags.promised[row] and not (
                    direct and position != batch.start + row
                ):
                    chosen[position] = row
                    report.num_out_of_order += position != batch.start + row
                else:
                    mixed_up = tags.exchanged(digest)
                    (report.exchanged if mixed_up else report.corrupted).add(position)
            report.landed |= chosen.keys()
            if chosen and not direct:
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
        size = rows.shape[1]
        if size not in self._checksums:
            self._checksums[size] = Checksum(size // 8, rows.device)
        return self._checksums[size](rows)


def _no_digests(group: slice) -> Tensor:
    return torch.zeros(group.stop - group.start, dtype=torch.int64)
