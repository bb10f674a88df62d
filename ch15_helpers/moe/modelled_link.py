"""A link of known latency and rate around a real collective, without using the cores.

Between processes of one machine a transfer is a copy by the same cores that compute, so nothing
can hide behind it. With a modelled link the real collective runs, and what arrived is held back
until the modelled time is over; meanwhile the rank may compute. Times taken so are *measured work
on a modelled link*, and must be labelled so.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from ch15_helpers.errors import MoEError


@dataclass(frozen=True)
class ModelledLink:
    """Every rank's port (alpha-beta model; Hockney, 1994), or its two ports where there are nodes.

    Attributes:
        latency_s: of a message. port_GBps: 10⁹ bytes a second, out and in at once.
        ranks_per_node: None has one port for everybody. Else those two are the port between nodes
            of so many consecutive ranks, and there is a second one inside.
        node_latency_s, node_GBps: of the port inside a node.
    """

    latency_s: float
    port_GBps: float
    ranks_per_node: int | None = None
    node_latency_s: float = 0.0
    node_GBps: float = 1.0

    def __post_init__(self) -> None:
        latencies, rates = (self.latency_s, self.node_latency_s), (self.port_GBps, self.node_GBps)
        if not (min(latencies) >= 0 and min(rates) > 0):
            raise MoEError(f"{self}: expected latencies of 0 or more and positive rates")

    def cost_s(
        self, me: int, peers: Sequence[int], sent: Sequence[int], received: Sequence[int]
    ) -> tuple[float, float]:
        """Modelled latency and time at the fuller port of an all-to-all, in s.

        Args:
            me, peers: ranks of the world. sent, received: bytes to and from each peer.
        """
        size, latency_s, wire_s = self.ranks_per_node, 0.0, 0.0
        for far in (True, False):
            here = [
                i
                for i, peer in enumerate(peers)
                if peer != me and far == (size is None or peer // size != me // size)
            ]
            most = max(sum(sent[i] for i in here), sum(received[i] for i in here))
            if most:
                latency_s = max(latency_s, self.latency_s if far else self.node_latency_s)
                rate = self.port_GBps if far else self.node_GBps
                wire_s = max(wire_s, most / (rate * 1e9))
        return latency_s, wire_s


def hold_until(due_s: float) -> None:
    """Wait, without work, until ``time.perf_counter`` shows ``due_s``."""
    left_s = due_s - time.perf_counter()
    if left_s > 0:
        threading.Event().wait(left_s)
