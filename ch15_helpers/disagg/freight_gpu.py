"""Freight between GPUs: blocks are packed, named and proven without the host waiting once.

On the way out one kernel gathers the blocks of a message and takes their digests, and another one
writes the tags. On the way in digests are taken as soon as a message is there, on the wire's own
stream, and go to the host with the tags; it reads them when the wire reports the message.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from ch15_helpers.disagg.checksum import FOLD, LINE_WORDS, Checksum
from ch15_helpers.disagg.clock import Clock
from ch15_helpers.disagg.freight import Batch, Freight
from ch15_helpers.disagg.message import TAG_WORDS, packed_range, split, write_void
from ch15_helpers.disagg.pool import RegisteredPool
from ch15_helpers.disagg.transfer import Transfer, TransferState
from ch15_helpers.disagg.wire import WireMessage
from ch15_helpers.kernels.dispatch import triton_installed


def new_freight(pool: RegisteredPool, device: torch.device, clock: Clock, verify: bool) -> Freight:
    """The freight of a pool whose messages are on ``device``."""
    on_gpu = pool.device.type == device.type == "cuda" and triton_installed()
    return (GpuFreight if on_gpu else Freight)(pool, clock, verify)


class _Table:
    """Of each row block, sequence, logical index, layers and heads, int64 [n, 5]."""

    def __init__(self, transfer: Transfer, device: torch.device) -> None:
        part, count = transfer.part, len(transfer.refs)
        self.host = np.empty((count, 5), dtype=np.int64)
        self.host[:, :3] = np.fromiter(chain.from_iterable(transfer.refs), np.int64).reshape(-1, 3)
        self.host[:, 3:] = packed_range(part.layers), packed_range(part.heads)
        pinned = torch.from_numpy(self.host).pin_memory()
        self._on_gpu = pinned.to(device, non_blocking=True)
        self._there = torch.cuda.current_stream(device).record_event()

    def on_gpu(self) -> Tensor:
        """For whatever the current stream does next."""
        torch.cuda.current_stream(self._on_gpu.device).wait_event(self._there)
        return self._on_gpu


class GpuFreight(Freight):
    """Fills and examines messages that are memory of the pool's own GPU."""

    def __init__(self, pool: RegisteredPool, clock: Clock, verify: bool) -> None:
        super().__init__(pool, clock, verify)
        self._compile()

    def _compile(self) -> None:
        """Run every kernel once, on a row of block 0: not in the middle of a first prompt."""
        from ch15_helpers.kernels.digest_rows_triton import ABOUT_WORDS, tags_triton

        found, device = self.pool.runs(self.pool.whole), self.pool.device
        num_words = self.pool.row_bytes(self.pool.whole) // 8
        rows = torch.zeros((1, num_words), dtype=torch.int64, device=device)
        about = torch.zeros((1, ABOUT_WORDS), dtype=torch.int64, device=device)
        if found is not None:
            self._rows(rows, 1, found, about, self._verify)
            self._rows(rows, 2, found, about, False)
        tags = torch.zeros((1, TAG_WORDS), dtype=torch.int64, device=device)
        tags_triton(tags, self._rows(rows), about, digest=self._verify)

    def _filling(self, batch: Batch, message: WireMessage) -> Iterator[None]:
        """Launch all of it; the wire's stream waits for this one."""
        from ch15_helpers.kernels.digest_rows_triton import tags_triton

        transfer = batch.transfer
        tags, rows = split(message.buffer, len(batch))
        if transfer.state is not TransferState.PENDING:
            write_void(tags)
            return
        with self._timed(transfer):
            about = self._about(batch)
            partials = self._copy(batch, rows, 1, self._verify)
            tags_triton(tags.view(torch.int64), partials, about, digest=self._verify)
            message.ready = torch.cuda.current_stream(self.pool.device).record_event()
        yield from ()  # lazily, one message after the other: the wire moves what is launched

    def aim(self, batch: Batch, message: WireMessage, zero_copy: bool) -> None:
        """See Freight; digests are taken where the wire's stream is then."""
        super().aim(batch, message, zero_copy)
        self._about(batch)  # while the bytes are under way
        if self._verify:
            self._checksum(batch.row_bytes)
            message.arrived = partial(self._examine, batch, message)

    def _examine(self, batch: Batch, message: WireMessage, number: int) -> None:
        del number  # it is one piece
        tags, rows = split(message.buffer, len(batch))
        partials = self._rows(rows.view(torch.int64))
        batch.seen = torch.empty((len(batch), TAG_WORDS), dtype=torch.int64, pin_memory=True)
        batch.seen.copy_(tags.view(torch.int64), non_blocking=True)
        batch.partials = torch.empty(partials.shape, dtype=torch.int64, pin_memory=True)
        batch.partials.copy_(partials, non_blocking=True)

    def _land(self, batch: Batch, message: WireMessage) -> None:
        landed, places = batch.transfer.report.landed, range(batch.start, batch.stop)
        if self._is_as_promised(batch) and landed.isdisjoint(places):
            self._copy(batch, split(message.buffer, len(batch))[1], 2, False)
            landed.update(places)
            return
        if batch.partials is not None:
            batch.early[0] = batch.partials.sum(1)
        super()._land(batch, message)

    def _is_as_promised(self, batch: Batch) -> bool:
        """Whether every row is what its place expects: the rule, and quickly seen."""
        if not self._verify:
            return True
        if batch.seen is None or batch.partials is None:
            return False
        seen, table = batch.seen.numpy(), batch.transfer.table.host[batch.start : batch.stop]
        digests = batch.partials.numpy().sum(1)
        return np.array_equal(seen[:, :4], table[:, 1:]) and np.array_equal(seen[:, 4], digests)

    def _on_host(self, batch: Batch, tags: Tensor) -> Tensor:
        if batch.seen is None:  # the wire did not call, as it copies at once
            return tags
        return batch.seen.view(torch.uint8)

    def _about(self, batch: Batch) -> Tensor:
        transfer = batch.transfer
        if transfer.table is None:
            transfer.table = _Table(transfer, self.pool.device)
        table: _Table = transfer.table
        return table.on_gpu()[batch.start : batch.stop]

    def _copy(self, batch: Batch, rows: Tensor, mode: int, digest: bool) -> Tensor:
        """Blocks to rows (mode 1) or rows to blocks (mode 2); partial digests of the rows."""
        words, part, found = rows.view(torch.int64), batch.transfer.part, None
        found = self.pool.runs(part)
        if found is not None:
            return self._rows(words, mode, found, self._about(batch), digest)
        blocks = [ref.block for ref in batch.transfer.refs[batch.start : batch.stop]]
        if mode == 2:
            self.pool.unpack(rows, blocks, part)
            return rows
        self.pool.pack(blocks, part, rows)
        return self._rows(words, digest=digest)

    def _rows(
        self,
        rows: Tensor,
        mode: int = 0,
        found: tuple[Tensor, int] | None = None,
        about: Tensor | None = None,
        digest: bool = True,
    ) -> Tensor:
        from ch15_helpers.kernels.digest_rows_triton import rows_triton

        checksum: Checksum = self._checksum(8 * rows.shape[1])
        shape = LINE_WORDS, FOLD, checksum.num_lines
        pages, offset = (None, 0) if found is None else found
        return rows_triton(
            rows, checksum.weights, shape, mode=mode, pages=pages, about=about, offset=offset,
            digest=digest,
        )  # fmt: skip
