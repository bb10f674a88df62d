"""The wire of a rank: a real one, with a modelled network around it and faults in it on demand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor

from ch15_helpers.disagg.clock import Clock
from ch15_helpers.disagg.fabric import Fabric, FabricWire
from ch15_helpers.disagg.faults import damage
from ch15_helpers.disagg.link import LinkModel
from ch15_helpers.disagg.wire import Bell, Wire, WireMessage
from ch15_helpers.disagg.wire_nccl import NcclWire

WireFault = Literal["stall", "drop_completion", "corrupt", "exchange"]
"""``stall``: a message that is sent, and all after it on its channel, move only after ``mend``.
``drop_completion``: messages move, and nobody is told. ``corrupt`` and ``exchange``: see
``faults.Fault``."""
WIRE_FAULTS: tuple[str, ...] = get_args(WireFault)


class RankWire:
    """Passes on to another wire; what lies between may change while nothing is under way."""

    def __init__(self, inner: Wire, clock: Clock) -> None:
        self._base = self._inner = inner
        self._clock = clock
        self._faults: list[WireFault] = []
        self._stalled: list[WireMessage] = []
        self._silenced: list[WireMessage] = []
        self.rank, self.world_size = inner.rank, inner.world_size
        self.device, self.in_order = inner.device, inner.in_order

    @property
    def window(self) -> int:
        """See Wire; a modelled network has a larger one."""
        return self._inner.window

    @property
    def zero_copy(self) -> bool:
        """See Wire; a message that is to be damaged must be a copy."""
        return self._inner.zero_copy and not self._faults

    @property
    def bell(self) -> Bell | None:
        """What rings when the real wire has something to tell, if it has such a thing."""
        return getattr(self._base, "bell", None)

    def simulate(self, link: LinkModel | None) -> None:
        """Seem to be this link from now on, or be the real wire again."""
        wire = self._base
        self._inner = wire if link is None else FabricWire(wire, Fabric(link, self._clock))

    def fail(self, fault: WireFault, count: int) -> None:
        """Apply a fault to each of the next ``count`` messages that it is for."""
        self._faults += [fault] * count

    def mend(self) -> None:
        """No more faults; what was stalled goes on, late."""
        self._faults.clear()
        stalled, self._stalled = self._stalled, []
        if stalled:
            self._inner.start(stalled)

    def new_buffer(self, num_bytes: int) -> Tensor:
        return self._base.new_buffer(num_bytes)

    def start(self, messages: Sequence[WireMessage]) -> None:
        going = [message for message in messages if self._passes(message)]
        if going:
            self._inner.start(going)

    def _passes(self, message: WireMessage) -> bool:
        if message.sending and any(self._same_lane(message, m) for m in self._stalled):
            self._stalled.append(message)  # a channel keeps its order
            return False
        fault = self._faults[0] if self._faults else None
        if fault is None or (not message.sending and fault != "drop_completion"):
            return True
        self._faults.pop(0)
        if fault == "drop_completion":
            self._silenced.append(message)
        elif fault == "stall":
            self._stalled.append(message)
            return False
        else:
            message.seal()
            damage(message.buffer, message.num_blocks, fault, 0)
        return True

    def _same_lane(self, one: WireMessage, other: WireMessage) -> bool:
        return one.peer == other.peer and (self.in_order or one.channel == other.channel)

    def lose(self, peer: int, reason: str) -> None:
        """A peer is gone: a medium that does not notice ends its messages now."""
        if isinstance(self._base, NcclWire):
            self._base.lose(peer, reason)

    def finished(self) -> list[tuple[WireMessage, str | None]]:
        done = self._inner.finished()
        if not self._silenced:
            return done
        return [each for each in done if not any(each[0] is mute for mute in self._silenced)]

    def next_event_s(self) -> float | None:
        return self._inner.next_event_s()

    def wait(self, timeout_s: float) -> None:
        self._base.wait(timeout_s)

    def close(self) -> None:
        self._inner.close()
