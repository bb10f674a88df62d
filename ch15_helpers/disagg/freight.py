"""Packs blocks into messages and lands what is intact: the part of a transport that sees data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ch15_helpers.disagg.checksum import Checksum
from ch15_helpers.disagg.clock import Clock
from ch15_helpers.disagg.message import Tags, split, write_tags, write_void
from ch15_helpers.disagg.pool import RegisteredPool
from ch15_helpers.disagg.transfer import Transfer, TransferState

_IN_CACHE_BYTES = 1024**2


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
    """Fills messages from one pool, and the pool from messages."""

    def __init__(self, pool: RegisteredPool, clock: Clock, verify: bool) -> None:
        self.pool = pool
        self._clock, self._verify = clock, verify
        self._checksums: dict[int, Checksum] = {}

    def pack(self, batch: Batch, buffer: Tensor) -> None:
        """Write a message. The peer waits for it even when its transfer has been given up."""
        transfer, began_s = batch.transfer, self._clock()
        tags, rows = split(buffer, len(batch))
        if transfer.state is not TransferState.PENDING:
            write_void(tags)
            return
        refs = transfer.refs[batch.start : batch.stop]
        digests = []
        for some in self._groups(rows):
            blocks = [ref.block for ref in refs[some]]
            self.pool.pack(blocks, transfer.part, rows[some])
            digests.append(self._digests(rows[some]))
        write_tags(tags, refs, transfer.part, torch.cat(digests))
        transfer.pack_s += self._clock() - began_s

    def land(self, batch: Batch, buffer: Tensor) -> None:
        """Examine a message and write what is intact to the pool."""
        transfer, began_s = batch.transfer, self._clock()
        tags, rows = split(buffer, len(batch))
        if self._verify:
            self._land_verified(batch, Tags(tags, transfer.part), rows)
        else:
            blocks = [ref.block for ref in transfer.refs[batch.start : batch.stop]]
            self.pool.unpack(rows, blocks, transfer.part)
            transfer.report.landed.update(range(batch.start, batch.stop))
        transfer.place_s += self._clock() - began_s

    def _land_verified(self, batch: Batch, tags: Tags, rows: Tensor) -> None:
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
                elif digest == tags.promised[row]:
                    chosen[position] = row
                    report.num_out_of_order += position != batch.start + row
                else:
                    mixed_up = tags.exchanged(digest)
                    (report.exchanged if mixed_up else report.corrupted).add(position)
            if chosen:
                blocks = [transfer.refs[position].block for position in chosen]
                whole = len(chosen) == len(digests)
                taken = rows[some] if whole else rows[list(chosen.values())]
                self.pool.unpack(taken, blocks, transfer.part)
                report.landed |= chosen.keys()

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
