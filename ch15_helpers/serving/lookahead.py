"""Scheduling one step ahead, while the tokens of the step that runs are not known yet.

A device that waits for its host to decide what comes next stands idle between steps. What comes
next hardly depends on the tokens, though: requests go on, or end by length. Only an end-of-sequence
token comes as a surprise, and then one step has computed a token too many, which is dropped. (The
asynchronous scheduling of SGLang and vLLM, 2024.)

The order is ``schedule`` n, launch n, ``advance`` n, ``schedule`` n + 1, launch n + 1, ``resolve``
n. In between, one ``PENDING_TOKEN`` stands at the end of each request that step n samples for.
Blocks that ``resolve`` frees may still be written to by step n + 1. That does no harm: whoever gets
them next is computed by step n + 2, and a device runs steps in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ch15_helpers.serving.fast_forward import FastForward
from ch15_helpers.serving.request import (
    INVALID_TOKEN,
    PENDING_TOKEN,
    Request,
    RequestStatus,
)
from ch15_helpers.serving.step import ScheduledChunk, Step

_RUNNING = RequestStatus.RUNNING


class Lookahead(FastForward):
    """``update`` in two halves, with room for the next ``schedule`` between them."""

    def advance(self, step: Step) -> None:
        """Assume that a launched step succeeds and that no token of it ends a request."""
        events = []
        for request in step.decodes:
            if request.status is not _RUNNING:  # ended by its token before, or aborted
                continue
            request.output_token_ids.append(PENDING_TOKEN)
            request.num_computed_tokens = computed = request.num_computed_tokens + 1
            if computed >= request.event_at:
                events.append(request)
        complete = [chunk.request for chunk in step.chunks if self._advance_chunk(chunk)]
        events += [r for r in complete if r.num_computed_tokens >= r.event_at]
        for request in events:
            is_last = len(request.output_token_ids) >= request.max_output_tokens
            (self._ending if is_last else self._growing).append(request)
        if complete:
            done = set(complete)
            self._prefilling = [r for r in self._prefilling if r not in done]
            self._decoding = self._decoding + complete
        if self._ending:
            over = set(self._ending)
            self._decoding = [r for r in self._decoding if r not in over]

    def can_run_ahead(self) -> bool:
        """Whether ``schedule`` may follow ``advance`` at once.

        It may not where it might preempt, as a preempted request is recomputed from its tokens;
        nor while blocks are, or may soon be, on their way to or from another place.
        """
        return (
            len(self._growing) <= self.blocks.allocator.num_free  # each needs one at the most
            and not self._loading
            and not self.host_blocks.num_used
            and self.residency.tiers is None
        )

    def resolve(self, step: Step, token_ids: Sequence[int], now_s: float) -> list[Request]:
        """Record the tokens of a step that was advanced; arguments and result as ``update``."""
        for chunk, token in zip(_complete(step), token_ids[len(step.decodes) :], strict=True):
            if token != INVALID_TOKEN and chunk.request.status is _RUNNING:
                self.residency.keep(chunk.request)
        events = []
        for request, token in zip(step.sampled, token_ids, strict=True):
            if request.status is not _RUNNING:
                continue
            output = request.output_token_ids
            output[-1] = token
            request.token_times_s.append(now_s)
            if token in request.stop_ids or len(output) >= request.max_output_tokens:
                events.append(request)
        self._ending = []
        ended = [request for request in events if self._ends_or_grows(request)]
        if ended:
            self._decoding = [r for r in self._decoding if r.status is _RUNNING]
        return step.failed + ended

    # ---- inside ----------------------------------------------------------------------------

    if TYPE_CHECKING:  # the scheduler has it

        def _ends_or_grows(self, request: Request) -> bool: ...

    def _advance_chunk(self, chunk: ScheduledChunk) -> bool:
        """Returns whether the prompt is complete, so that a token is on its way."""
        request = chunk.request
        if request.status is not _RUNNING:
            return False
        request.num_computed_tokens += chunk.num_tokens
        if chunk.is_last:
            request.output_token_ids.append(PENDING_TOKEN)
        else:
            self.residency.keep(request)
        return chunk.is_last

    def _retract(self, request: Request) -> None:
        """Forget the token that a failed step was to sample."""
        if request.output_token_ids and request.output_token_ids[-1] == PENDING_TOKEN:
            request.output_token_ids.pop()
        self._ending = [r for r in self._ending if r is not request]


def _complete(step: Step) -> list[ScheduledChunk]:
    return [chunk for chunk in step.chunks if chunk.is_last]
