"""Moves KV blocks between ranks, proves that they arrived intact, and gives up in time.

One protocol for every medium: a :class:`~ch15_helpers.disagg.wire.Wire` moves bytes, and the
transport makes messages of blocks, windows, checksums, deadlines and cancellation. Data lands in a
message buffer first and in the pool only after it was checked, by the thread that calls ``poll``,
and only while its transfer is pending and its lease holds. So data that comes too late never
reaches a block that has been given to somebody else. Long runs of neighbouring blocks under a lease
are received into the pool without that copy; then the lease is pinned, and its blocks are given to
nobody until the wire has let go of them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise

from ch15_helpers.disagg.clock import Clock, VirtualClock
from ch15_helpers.disagg.freight import Batch, Freight
from ch15_helpers.disagg.freight_gpu import new_freight
from ch15_helpers.disagg.lanes import Lanes
from ch15_helpers.disagg.leases import Lease
from ch15_helpers.disagg.message import TAG_BYTES, message_bytes
from ch15_helpers.disagg.pool import BlockRef, Part, RegisteredPool
from ch15_helpers.disagg.transfer import Transfer, TransferState
from ch15_helpers.disagg.wire import Wire, WireMessage
from ch15_helpers.errors import TransportError

_PENDING = TransferState.PENDING
_MESSAGE_BYTES = {"cpu": 32 * 1024**2, "cuda": 128 * 1024**2}


class BlockTransport:
    """A Transport over any Wire.

    Attributes:
        num_late: messages that arrived for transfers that were no longer pending.
    """

    def __init__(
        self,
        wire: Wire,
        *,
        clock: Clock,
        verify: bool = True,
        max_message_bytes: int | None = None,
        default_timeout_s: float = 30.0,
    ) -> None:
        """Wrap a wire.

        Args:
            clock: deadlines and times are on it. A VirtualClock is moved on by ``wait``.
            verify: compute digests, and check them and the tags. Without, data lands in the order
                of arrival, whatever it is: only to show what the check is for and what it costs.
                Both sides need the same.
            max_message_bytes: small blocks are batched up to this size; None is 32 MiB, 128 MiB
                between GPUs. Both sides need the same.
            default_timeout_s: deadline of transfers that name none.
        """
        self.wire = wire
        self.rank = wire.rank
        self.num_late = 0
        self._clock, self._verify = clock, verify
        self._freight: Freight | None = None
        size = _MESSAGE_BYTES[wire.device.type]
        self._max_message_bytes = size if max_message_bytes is None else max_message_bytes
        self._default_timeout_s = default_timeout_s
        self._active: dict[Transfer, None] = {}
        self._over: list[Transfer] = []
        self._lanes = Lanes(wire)
        self._send_s = 0.0

    @property
    def pool(self) -> RegisteredPool:
        """The pool that is registered. Raises TransportError when there is none."""
        if self._freight is None:
            raise TransportError("no pool is registered; call register first")
        return self._freight.pool

    @property
    def num_pending(self) -> int:
        """Transfers that are not over."""
        return len(self._active)

    @property
    def copy_processor_s(self) -> float:
        """Processor time of this thread for copies and digests so far.

        With what the medium takes for sends: gloo copies into the socket at once.
        """
        return self._send_s + (self._freight.processor_s if self._freight is not None else 0.0)

    # ---- the protocol ----------------------------------------------------------------------

    def register(self, pool: RegisteredPool) -> None:
        """Name the pool whose blocks will travel."""
        if self._active:
            raise TransportError("transfers are pending; register a pool before or after them")
        self._freight = new_freight(pool, self.wire.device, self._clock, self._verify)

    def send(
        self,
        refs: Sequence[BlockRef],
        *,
        to: int,
        channel: int,
        part: Part | None = None,
        timeout_s: float | None = None,
    ) -> Transfer:
        """Start sending blocks.

        Args:
            refs: in an order that the receiver names, too.
            channel: below 2**31. Transfers between two ranks on one channel must be started in
                the same order on both sides; channels do not wait for each other.
            part: layers and heads to send; None is all that the pool has.

        Raises:
            TransportError: no pool, no such rank, or the same block twice.
            ValueError: no such block, layer or head.
        """
        return self._begin(True, refs, to, channel, part, timeout_s, None)

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
        """As ``send``; with a ``lease``, no block is written to once it has been given back."""
        return self._begin(False, refs, source, channel, part, timeout_s, lease)

    def poll(self) -> list[Transfer]:
        """As in Transport."""
        self._progress()
        over, self._over = self._over, []
        return over

    def wait(self, *transfers: Transfer) -> None:
        """Make progress until all these are done, which their deadlines guarantee."""
        while not all(transfer.done for transfer in transfers):
            if not self._progress():
                self._idle()
        waited = set(transfers)
        self._over = [transfer for transfer in self._over if transfer not in waited]

    def send_void(
        self, refs: Sequence[BlockRef], *, to: int, channel: int, part: Part | None = None
    ) -> None:
        """Say on a channel that what its receiver expects next does not come.

        Arguments and errors as for ``send``; the blocks are not read.
        """
        self._begin(True, refs, to, channel, part, None, None, void=True)

    def extend(self, transfer: Transfer, timeout_s: float) -> None:
        """Move a deadline to ``timeout_s`` from now."""
        transfer.deadline_s = self._clock() + timeout_s

    def cancel(self, transfer: Transfer) -> bool:
        """Give a transfer up; False when it is done already.

        What is under way arrives nowhere. The receiver of a cancelled send learns of it from
        empty messages in place of those that were not sent yet.
        """
        return self._end(transfer, TransferState.CANCELLED)

    def close(self) -> None:
        """Give everything up and let go of the medium."""
        for transfer in list(self._active):
            self.cancel(transfer)
        self._lanes.clear()
        self.wire.close()

    def check_invariants(self) -> None:
        """Raise AssertionError when transfers and messages disagree."""
        self._lanes.check_invariants(self._active)

    # ---- inside ----------------------------------------------------------------------------

    def _begin(
        self,
        sending: bool,
        refs: Sequence[BlockRef],
        peer: int,
        channel: int,
        part: Part | None,
        timeout_s: float | None,
        lease: Lease | None,
        void: bool = False,
    ) -> Transfer:
        pool = self.pool
        if not 0 <= peer < self.wire.world_size or peer == self.rank:
            raise TransportError(
                f"rank {peer} is not a peer of rank {self.rank} of {self.wire.world_size}"
            )
        if not 0 <= channel < 2**31:
            raise TransportError(f"channel is {channel}; it must be in 0..2**31 - 1")
        part = pool.whole if part is None else part
        blocks = [ref.block for ref in refs]
        pool.check(blocks, part)
        now_s = self._clock()
        timeout_s = self._default_timeout_s if timeout_s is None else timeout_s
        transfer = Transfer(sending, peer, channel, refs, part, now_s + timeout_s, now_s, lease)
        transfer.positions = {(ref.sequence, ref.index): i for i, ref in enumerate(refs)}
        if len(transfer.positions) < len(refs):
            raise TransportError("a block of a sequence is named twice in one transfer")
        if lease is not None and not set(lease.blocks).issuperset(blocks):
            raise TransportError("the lease does not cover all blocks of the transfer")
        self._active[transfer] = None
        if void:
            self._end(transfer, TransferState.CANCELLED)
        # Some layers of several blocks are never neighbours, and a GPU gathers faster than a link
        # moves; both sides must divide alike.
        apart = part.layers == pool.whole.layers and self.wire.device.type == "cpu"
        self._enqueue(transfer, pool.row_bytes(part), apart)
        self._progress()
        return transfer

    def _enqueue(self, transfer: Transfer, row_bytes: int, apart: bool) -> None:
        count = len(transfer.refs)
        if not count:
            self._end(transfer, TransferState.DONE)
            return
        per_message = max(1, self._max_message_bytes // (row_bytes + TAG_BYTES))
        bounds = [*range(0, count, per_message), count]
        for number, (start, stop) in enumerate(pairwise(bounds)):
            self._lanes.add(Batch(transfer, number, start, stop, row_bytes, apart))
        transfer.num_left = len(bounds) - 1
        transfer.num_bytes = message_bytes(count, row_bytes)

    def _progress(self) -> bool:
        """Expire, start and finish what is due; whether anything happened."""
        now_s, happened = self._clock(), False
        for transfer in [t for t in self._active if t.deadline_s <= now_s]:
            happened |= self._end(transfer, TransferState.EXPIRED, "its deadline has passed")
        happened |= self._start()
        finished = self.wire.finished()
        for message, error in finished:
            self._finish(message, error)
        if finished:
            self._start()
        return happened or bool(finished)

    def _start(self) -> bool:
        """Fill the windows."""
        started = self._lanes.start()
        together = []
        for message, batch in started:
            self._divide(message, batch)
            if self.wire.in_order:
                together.append(message)
            else:  # moves while the next one is packed
                self._hand_over([message])
        if together:
            self._hand_over(together)
        return bool(started)

    def _hand_over(self, messages: list[WireMessage]) -> None:
        freight = self._freight
        assert freight is not None
        began_s, copied_s = time.thread_time(), freight.processor_s
        self.wire.start(messages)
        if messages[0].sending:  # digests that are made meanwhile are counted already
            self._send_s += time.thread_time() - began_s - (freight.processor_s - copied_s)

    def _divide(self, message: WireMessage, batch: Batch) -> None:
        assert self._freight is not None
        zero_copy = self.wire.zero_copy and self._freight.pool.device == self.wire.device
        if message.sending:
            self._freight.pack(batch, message, zero_copy)
            return
        self._freight.aim(batch, message, zero_copy)
        if message.direct:
            assert batch.transfer.lease is not None
            batch.transfer.lease.pin()

    def _finish(self, message: WireMessage, error: str | None) -> None:
        batch = self._lanes.finish(message)
        transfer = batch.transfer
        transfer.num_left -= 1
        if transfer.state is not _PENDING:
            self.num_late += not message.sending and error is None
        elif error is not None:
            self._end(transfer, TransferState.FAILED, error)
        elif transfer.lease is not None and not transfer.lease.holds(self._clock()):
            self._end(transfer, TransferState.CANCELLED, "the lease on its blocks is over")
        else:
            if not message.sending:
                assert self._freight is not None
                self._freight.land(batch, message)
            if not transfer.num_left:
                self._end(transfer, TransferState.DONE)
        if message.direct and transfer.lease is not None:
            transfer.lease.unpin()
        self._lanes.recycle(message)

    def _end(self, transfer: Transfer, state: TransferState, error: str | None = None) -> bool:
        if transfer.state is not _PENDING:
            return False
        transfer.state, transfer.error = state, error
        transfer.finished_s = self._clock()
        if not transfer.sending:
            report = transfer.report
            report.corrupted -= report.landed  # a duplicate was intact
            report.exchanged -= report.landed
            came = report.landed | report.corrupted | report.exchanged
            report.missing = set(range(len(transfer.refs))) - came
        self._active.pop(transfer, None)
        self._over.append(transfer)
        return True

    def _idle(self) -> None:
        """Wait until something may have changed: for real, or on a virtual clock."""
        until_s = min(transfer.deadline_s for transfer in self._active)
        event_s = self.wire.next_event_s()
        if event_s is not None:
            until_s = min(until_s, event_s)
        if isinstance(self._clock, VirtualClock):
            self._clock.advance_to(until_s)
        else:
            self.wire.wait(max(0.0, until_s - self._clock()))
