"""What one step computes, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field

from ch15_helpers.kv.blocks import CopyOp
from ch15_helpers.kv.keys import BlockKey
from ch15_helpers.serving.request import Request


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """Tokens ``start .. start + num_tokens - 1`` of a request's known tokens.

    ``is_last`` says that the chunk reaches the last known token, so that a new one is sampled.
    """

    request: Request
    start: int
    num_tokens: int
    is_last: bool


@dataclass(frozen=True, slots=True)
class Promotion:
    """Blocks to bring from a lower tier, for one request.

    Attributes:
        ticket: what ``Scheduler.loaded`` is to be told when they are there.
        pairs: (key, device block), a chain from the first that is not on the device.
    """

    ticket: int
    pairs: list[tuple[BlockKey, int]]


@dataclass(slots=True)
class Step:
    """One iteration. Block moves come first, in this order: swap_out, demotions, copies, swap_in,
    promotions. What is read is thereby read before anything is written to its place.

    Attributes:
        decodes: requests that get one more token; never changed in place.
        chunks: parts of prompts (or of preempted requests' known tokens).
        preempted: requests that lost their blocks in this step; admitted: those that got theirs.
        swap_out: (device block, host block) pairs; swap_in: (host block, device block) pairs.
        copies: (source, destination) device blocks, for copy-on-write.
        demotions: (device block, key) of evicted blocks, for the lower tiers.
        promotions: what to bring from there, while the step runs and after it.
        failed: requests that were given up while scheduling.
    """

    decodes: list[Request] = field(default_factory=list)
    chunks: list[ScheduledChunk] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)
    admitted: list[Request] = field(default_factory=list)
    swap_out: list[CopyOp] = field(default_factory=list)
    swap_in: list[CopyOp] = field(default_factory=list)
    copies: list[CopyOp] = field(default_factory=list)
    demotions: list[tuple[int, BlockKey]] = field(default_factory=list)
    promotions: list[Promotion] = field(default_factory=list)
    failed: list[Request] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the model."""
        return len(self.decodes) + sum(chunk.num_tokens for chunk in self.chunks)

    @property
    def is_empty(self) -> bool:
        """Whether the model has nothing to compute."""
        return not self.decodes and not self.chunks

    @property
    def requests(self) -> list[Request]:
        """Requests in the flat batch, in its order: decodes, then chunks."""
        if not self.chunks:
            return self.decodes
        return [*self.decodes, *(chunk.request for chunk in self.chunks)]

    @property
    def sampled(self) -> list[Request]:
        """Requests that get a token in this step, in the order of the token ids."""
        if not self.chunks:
            return self.decodes
        return [*self.decodes, *(chunk.request for chunk in self.chunks if chunk.is_last)]
