"""What moves messages between ranks. A wire knows bytes, peers and channels, and no blocks."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ch15_helpers.errors import TransportError


class NoBufferNow(TransportError):
    """A wire has no memory for a message until one that is under way is over."""


@dataclass(eq=False, slots=True)
class WireMessage:
    """One message under way.

    Attributes:
        sending: or receiving.
        peer: rank at the other end.
        channel: messages of one channel arrive in the order in which they were sent.
        buffer: uint8 [n], contiguous; belongs to the wire until the message is finished.
        num_blocks: how many tags its first bytes hold.
        number: place in its transfer.
        pieces: what moves, in order: parts of the buffer, or memory of a pool.
        own: numbers of the pieces that are memory of the pool.
        filling: of a send, makes one piece after the other ready; see ``take``.
        arrived: of a receive, may be called by any thread with the number of a piece that is
            there, while later ones are still under way: its digests are computed then. Between
            GPUs by the thread that starts it: what it launches comes after the piece.
        ready: between GPUs, the event of what fills it.
    """

    sending: bool
    peer: int
    channel: int
    buffer: Tensor
    num_blocks: int
    number: int
    pieces: list[Tensor] = field(default_factory=list)
    own: set[int] = field(default_factory=set)
    filling: Iterator[None] | None = None
    arrived: Callable[[int], None] | None = None
    ready: Any = None

    @property
    def direct(self) -> bool:
        """Whether rows are memory of the pool."""
        return bool(self.own)

    def seal(self) -> None:
        """Make all pieces ready."""
        if self.filling is not None:
            deque(self.filling, maxlen=0)

    def take(self) -> Iterator[Tensor]:
        """The pieces in order, each made ready only now: those before it move meanwhile."""
        for piece in self.pieces:
            if self.filling is not None:
                next(self.filling, None)
            yield piece
        self.seal()

    @property
    def num_bytes(self) -> int:
        """Bytes that move."""
        return sum(len(piece) for piece in self.pieces)


class Wire(Protocol):
    """Moves messages; every one that is started is reported finished, well or not.

    Sends and receives are matched by peer and channel, in order. Both sides must start the same
    messages of the same sizes.

    Attributes:
        rank, world_size: of this end.
        device: where buffers must be.
        window: how many messages of one channel should be under way at once.
        in_order: channels are ignored: whatever goes between two ranks is matched in the order in
            which both sides start it.
        zero_copy: pieces that are sent may be the pool's own memory.
    """

    rank: int
    world_size: int
    device: torch.device
    in_order: bool

    @property
    def window(self) -> int: ...

    @property
    def zero_copy(self) -> bool: ...

    def new_buffer(self, num_bytes: int) -> Tensor:
        """Memory for a message, uint8 [num_bytes] on ``device``. Raises NoBufferNow."""

    def start(self, messages: Sequence[WireMessage]) -> None:
        """Begin moving; does not wait."""

    def finished(self) -> list[tuple[WireMessage, str | None]]:
        """Messages that are over since the last call, each with what went wrong."""

    def next_event_s(self) -> float | None:
        """When a modelled wire will have something to do; None for a real one."""

    def wait(self, timeout_s: float) -> None:
        """Block until a message finishes, or for ``timeout_s`` seconds."""

    def close(self) -> None:
        """Move nothing more."""


class Bell:
    """What a thread can wait for in ``select`` beside sockets. Its owner keeps calls apart."""

    def __init__(self) -> None:
        self._ends = os.pipe()
        for end in self._ends:
            os.set_blocking(end, False)
        self._rung = False

    def fileno(self) -> int:
        """Readable while it rings."""
        return self._ends[0]

    def ring(self) -> None:
        """Wake whoever waits; once more does nothing."""
        if not self._rung:
            os.write(self._ends[1], b"!")
            self._rung = True

    def reset(self) -> None:
        """Ring no longer."""
        if self._rung:
            os.read(self._ends[0], 1)
            self._rung = False


@dataclass(slots=True)
class _Match:
    """Sends that wait for receives, or the reverse, of one channel."""

    sends: deque[tuple[int, WireMessage]] = field(default_factory=deque)
    receives: deque[tuple[int, WireMessage]] = field(default_factory=deque)


class LocalHub:
    """Joins the ends of an in-process wire: a message is one copy in memory.

    Ends may belong to different threads.
    """

    def __init__(self, world_size: int, device: torch.device | str = "cpu") -> None:
        if world_size < 1:
            raise ValueError(f"world_size must be at least 1, got {world_size}")
        self.world_size = world_size
        self.device = torch.device(device)
        self.changed = threading.Condition()
        self.done: list[list[tuple[WireMessage, str | None]]] = [[] for _ in range(world_size)]
        self._matches: dict[tuple[int, int, int], _Match] = {}
        self._closed: set[int] = set()

    def wire(self, rank: int) -> LocalWire:
        """The end of one rank."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank must be in 0..{self.world_size - 1}, got {rank}")
        return LocalWire(self, rank)

    def add(self, rank: int, message: WireMessage) -> None:
        """Match a message with its counterpart, or keep it until that comes."""
        ends = (rank, message.peer) if message.sending else (message.peer, rank)
        with self.changed:
            if message.peer in self._closed:
                self.done[rank].append((message, f"rank {message.peer} is closed"))
                return
            match = self._matches.setdefault((*ends, message.channel), _Match())
            (match.sends if message.sending else match.receives).append((rank, message))
            while match.sends and match.receives:
                self._deliver(match.sends.popleft(), match.receives.popleft())
            self.changed.notify_all()

    def _deliver(self, send: tuple[int, WireMessage], receive: tuple[int, WireMessage]) -> None:
        sent, expected = send[1], receive[1]
        error = None
        if [len(piece) for piece in sent.pieces] == [len(piece) for piece in expected.pieces]:
            for source, target in zip(sent.pieces, expected.pieces, strict=True):
                target.copy_(source)
        else:
            error = f"{sent.num_bytes} bytes were sent, {expected.num_bytes} were expected"
        for rank, message in (send, receive):
            self.done[rank].append((message, error))

    def close(self, rank: int) -> None:
        """End everything that involves a rank, as if its process were gone."""
        with self.changed:
            self._closed.add(rank)
            for (source, target, _), match in self._matches.items():
                if rank not in (source, target):
                    continue
                for owner, message in (*match.sends, *match.receives):
                    self.done[owner].append((message, f"rank {rank} is closed"))
                match.sends.clear()
                match.receives.clear()
            self.changed.notify_all()


class LocalWire:
    """One end of a LocalHub."""

    window = 8
    in_order = False
    zero_copy = True

    def __init__(self, hub: LocalHub, rank: int) -> None:
        self.hub, self.rank, self.world_size = hub, rank, hub.world_size
        self.device = hub.device

    def new_buffer(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def start(self, messages: Sequence[WireMessage]) -> None:
        for message in messages:
            message.seal()
            self.hub.add(self.rank, message)

    def finished(self) -> list[tuple[WireMessage, str | None]]:
        with self.hub.changed:
            done, self.hub.done[self.rank] = self.hub.done[self.rank], []
        return done

    def next_event_s(self) -> float | None:
        return None

    def wait(self, timeout_s: float) -> None:
        with self.hub.changed:
            self.hub.changed.wait_for(lambda: self.hub.done[self.rank], timeout_s)

    def close(self) -> None:
        self.hub.close(self.rank)
