"""Tells when a layer is computed on a GPU, not when it is launched.

The host launches a prompt's layers much faster than the GPU computes them. Somebody who sends what
a layer has left needs the latter, and the host has nothing better to do than to look: it stays two
layers ahead of the GPU, which is enough for it never to wait, and looks after messages meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_AHEAD = 2  # layers that are launched and not done


class LayerWatch:
    """Reports layers of running steps once they are done.

    Attributes:
        stream: whatever is launched in a report runs there, beside the layers that follow.
    """

    def __init__(self, stream: torch.cuda.Stream, on_idle: Callable[[], None]) -> None:
        """``on_idle`` is called again and again while a layer is awaited."""
        self.stream, self._on_idle = stream, on_idle

    @contextmanager
    def following(self, report: Callable[[int], None]) -> Iterator[Callable[[int], None]]:
        """Call what this yields with each layer that was launched on the current stream.

        Args:
            report: gets each layer's index when it is done; the last one before the block is left.
        """
        pending: deque[tuple[int, Any]] = deque()

        def catch_up(left: int) -> None:
            with torch.cuda.stream(self.stream):
                while len(pending) > left:
                    layer, event = pending[0]
                    if event.query():
                        pending.popleft()
                        report(layer)
                    else:
                        self._on_idle()

        def launched(layer: int) -> None:
            pending.append((layer, torch.cuda.current_stream().record_event()))
            catch_up(_AHEAD)

        yield launched
        catch_up(0)
