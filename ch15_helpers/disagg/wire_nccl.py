"""Messages over NCCL: each direction between two ranks is a communicator of its own.

NCCL has neither tags nor cancellation. The operations of a communicator run one after the other, in
the order in which they are started, so both sides must start theirs in the same order. With one
communicator for all ranks two pairs would wait for each other, and could do so for ever. With one
for each direction of each pair they cannot, and one whose peer died is aborted alone.

Nothing here makes the host wait: what is packed is followed by its send on the GPU, completion is
an event that is asked, and control messages do not travel this way.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from itertools import permutations
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ch15_helpers.disagg.wire import WireMessage
from ch15_helpers.errors import TransportError

_FOREVER = timedelta(days=365)
# Deadlines and dead peers are the transport's affair: torch's watchdog would end the process.
_SETTINGS = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}


class _Link:
    """One direction between this rank and a peer."""

    def __init__(self, source: int, target: int, rank: int, store: Any, device: Any) -> None:
        make: Any = dist.ProcessGroupNCCL
        options = make.Options()
        options._timeout = _FOREVER
        options.is_high_priority_stream = True
        own = dist.distributed_c10d.PrefixStore(f"ch15/nccl/{source}-{target}", store)
        self._group: Any = make(own, int(rank == target), 2, options)
        self.sending = rank == source
        self.stream: Any = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._after: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.batches: deque[tuple[Any, WireMessage]] = deque()
        self.error: str | None = None
        self.is_over = False

    def move(self, pieces: Iterable[Tensor]) -> Any:
        """Start moving pieces that are ready on the current stream; when the event is, they are."""
        self.stream.wait_event(torch.cuda.current_stream(self.stream.device).record_event())
        with torch.cuda.stream(self.stream):
            for piece in pieces:
                work = (
                    self._group.send([piece], 1, 0)
                    if self.sending
                    else self._group.recv([piece], 0, 0)
                )
                work.wait()  # makes the stream wait, not the host
        return self.stream.record_event()

    def follow(self, event: Any, arrived: Callable[[int], None], num_pieces: int) -> Any:
        """What comes after a message, beside the next one; another event."""
        self._after.wait_event(event)
        with torch.cuda.stream(self._after):
            for number in range(num_pieces):
                arrived(number)
        return self._after.record_event()

    def abort(self, reason: str) -> None:
        """Give up whatever is under way; that may take a while, so a thread does it."""
        if self.error is None:
            self.error = reason
            threading.Thread(target=self._abort, name="nccl-abort", daemon=True).start()

    def _abort(self) -> None:
        try:
            self._group.abort()
        finally:
            self.is_over = True

    def finished(self) -> list[tuple[WireMessage, str | None]]:
        """Messages whose memory NCCL has let go of."""
        done: list[tuple[WireMessage, str | None]] = []
        while self.batches and (self.is_over or self.batches[0][0].query()):
            event, message = self.batches.popleft()
            if self.error is None:
                torch.cuda.current_stream(self.stream.device).wait_event(event)
            done.append((message, self.error))
        return done


class NcclWire:
    """One rank's end of NCCL communicators, one for each direction between two ranks.

    A peer that dies is not noticed by NCCL: its messages stay under way until ``lose`` is called.
    """

    window = 8
    in_order = True
    zero_copy = False  # blocks are gathered: few long messages instead of many short ones

    def __init__(
        self,
        rank: int,
        world_size: int,
        store: Any,
        pairs: Iterable[tuple[int, int]] | None = None,
        timeout_s: float = 60.0,
    ) -> None:
        """Open communicators on the current CUDA device; every rank must do so.

        Args:
            store: of torch.distributed, which all ranks share.
            pairs: (source, target) of the directions to open, the same on every rank; None is all.
            timeout_s: how long to wait for a peer's end.

        Raises:
            TransportError: torch has no NCCL, or a peer does not answer.
        """
        if not dist.is_nccl_available():
            raise TransportError("this torch has no NCCL; use gloo, or a CUDA build on Linux")
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)
        self.rank, self.world_size = rank, world_size
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._refused: list[tuple[WireMessage, str | None]] = []
        self._links: dict[tuple[int, int], _Link] = {}
        every = permutations(range(world_size), 2) if pairs is None else pairs
        for source, target in sorted(every):  # one order for all: nobody waits in a circle
            if rank in (source, target):
                link = _Link(source, target, rank, store, self.device)
                self._links[source, target] = link
                self._connect(link, target if link.sending else source, timeout_s)

    def new_buffer(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def start(self, messages: Sequence[WireMessage]) -> None:
        begun: list[tuple[_Link, WireMessage, Any]] = []
        for message in messages:
            link = self._link(message.peer, message.sending)
            if link.error is not None:
                self._refused.append((message, link.error))
                continue
            pieces = list(message.take())
            if message.ready is not None:  # it was filled before, perhaps on another stream
                link.stream.wait_event(message.ready)
            begun.append((link, message, link.move(pieces)))
        for link, message, event in begun:  # only now: the peer waits for receives
            if message.arrived is not None:
                event = link.follow(event, message.arrived, len(message.pieces))
            link.batches.append((event, message))

    def finished(self) -> list[tuple[WireMessage, str | None]]:
        done, self._refused = self._refused, []
        for link in self._links.values():
            done += link.finished()
        return done

    def next_event_s(self) -> float | None:
        return None

    def wait(self, timeout_s: float) -> None:
        # An event cannot be waited for with a limit; the transport polls again at once.
        del timeout_s

    def lose(self, peer: int, reason: str) -> None:
        """A peer is gone: everything to and from it ends with an error, now and later."""
        for ends, link in self._links.items():
            if peer in ends:
                link.abort(reason)

    def move(self, tensors: Sequence[Tensor], peer: int, sending: bool) -> None:
        """Plain sends or receives, waited for. What a transport is measured against."""
        self._link(peer, sending).move(tensors).synchronize()

    def close(self) -> None:
        for link in self._links.values():
            if link.batches:
                link.abort("the wire is closed")

    def _link(self, peer: int, sending: bool) -> _Link:
        ends = (self.rank, peer) if sending else (peer, self.rank)
        link = self._links.get(ends)
        if link is None:
            raise TransportError(
                f"no NCCL link from rank {ends[0]} to rank {ends[1]} was opened; name it in pairs"
            )
        return link

    def _connect(self, link: _Link, peer: int, timeout_s: float) -> None:
        """A first message: NCCL sets up a connection with it, and waits for the peer in that."""
        event = link.move([self.new_buffer(8).zero_()])
        until_s = time.monotonic() + timeout_s
        while not event.query():
            if time.monotonic() > until_s:
                raise TransportError(f"rank {peer} did not answer over NCCL within {timeout_s} s")
