"""A link of known latency and rate around a real collective, without using the cores.

Between processes of one machine a transfer is a copy by the same cores that compute, so nothing
can hide behind it. With a modelled link the real collective runs, and what arrived is held back
until the modelled time is over; meanwhile the rank may compute. Times taken so are *measured work
on a modelled link*, and must be labelled so.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from ch15_helpers.errors import MoEError


@dataclass(frozen=True)
class ModelledLink:
    """Every rank's port (alpha-beta model; Hockney, 1994).

    Attributes:
        latency_s: of a message. port_GBps: 10⁹ bytes a second, out and in at once.
    """

    latency_s: float
    port_GBps: float

    def __post_init__(self) -> None:
        if not (self.latency_s >= 0 and self.port_GBps > 0):
            raise MoEError(f"{self}: expected a latency of 0 or more and a positive rate")

    def seconds(self, bytes_out: int, bytes_in: int) -> float:
        """Modelled time of an all-to-all in s; nothing for a rank that neither sends nor gets."""
        most = max(bytes_out, bytes_in)
        return self.latency_s + most / (self.port_GBps * 1e9) if most else 0.0


def hold_until(due_s: float) -> None:
    """Wait, without work, until ``time.perf_counter`` shows ``due_s``."""
    left_s = due_s - time.perf_counter()
    if left_s > 0:
        threading.Event().wait(left_s)
