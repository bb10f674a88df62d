"""Messages over torch.distributed: gloo between CPUs, NCCL between GPUs.

gloo reports that a receive is complete only to whoever waits for it, and a wait that times out
closes the connection. So each peer and direction has a thread that waits without a limit; deadlines
are the transport's affair, and what arrives after them is dropped there.

NCCL has neither tags nor cancellation. Operations between two ranks are matched in the order in
which they are started, so both sides must start their transfers in the same order.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ch15_helpers.disagg.wire import WireMessage
from ch15_helpers.errors import TransportError

_FOREVER = timedelta(days=365)


class GlooWire:
    """One rank's end of a gloo process group.

    A peer that dies ends all messages to and from it with an error. One that hangs ends none:
    then ``close`` leaves its threads behind, and the process must leave with ``os._exit``.
    """

    window = 4
    in_order = False

    def __init__(self, group: Any = None) -> None:
        """``group`` is a process group that nobody else uses; None is the default group."""
        if not dist.is_initialized() or dist.get_backend(group) != "gloo":
            raise TransportError("GlooWire needs an initialised torch.distributed group of gloo")
        self._group = group
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self.device = torch.device("cpu")
        self._changed = threading.Condition()
        self._done: deque[tuple[WireMessage, str | None]] = deque()
        self._waiters: dict[tuple[bool, int], tuple[threading.Thread, SimpleQueue[Any]]] = {}

    def new_buffer(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def start(self, messages: Sequence[WireMessage]) -> None:
        for message in messages:
            try:
                if message.sending:
                    work = dist.isend(
                        message.buffer,
                        group=self._group,
                        group_dst=message.peer,
                        tag=message.channel,
                    )
                else:
                    work = dist.irecv(
                        message.buffer,
                        group=self._group,
                        group_src=message.peer,
                        tag=message.channel,
                    )
            except RuntimeError as error:  # the connection is closed already
                self._report(message, str(error))
                continue
            self._waiter(message.sending, message.peer).put((work, message))

    def finished(self) -> list[tuple[WireMessage, str | None]]:
        with self._changed:
            done = list(self._done)
            self._done.clear()
        return done

    def next_event_s(self) -> float | None:
        return None

    def wait(self, timeout_s: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._done, timeout_s)

    def close(self) -> None:
        for _, queue in self._waiters.values():
            queue.put(None)

    def _waiter(self, sending: bool, peer: int) -> SimpleQueue[Any]:
        key = sending, peer
        if key not in self._waiters:
            queue: SimpleQueue[Any] = SimpleQueue()
            name = f"gloo-{'to' if sending else 'from'}-{peer}"
            thread = threading.Thread(target=self._follow, args=(queue,), name=name, daemon=True)
            self._waiters[key] = thread, queue
            thread.start()
        return self._waiters[key][1]

    def _follow(self, queue: SimpleQueue[Any]) -> None:
        """Wait for one message after the other, in the order in which they were started."""
        while (item := queue.get()) is not None:
            work, message = item
            try:
                work.wait(_FOREVER)
            except RuntimeError as error:
                self._report(message, str(error))
            else:
                self._report(message, None)
            del work, item, message

    def _report(self, message: WireMessage, error: str | None) -> None:
        with self._changed:
            self._done.append((message, error))
            self._changed.notify_all()


class NcclWire:
    """One rank's end of a NCCL process group, on a stream of its own.

    Everything that is started together goes as one batch of isend and irecv. The group must have
    been initialised with ``device_id``, so that its communicator exists before the first batch.
    """

    window = 8
    in_order = True

    def __init__(self, group: Any = None) -> None:
        """``group`` is a process group that nobody else uses; None is the default group."""
        if not dist.is_initialized() or dist.get_backend(group) != "nccl":
            raise TransportError("NcclWire needs an initialised torch.distributed group of NCCL")
        self._group = group
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._stream: torch.cuda.Stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._batches: deque[tuple[torch.cuda.Event, list[WireMessage]]] = deque()

    def new_buffer(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def start(self, messages: Sequence[WireMessage]) -> None:
        # Messages were packed on the current stream, and old buffers were read there.
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        operations = [
            dist.P2POp(
                dist.isend if message.sending else dist.irecv,
                message.buffer,
                group=self._group,
                group_peer=message.peer,
            )
            for message in messages
        ]
        with torch.cuda.stream(self._stream):
            for work in dist.batch_isend_irecv(operations):
                work.wait()  # makes the stream wait, not the host
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        self._batches.append((event, list(messages)))

    def finished(self) -> list[tuple[WireMessage, str | None]]:
        done: list[tuple[WireMessage, str | None]] = []
        while self._batches and self._batches[0][0].query():  # type: ignore[no-untyped-call]
            event, messages = self._batches.popleft()
            torch.cuda.current_stream(self.device).wait_event(event)
            done += [(message, None) for message in messages]
        return done

    def next_event_s(self) -> float | None:
        return None

    def wait(self, timeout_s: float) -> None:
        # An event cannot be waited for with a limit; the transport polls again at once.
        del timeout_s

    def close(self) -> None:
        self._batches.clear()
