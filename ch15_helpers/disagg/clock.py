"""A clock that moves only when told to: modelled networks need no sleeping."""

from __future__ import annotations

from collections.abc import Callable

Clock = Callable[[], float]
"""Seconds, monotonic."""


class VirtualClock:
    """Modelled seconds; call it to read it."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def __call__(self) -> float:
        return self._now_s

    def advance_to(self, now_s: float) -> None:
        """Move on to ``now_s``; a time in the past changes nothing."""
        self._now_s = max(self._now_s, now_s)
