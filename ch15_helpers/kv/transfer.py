"""A promotion under way: which blocks are back, from where, and when."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from ch15_helpers.kv.keys import BlockKey
from ch15_helpers.kv.ticket import Ticket


class Transfer:
    """One call of ``TieredStore.promote``. Made by the store; read by whoever waits for it.

    Attributes:
        pairs: (key, device block) as they were asked for.
        ok: per block, whether its content is there. Final when ``done``; False means that the
            block's content is undefined and must be computed.
        tiers: per block, the tier that had it; None for none.
        num_bytes: bytes that were copied into ok blocks.
        started_s, finished_s: on the store's clock; the end is None until ``done`` was seen.
    """

    def __init__(
        self, pairs: Sequence[tuple[BlockKey, int]], started_s: float, clock: Callable[[], float]
    ) -> None:
        self.pairs = list(pairs)
        self.ok = [False] * len(self.pairs)
        self.tiers: list[str | None] = [None] * len(self.pairs)
        self.num_bytes = 0
        self.started_s = started_s
        self.finished_s: float | None = None
        self._clock = clock
        self._tickets: list[Ticket] = []
        self._owners: list[tuple[Sequence[int], Callable[[], bool]]] = []
        self._issued = threading.Event()  # all copies were started, and some may be over

    @property
    def done(self) -> bool:
        """Whether nothing more will change; never waits. On CUDA the copies are complete then,
        so any later work on any stream sees them."""
        if self.finished_s is None:
            if not self._issued.is_set() or not all(ticket.done for ticket in self._tickets):
                return False
            for places, alive in self._owners:
                if not alive():
                    for place in places:
                        self.ok[place] = False
            self.finished_s = self._clock()
        return True

    def wait(self) -> None:
        """Block until ``done``."""
        self._issued.wait()
        for ticket in self._tickets:
            ticket.wait()
        assert self.done

    @property
    def num_leading_ok(self) -> int:
        """Blocks before the first that failed: a prefix is only good up to there."""
        return next((i for i, ok in enumerate(self.ok) if not ok), len(self.ok))

    @property
    def copy_s(self) -> float | None:
        """Seconds on the copy streams, added up; None without CUDA. Only once ``done``."""
        timed = [ticket.elapsed_s() for ticket in self._tickets]
        known = [seconds for seconds in timed if seconds is not None]
        return sum(known) if known else None

    def add(self, ticket: Ticket) -> None:
        """For the store: one more copy was started."""
        self._tickets.append(ticket)

    def needs(self, places: Sequence[int], alive: Callable[[], bool]) -> None:
        """For the store: these blocks count only if their owner is there when all copies end."""
        self._owners.append((places, alive))

    def issued(self) -> None:
        """For the store: no more copies will be started."""
        self._issued.set()
