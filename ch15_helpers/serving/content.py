"""Prompts of named text: what the simulator knows of a prompt without having its tokens."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import overload

Piece = tuple[int, int, int]
"""(name of the text, first token of it, number of tokens)."""

_OUTPUT = -(1 << 62)


class NamedText(Sequence[int]):
    """A prompt of ``(name, number of tokens)`` segments; equal names are equal text.

    As a sequence it counts ``0, 1, 2 ...``: only its length and ``content`` mean anything. Text
    after the prompt is the output. Outputs of the same length are the same text: what follows
    equal prompts is equal, and after different prompts nobody compares.
    """

    def __init__(self, segments: Iterable[tuple[int, int]]) -> None:
        self.segments = tuple(segments)
        self._ends = list(accumulate(length for _, length in self.segments))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NamedText) and self.segments == other.segments

    def __hash__(self) -> int:
        return hash(self.segments)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...
    def __getitem__(self, index: int | slice) -> int | Sequence[int]:
        return self if index == slice(None) else range(len(self))[index]

    def content(self, start: int, stop: int) -> tuple[Piece, ...]:
        """The pieces that make up tokens ``start .. stop - 1``."""
        pieces: list[Piece] = []
        at = bisect_right(self._ends, start)
        while start < stop and at < len(self.segments):
            name, length = self.segments[at]
            end = self._ends[at]
            count = min(end, stop) - start
            pieces.append((name, start - (end - length), count))
            start += count
            at += 1
        if start < stop:
            pieces.append((_OUTPUT, start - len(self), stop - start))
        return tuple(pieces)
