"""Messages over torch.distributed's gloo, between CPUs.

gloo reports that a receive is complete only to whoever waits for it, and a wait that times out
closes the connection. So each channel in use has a thread that waits without a limit; deadlines are
the transport's affair, and what arrives after them is dropped there.
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

from ch15_helpers.disagg.wire import Bell, WireMessage
from ch15_helpers.errors import TransportError

_FOREVER = timedelta(days=365)


class _Worker:
    """A thread's queue, and how many of its messages are not over."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[Any] = SimpleQueue()
        self.num_left = 0


class GlooWire:
    """One rank's end of a gloo process group.

    A peer that dies ends all messages to and from it with an error. One that hangs ends none:
    then ``close`` leaves its threads behind, and the process must leave with ``os._exit``.
    """

    window = 8
    in_order = False
    zero_copy = True

    def __init__(self, group: Any = None) -> None:
        """``group`` is a process group that nobody else uses; None is the default group."""
        if not dist.is_initialized() or dist.get_backend(group) != "gloo":
            raise TransportError("GlooWire needs an initialised torch.distributed group of gloo")
        self._group: Any = dist.group.WORLD if group is None else group
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self.device = torch.device("cpu")
        self._changed = threading.Condition()
        self.bell = Bell()  # rings while there is something to fetch with ``finished``
        self._done: deque[tuple[WireMessage, str | None]] = deque()
        self._workers: list[_Worker] = []
        self._idle: list[_Worker] = []
        self._busy: dict[tuple[bool, int, int], _Worker] = {}

    def new_buffer(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def start(self, messages: Sequence[WireMessage]) -> None:
        for message in messages:
            try:
                works = [self._post(message, piece) for piece in message.take()]
            except RuntimeError as error:  # the connection is closed already
                with self._changed:
                    self._done.append((message, str(error)))
                    self.bell.ring()
                continue
            self._assign(works, message)

    def finished(self) -> list[tuple[WireMessage, str | None]]:
        if not self._done:
            return []
        with self._changed:
            done = list(self._done)
            self._done.clear()
            self.bell.reset()
        return done

    def next_event_s(self) -> float | None:
        return None

    def wait(self, timeout_s: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._done, timeout_s)

    def close(self) -> None:
        for worker in self._workers:
            worker.queue.put(None)

    def _post(self, message: WireMessage, piece: Tensor) -> Any:
        # What dist.isend and dist.irecv do, without their checks of each call.
        move = self._group.send if message.sending else self._group.recv
        return move([piece], message.peer, message.channel)

    def _assign(self, works: list[Any], message: WireMessage) -> None:
        """Give a message to the thread that waits for its channel, or to an idle one."""
        key = message.sending, message.peer, message.channel
        with self._changed:
            worker = self._busy.get(key)
            if worker is None:
                worker = self._idle.pop() if self._idle else self._hire()
                self._busy[key] = worker
            worker.num_left += 1
        worker.queue.put((key, works, message))

    def _hire(self) -> _Worker:
        worker = _Worker()
        self._workers.append(worker)
        name = f"gloo-wait-{len(self._workers)}"
        threading.Thread(target=self._follow, args=(worker,), name=name, daemon=True).start()
        return worker

    def _follow(self, worker: _Worker) -> None:
        """Wait for one message after the other, in the order in which they were started."""
        while (item := worker.queue.get()) is not None:
            key, works, message = item
            error = None
            try:
                for number, work in enumerate(works):
                    work.wait(_FOREVER)
                    if message.arrived is not None:
                        message.arrived(number)
            except RuntimeError as problem:
                error = str(problem)
            with self._changed:
                self._done.append((message, error))
                self.bell.ring()
                worker.num_left -= 1
                if not worker.num_left:
                    del self._busy[key]
                    self._idle.append(worker)
                self._changed.notify_all()
            del work, works, item, message
