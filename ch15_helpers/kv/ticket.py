"""When a copy is over: at once on a CPU, with an event on CUDA."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Ticket:
    """A copy that was started. Without events it was over before the call returned.

    Attributes:
        event: recorded on the copy's stream after it; other streams may wait for it.
        begin: recorded before it, with timing, when the time of the copy is wanted.
    """

    __slots__ = ("begin", "event")

    def __init__(
        self, event: torch.cuda.Event | None = None, begin: torch.cuda.Event | None = None
    ) -> None:
        self.event = event
        self.begin = begin

    @property
    def done(self) -> bool:
        """Whether the copy is over; never waits."""
        return self.event is None or bool(self.event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Block this thread until the copy is over."""
        if self.event is not None:
            self.event.synchronize()

    def elapsed_s(self) -> float | None:
        """Seconds on the copy's stream; None where that was not timed. The copy must be over."""
        if self.event is None or self.begin is None:
            return None
        return float(self.begin.elapsed_time(self.event)) / 1e3
