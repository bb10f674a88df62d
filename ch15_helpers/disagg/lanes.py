"""Which messages are queued and which are under way: one window for each channel."""

from __future__ import annotations

from collections import deque

from torch import Tensor

from ch15_helpers.disagg.freight import Batch
from ch15_helpers.disagg.message import message_bytes
from ch15_helpers.disagg.transfer import Transfer
from ch15_helpers.disagg.wire import NoBufferNow, Wire, WireMessage

Lane = tuple[bool, int, int]
"""(sending, peer, channel); the channel is -1 on wires that ignore channels."""


class Lanes:
    """Queues of a transport.

    Both ends of a lane start the same messages in the same order, also those of transfers that
    have been given up: the peer expects them. Lanes are apart, so that a transfer that never
    completes does not hold up the others, and so that the two sides may start their transfers in
    different orders.
    """

    def __init__(self, wire: Wire) -> None:
        self._wire, self._in_order = wire, wire.in_order
        self._queues: dict[Lane, deque[Batch]] = {}
        self._under_way: dict[WireMessage, Batch] = {}
        self._free: dict[int, list[Tensor]] = {}
        self._whole: dict[WireMessage, Tensor] = {}

    def add(self, batch: Batch) -> None:
        """Queue a batch."""
        self._queues.setdefault(self._lane(batch.transfer), deque()).append(batch)

    def start(self) -> list[tuple[WireMessage, Batch]]:
        """Take what fits into the windows; the messages are under way from now on."""
        if not self._queues:
            return []
        started: list[tuple[WireMessage, Batch]] = []
        for lane, queue in list(self._queues.items()):
            busy = sum(self._lane(batch.transfer) == lane for batch in self._under_way.values())
            for _ in range(min(len(queue), self._wire.window - busy)):
                batch = queue[0]
                try:
                    message = self._message(batch)
                except NoBufferNow:
                    if not self._under_way:  # nothing will free any
                        raise
                    break
                queue.popleft()
                self._under_way[message] = batch
                started.append((message, batch))
            if not queue:
                del self._queues[lane]
        return started

    def finish(self, message: WireMessage) -> Batch:
        """A message is no longer under way."""
        return self._under_way.pop(message)

    def recycle(self, message: WireMessage) -> None:
        """Use the buffer of a finished message again."""
        self._free.setdefault(_size_class(len(message.buffer)), []).append(self._whole.pop(message))

    def clear(self) -> None:
        """Forget what is queued."""
        self._queues.clear()

    def check_invariants(self, active: dict[Transfer, None]) -> None:
        """Raise AssertionError when batches are lost or windows exceeded."""
        batches = [*self._under_way.values(), *(b for q in self._queues.values() for b in q)]
        for transfer in active:
            mine = sum(batch.transfer is transfer for batch in batches)
            assert transfer.num_left == mine > 0, "a message is lost"
        for lane, queue in self._queues.items():
            assert all(self._lane(batch.transfer) == lane for batch in queue), "wrong lane"

    def _lane(self, transfer: Transfer) -> Lane:
        return transfer.sending, transfer.peer, -1 if self._in_order else transfer.channel

    def _message(self, batch: Batch) -> WireMessage:
        num_bytes = message_bytes(len(batch), batch.row_bytes)
        free = self._free.get(_size_class(num_bytes))
        whole = free.pop() if free else self._wire.new_buffer(_size_class(num_bytes))
        transfer = batch.transfer
        message = WireMessage(
            transfer.sending,
            transfer.peer,
            transfer.channel,
            whole[:num_bytes],
            len(batch),
            batch.number,
        )
        self._whole[message] = whole
        return message


def _size_class(num_bytes: int) -> int:
    """Sizes of buffers are powers of two, so that few kinds of them are kept."""
    return 1 << max(12, (num_bytes - 1).bit_length())
