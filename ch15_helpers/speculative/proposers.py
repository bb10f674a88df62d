"""Where drafts come from without a model: text that repeats itself.

Prompt lookup (Saxena, 2023; vLLM's ``ngram``): when the last few tokens occurred before, what
followed them then may follow again. It costs no model pass and suits summaries, code and answers
that quote their prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ch15_helpers.serving.request import Request
from ch15_helpers.speculative.verify import Draft


class Proposer(Protocol):
    """Makes drafts for decoding requests."""

    def propose(self, requests: Sequence[Request], limits: Sequence[int]) -> list[Draft]:
        """A draft of at most ``limits[i]`` tokens for each request, to follow its known tokens."""

    def forget(self, request_id: str) -> None:
        """The request has ended: drop what is kept about it."""


class PromptLookupProposer:
    """Continues the latest earlier occurrence of the last tokens, the longest match first.

    Each token is indexed once, so a step costs a few look-ups whatever the length.
    """

    def __init__(self, longest: int = 3, shortest: int = 1) -> None:
        """Match the last ``longest`` tokens, then fewer, down to ``shortest``.

        Raises:
            ValueError: not 1 <= shortest <= longest.
        """
        if not 1 <= shortest <= longest:
            raise ValueError(
                f"shortest and longest must satisfy 1 <= shortest <= longest, got {shortest} and "
                f"{longest}"
            )
        self._sizes = range(longest, shortest - 1, -1)
        self._indices: dict[str, _Index] = {}

    def propose(self, requests: Sequence[Request], limits: Sequence[int]) -> list[Draft]:
        """Drafts that repeat what followed; empty where nothing matches."""
        drafts = []
        for request, limit in zip(requests, limits, strict=True):
            if limit < 1:
                drafts.append(Draft())
                continue
            index = self._indices.get(request.request_id)
            if index is None:
                index = self._indices[request.request_id] = _Index(self._sizes)
            index.extend(request.tokens(len(index.tokens), request.num_tokens))
            drafts.append(Draft(index.continuation(limit)))
        return drafts

    def forget(self, request_id: str) -> None:
        """Drop the request's index."""
        self._indices.pop(request_id, None)


class _Index:
    """Where each n-gram of one text ended last, and what followed."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.tokens: list[int] = []
        self._sizes = sizes
        self._ends: dict[tuple[int, ...], int] = {}  # n-gram: position after its latest occurrence

    def extend(self, tokens: Sequence[int]) -> None:
        """Add tokens. N-grams that end the text enter later, when something follows them."""
        for token in tokens:
            end = len(self.tokens)
            for size in self._sizes:
                if size <= end:
                    self._ends[tuple(self.tokens[end - size :])] = end
            self.tokens.append(token)

    def continuation(self, limit: int) -> list[int]:
        """At most ``limit`` tokens after the latest occurrence of the longest known ending.

        A match that overlaps the end goes on into its own continuation, so that a loop is drafted
        in full.
        """
        count = len(self.tokens)
        for size in self._sizes:
            start = self._ends.get(tuple(self.tokens[count - size :])) if size <= count else None
            if start is not None:
                period = count - start
                return [self.tokens[start + i % period] for i in range(limit)]
        return []
