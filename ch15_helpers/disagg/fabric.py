"""A modelled network around any wire: latency, bandwidth, contention and loss, without sleeping.

A message is held back until the modelled time at which its last byte would arrive, and is then
given to the wire below. On a VirtualClock nothing takes real time; on a real clock the model comes
on top of what the wire needs. Results are *modelled*.

Contention: every rank has one port out and one port in. A port serves one message at a time, in
the order in which they are sent (out) or begin to arrive (in), at the rate of the link.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ch15_helpers.disagg.clock import Clock
from ch15_helpers.disagg.link import LinkModel
from ch15_helpers.disagg.message import split, write_void
from ch15_helpers.disagg.wire import Wire, WireMessage

Route = tuple[int, int]
"""(source rank, target rank)."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """One modelled message: seconds on the fabric's clock."""

    route: Route
    num_bytes: int
    sent_s: float
    arrives_s: float
    num_losses: int
    lost: bool

    @property
    def queued_s(self) -> float:
        """Modelled time beyond that of a lossless idle link; set against ``transfer_s``."""
        return self.arrives_s - self.sent_s


class Fabric:
    """Links and ports that all ranks of a modelled network share.

    Attributes:
        kind: always ``modelled``: how numbers from here must be labelled.
        deliveries: every message so far.
    """

    kind = "modelled"

    def __init__(
        self, links: LinkModel | Mapping[Route, LinkModel], clock: Clock, seed: int = 0
    ) -> None:
        """``links`` is one model for all pairs of ranks, or one for each pair that is used."""
        self._links, self._clock = links, clock
        self._random = np.random.default_rng(seed)
        self._port_out: dict[int, float] = {}
        self._port_in: dict[int, float] = {}
        self._stalled_until: dict[Route, float] = {}
        self._held: list[tuple[float, int, Callable[[], None]]] = []
        self._num_sent = 0
        self.deliveries: list[Delivery] = []
        self.bytes_by_route: Counter[Route] = Counter()

    def link(self, route: Route) -> LinkModel:
        """The model of a link. Raises ValueError when there is none."""
        if isinstance(self._links, LinkModel):
            return self._links
        if route not in self._links:
            raise ValueError(f"no link from rank {route[0]} to rank {route[1]} is modelled")
        return self._links[route]

    def stall(self, route: Route, until_s: float) -> None:
        """Nothing that is sent on this link from now on starts before ``until_s``."""
        self._stalled_until[route] = until_s

    def send(self, route: Route, num_bytes: int) -> Delivery:
        """Model one message that is sent now."""
        link, sent_s = self.link(route), self._clock()
        source, target = route
        start_s = max(sent_s, self._stalled_until.get(route, 0.0))
        losses, lost = 0, False
        while True:
            start_s = max(start_s, self._port_out.get(source, 0.0))
            busy_s = link.wire_s(num_bytes)
            self._port_out[source] = start_s + busy_s
            first_s = max(start_s + link.latency_s, self._port_in.get(target, 0.0))
            if not link.loss or self._random.random() >= link.loss:
                break
            losses += 1
            if link.retransmit_s is None:
                lost = True
                break
            start_s += busy_s + link.retransmit_s
        self._port_in[target] = arrives_s = first_s + busy_s
        delivery = Delivery(route, num_bytes, sent_s, arrives_s, losses, lost)
        self.deliveries.append(delivery)
        self.bytes_by_route[route] += num_bytes
        return delivery

    def hold(self, until_s: float, release: Callable[[], None]) -> None:
        """Call ``release`` once the clock has reached ``until_s``."""
        heapq.heappush(self._held, (until_s, self._num_sent, release))
        self._num_sent += 1

    def pump(self) -> None:
        """Release what is due, in order of time."""
        now_s = self._clock()
        while self._held and self._held[0][0] <= now_s:
            heapq.heappop(self._held)[2]()

    def next_event_s(self) -> float | None:
        """When the next held message is due."""
        return self._held[0][0] if self._held else None


class FabricWire:
    """One rank's end of a wire that seems to be the modelled fabric.

    Ends in one process share a Fabric. In real processes each has its own: then ports out are
    modelled, and ports in only as far as one sender fills them.
    """

    def __init__(self, inner: Wire, fabric: Fabric) -> None:
        self.inner, self.fabric = inner, fabric
        self.rank, self.world_size = inner.rank, inner.world_size
        self.device, self.in_order = inner.device, inner.in_order
        self.zero_copy = inner.zero_copy
        self.window = max(inner.window, 64)  # the modelled ports queue, not the transport

    def new_buffer(self, num_bytes: int) -> Tensor:
        return self.inner.new_buffer(num_bytes)

    def start(self, messages: Sequence[WireMessage]) -> None:
        for message in messages:
            if not message.sending:
                self.inner.start([message])
                continue
            message.seal()
            delivery = self.fabric.send((self.rank, message.peer), message.num_bytes)
            if delivery.lost:
                # Its empty shell still goes: the real wire below must stay in step.
                write_void(split(message.buffer, message.num_blocks)[0])
            self.fabric.hold(delivery.arrives_s, lambda m=message: self.inner.start([m]))  # type: ignore[misc]

    def finished(self) -> list[tuple[WireMessage, str | None]]:
        self.fabric.pump()
        return self.inner.finished()

    def next_event_s(self) -> float | None:
        return self.fabric.next_event_s()

    def wait(self, timeout_s: float) -> None:
        self.inner.wait(timeout_s)

    def close(self) -> None:
        self.inner.close()
