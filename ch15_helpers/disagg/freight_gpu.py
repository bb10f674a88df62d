"""Freight between GPUs: blocks are packed, named and proven without the host waiting once.

On the way out one kernel gathers the blocks of a message and takes their digests, and another one
writes the tags. On the way in digests are taken as soon as a message is there, on the wire's own
stream, and go to the host with the tags; it reads them when the wire reports the message.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ch15_helpers.disagg.checksum import FOLD, LINE_WORDS, Checksum
from ch15_helpers.disagg.clock import Clock
from ch15_helpers.disagg.freight import Batch, Freight
from ch15_helpers.disagg.message import TAG_WORDS, packed_range, split, write_void
from ch15_helpers.disagg.pool import RegisteredPool
from ch15_helpers.disagg.transfer import TransferState
from ch15_helpers.disagg.wire import WireMessage
from ch15_helpers.kernels.dispatch import triton_installed


def new_freight(pool: RegisteredPool, device: torch.device, clock: Clock, verify: bool) -> Freight:
    """The freight of a pool whose messages are on ``device``."""
    on_gpu = pool.device.type == device.type == "cuda" and triton_installed()
    return (GpuFreight if on_gpu else Freight)(pool, clock, verify)


class GpuFreight(Freight):
    """Fills and examines messages that are memory of the pool's own GPU."""

    def _filling(self, batch: Batch, message: WireMessage) -> Iterator[None]:
        """Launch all of it; the wire's stream waits for this one."""
        from ch15_helpers.kernels.digest_rows_triton import tags_triton

        transfer = batch.transfer
        tags, rows = split(message.buffer, len(batch))
        if transfer.state is not TransferState.PENDING:
            write_void(tags)
            return
        with self._timed(transfer):
            refs = transfer.refs[batch.start : batch.stop]
            about = self._upload([[ref.block, ref.sequence, ref.index] for ref in refs])
            words, part = rows.view(torch.int64), transfer.part
            found = self.pool.runs(part)
            if found is None:
                self.pool.pack([ref.block for ref in refs], part, rows)
                partials = self._partials(words)
            else:
                pages, offset = found
                partials = self._partials(words, pages=pages, about=about, offset=offset)
            tags_triton(
                tags.view(torch.int64), partials, about, int(packed_range(part.layers)),
                int(packed_range(part.heads)), digest=self._verify,
            )  # fmt: skip
            message.ready = torch.cuda.current_stream(self.pool.device).record_event()
        yield from ()  # lazily, one message after the other: the wire moves what is launched

    def aim(self, batch: Batch, message: WireMessage, zero_copy: bool) -> None:
        """See Freight; digests are taken where the wire's stream is then."""
        super().aim(batch, message, zero_copy)
        if self._verify:
            self._checksum(batch.row_bytes)
            message.arrived = partial(self._examine, batch, message)

    def _examine(self, batch: Batch, message: WireMessage, number: int) -> None:
        del number  # it is one piece
        tags, rows = split(message.buffer, len(batch))
        digests = self._partials(rows.view(torch.int64)).sum(1, keepdim=True)
        found = torch.cat([tags.view(torch.int64), digests], 1)
        batch.seen = torch.empty(found.shape, dtype=torch.int64, pin_memory=True)
        batch.seen.copy_(found, non_blocking=True)

    def _land(self, batch: Batch, message: WireMessage) -> None:
        if batch.seen is not None:
            batch.early[0] = batch.seen[:, TAG_WORDS]
        super()._land(batch, message)

    def _on_host(self, batch: Batch, tags: Tensor) -> Tensor:
        if batch.seen is None:  # the wire did not call, as it copies at once
            return tags
        return batch.seen[:, :TAG_WORDS].contiguous().view(torch.uint8)

    def _partials(
        self,
        rows: Tensor,
        *,
        pages: Tensor | None = None,
        about: Tensor | None = None,
        offset: int = 0,
    ) -> Tensor:
        from ch15_helpers.kernels.digest_rows_triton import rows_triton

        checksum: Checksum = self._checksum(8 * rows.shape[1])
        shape = LINE_WORDS, FOLD, checksum.num_lines
        return rows_triton(
            rows, checksum.weights, shape, pages=pages, about=about, offset=offset,
            digest=self._verify,
        )  # fmt: skip

    def _upload(self, values: list[list[int]]) -> Tensor:
        host = torch.tensor(values, dtype=torch.int64).pin_memory()
        return host.to(self.pool.device, non_blocking=True)
