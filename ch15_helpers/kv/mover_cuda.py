"""Block copies on CUDA: own streams, ordered against compute by events, hidden behind it.

Demotion: a gather on the compute stream puts the blocks into a buffer on the device (at memory
speed), and the slow copy over the link leaves from there on its own stream. So compute may
overwrite the blocks as soon as ``store`` returns, and waits for the link only when both halves of
the buffer are still on their way. Promotion: a stream of its own, which first waits for what
compute was given before, since that may still read the blocks' old content. To and from a peer
device, kernels of this device read and write the peer's memory themselves, all blocks in one
launch: a copy for each block would take the host longer than the link.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor

from ch15_helpers.kernels.row_copy import can_copy_between, copy_rows, open_peer
from ch15_helpers.kv.mover import runs
from ch15_helpers.kv.payload import BlockPayload
from ch15_helpers.kv.ticket import Ticket
from ch15_helpers.kv.tier_config import LoadPath

_DIRECT_FROM_BYTES = 1 << 20  # below, starting a copy takes the host longer than the copy
_LONGEST_COPY_BYTES = 8 << 20  # a step's own small uploads wait behind whole copies


class CudaMover:
    """Moves blocks of one device's cache. All methods only start work and return."""

    def __init__(
        self,
        payload: BlockPayload,
        device: torch.device,
        *,
        staging_blocks: int = 32,
        load_path: LoadPath = "auto",
        peer: torch.device | None = None,
    ) -> None:
        self._payload = payload
        self._device = device
        self._out, self._in = _stream(device), _stream(device)
        self._peer_streams = [] if peer is None else [_stream(peer)]
        # Whether a peer's rows are for kernels of this device; without Triton they are copied.
        self._reaches = peer is not None and can_copy_between(device, peer)
        if peer is not None and self._reaches:
            open_peer(device, peer)
        self._chunk = staging_blocks
        size = (staging_blocks, payload.num_bytes)
        self._stage_out = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self._sent: list[torch.cuda.Event | None] = [None, None]
        self._half = 0
        large = payload.contiguous and len(payload.parts) == 1
        large = large and payload.num_bytes >= _DIRECT_FROM_BYTES
        self.direct = payload.contiguous and (
            load_path == "direct" or (load_path == "auto" and large)
        )
        self._stage_in: Tensor | None = None
        if not self.direct:
            self._stage_in = torch.empty(size, dtype=torch.uint8, device=device)
        self._longest = max(1, _LONGEST_COPY_BYTES // payload.num_bytes)

    def new_rows(self, num_slots: int) -> Tensor:
        """Pinned RAM, uint8 [num_slots, payload bytes]."""
        size = (num_slots, self._payload.num_bytes)
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def is_near(self, rows: Tensor) -> bool:
        """Whether one launch of this device's kernels brings all blocks from ``rows``."""
        return self._payload.contiguous and self._reached(rows)

    def fence(self) -> Ticket:
        """What compute was given so far."""
        return Ticket(torch.cuda.current_stream(self._device).record_event())

    def store(self, blocks: Sequence[int], rows: Tensor, slots: Sequence[int]) -> Ticket:
        """Gather on the compute stream, then send on the outward stream."""
        compute = torch.cuda.current_stream(self._device)
        begin = _timed_event()
        for at in range(0, len(blocks), self._chunk):
            some, to = blocks[at : at + self._chunk], slots[at : at + self._chunk]
            half, self._half = self._half, 1 - self._half
            buffer = self._stage_out[half][: len(some)]
            sent = self._sent[half]
            if sent is not None:
                compute.wait_event(sent)
            self._gather(some, buffer)
            self._out.wait_stream(compute)
            with self._on(self._out):
                if at == 0:
                    begin.record(self._out)
                self._send(buffer, rows, to)
            self._sent[half] = self._out.record_event()
        end = _timed_event()
        end.record(self._out)
        return Ticket(end, begin)

    def load(
        self,
        rows: Tensor,
        slots: Sequence[int],
        blocks: Sequence[int],
        after: Sequence[Ticket] = (),
    ) -> Ticket:
        """Bring slots in on the inward stream; the blocks may be read when the ticket is done."""
        for ticket in after:
            if ticket.event is not None:
                self._in.wait_event(ticket.event)
        ids = _pairs(slots, blocks) if self.is_near(rows) else None
        begin, end = _timed_event(), _timed_event()
        with self._on(self._in):
            there = None if ids is None else ids.to(self._device, non_blocking=True)
            begin.record(self._in)
            if there is not None:
                for part, first, last in self._payload.flat():
                    copy_rows(rows[:, first:last], part, there)
            elif self.direct:
                for part, first, last in self._payload.flat():
                    for start, n in runs(slots, blocks, self._longest):
                        source = rows[slots[start] : slots[start] + n, first:last]
                        target = part[blocks[start] : blocks[start] + n]
                        target.copy_(source, non_blocking=True)
            else:
                self._load_staged(rows, slots, blocks)
            end.record(self._in)
        return Ticket(end, begin)

    def copy_rows(
        self, source: Tensor, from_slots: Sequence[int], target: Tensor, to_slots: Sequence[int]
    ) -> Ticket:
        """Peer to host on the outward stream: later stores into the same slots come after it."""
        # A promotion that reads these peer slots was given to the inward stream before.
        self._out.wait_stream(self._in)
        with self._on(self._out):
            for start, n in runs(from_slots, to_slots, self._longest):
                rows = source[from_slots[start] : from_slots[start] + n]
                target[to_slots[start] : to_slots[start] + n].copy_(rows, non_blocking=True)
        return Ticket(self._out.record_event())

    def _load_staged(self, rows: Tensor, slots: Sequence[int], blocks: Sequence[int]) -> None:
        assert self._stage_in is not None
        for at in range(0, len(slots), self._chunk):
            some = slots[at : at + self._chunk]
            buffer = self._stage_in[: len(some)]
            if self._reached(rows):
                self._copy(rows, some, buffer, range(len(some)))
            else:
                for start, n in runs(some, range(len(some)), self._longest):
                    source = rows[some[start] : some[start] + n]
                    buffer[start : start + n].copy_(source, non_blocking=True)
            ids = self._ids(blocks[at : at + self._chunk])
            for part, view in zip(self._payload.parts, self._payload.views(buffer), strict=True):
                part.index_copy_(0, ids, view)

    def _reached(self, rows: Tensor) -> bool:
        return rows.is_cuda and self._reaches

    def _send(self, buffer: Tensor, rows: Tensor, slots: Sequence[int]) -> None:
        """The buffer's rows into slots, on the current stream."""
        if self._reached(rows):
            self._copy(buffer, range(len(slots)), rows, slots)
            return
        for start, n in runs(range(len(slots)), slots, self._longest):
            target = rows[slots[start] : slots[start] + n]
            target.copy_(buffer[start : start + n], non_blocking=True)

    def _gather(self, blocks: Sequence[int], buffer: Tensor) -> None:
        """Blocks into rows [n, payload bytes], on the current stream."""
        ids = self._ids(blocks)
        for part, view in zip(self._payload.parts, self._payload.views(buffer), strict=True):
            if view.is_contiguous():
                torch.index_select(part, 0, ids, out=view)
            else:
                view.copy_(part.index_select(0, ids))

    def _ids(self, numbers: Sequence[int]) -> Tensor:
        """Numbers, int64 [n], on the device when the current stream gets there."""
        ids = torch.tensor(numbers, dtype=torch.int64).pin_memory()
        return ids.to(self._device, non_blocking=True)

    def _copy(
        self, source: Tensor, from_rows: Sequence[int], target: Tensor, to_rows: Sequence[int]
    ) -> None:
        """Rows of this device or of the peer, in one launch on the current stream."""
        ids = _pairs(from_rows, to_rows).to(self._device, non_blocking=True)
        copy_rows(source, target, ids)

    def _on(self, stream: torch.cuda.Stream) -> ExitStack:
        """Make ``stream`` current, and a side stream on the peer: a copy between two devices is
        ordered with the current streams of both, and the peer's compute is not to wait for it."""
        stack = ExitStack()
        for each in (*self._peer_streams, stream):
            stack.enter_context(torch.cuda.stream(each))
        return stack


def _pairs(first: Sequence[int], second: Sequence[int]) -> Tensor:
    """Row numbers for ``copy_rows``, pinned."""
    return torch.from_numpy(np.array([first, second], dtype=np.int32)).pin_memory()


def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _timed_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
