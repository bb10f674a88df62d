"""Who comes in: requests from the queue get blocks, and prompts get the step's token budget.

A request whose prefix is in a lower tier gets its blocks at once and waits, LOADING, until they
are filled; the others run meanwhile. Whatever does not arrive is computed.
"""

from __future__ import annotations

from collections.abc import Sequence

from ch15_helpers.serving.request import Request, RequestStatus
from ch15_helpers.serving.scheduler_state import SchedulerState
from ch15_helpers.serving.step import Promotion, ScheduledChunk, Step

_LOADING = RequestStatus.LOADING


class Admission(SchedulerState):
    """Admits requests and fills steps with prompts."""

    def loaded(self, ticket: int, ok: Sequence[bool]) -> None:
        """A promotion has ended; its request goes on with the blocks that came.

        Args:
            ticket: of ``Step.promotions``.
            ok: for each block, whether it has its content. What follows the first that has not
                is of no use.
        """
        request = self._loading.pop(ticket)
        self._disturbed = True
        if request is None:
            self.blocks.free(ticket)
            return
        count = next((i for i, good in enumerate(ok) if not good), len(ok))
        self.residency.loaded(request, count)
        self._join(request)

    # ---- inside ----------------------------------------------------------------------------

    def _add_prompts(self, step: Step, budget: int, now_s: float) -> None:
        """Admit requests and hand the budget out to prompts."""
        if budget > 0:
            wanted = self.policy.prefill_budget(self._decoding, budget, now_s)
            budget = max(1, min(wanted, budget))
        # Nobody is admitted into room that a preemption has just made.
        if self._waiting and not step.preempted:
            budget -= self._admit(step, budget, now_s)
        prompts = self._prefilling
        if len(prompts) > 1:
            prompts = sorted(prompts, key=lambda request: self.policy.urgency(request, now_s))
        for request in prompts:
            if budget <= 0:
                return
            start = request.num_computed_tokens
            remaining = num_tokens = request.num_tokens - start
            if remaining > budget:
                if self.config.enable_chunked_prefill:
                    num_tokens = budget
                elif step.chunks:
                    return
            step.chunks.append(ScheduledChunk(request, start, num_tokens, num_tokens == remaining))
            budget -= num_tokens

    def _admit(self, step: Step, budget: int, now_s: float) -> int:
        """Give slots and blocks to those whose turn it is; returns how many came back to decode."""
        joins_running = self.policy.joins_running
        if self.num_running and not joins_running:
            return 0
        resumed = 0
        under_way = sum(r.num_tokens - r.num_computed_tokens for r in self._prefilling)
        while self._waiting and self.num_running < self._max_running:
            index = self.policy.next_index(self._waiting, self.num_running, now_s)
            if index < 0:
                break
            request = self._waiting[index]
            if self.blocks.blocks_for(request.num_tokens) > self.config.num_blocks:
                del self._waiting[index]
                self._outgrown(step, request)
                continue
            reserve = self._watermark_blocks if self.num_running else 0
            needed = self.residency.blocks_to_take(request)
            if needed + reserve > self.blocks.allocator.num_free:
                break
            remaining = self.residency.num_to_compute(request)
            # With room for everybody nobody's order matters.
            crowded = joins_running and under_way + remaining > budget - resumed
            if crowded and not self._has_room(request, remaining, budget - resumed, now_s):
                break
            del self._waiting[index]
            self._start(step, request, now_s)
            if request.status is _LOADING:
                continue
            remaining = request.num_tokens - request.num_computed_tokens
            if self._join(request):
                resumed += 1
            else:
                under_way += remaining
        return resumed

    def _has_room(self, request: Request, remaining: int, budget: int, now_s: float) -> bool:
        """Whether a request from the queue would be computed in this step."""
        mine = self.policy.urgency(request, now_s)
        ahead = sum(
            prompt.num_tokens - prompt.num_computed_tokens
            for prompt in self._prefilling
            if self.policy.urgency(prompt, now_s) <= mine
        )
        if ahead >= budget:
            return False
        return self.config.enable_chunked_prefill or not ahead or ahead + remaining <= budget

    def _start(self, step: Step, request: Request, now_s: float) -> None:
        """Give a request its blocks. It is LOADING afterwards where some are on their way."""
        wanted = self.residency.bring_in(request, step)
        step.admitted.append(request)
        if request.first_scheduled_s is None:
            request.first_scheduled_s = now_s
        if wanted:
            ticket = self._num_tickets
            self._num_tickets += 1
            self._loading[ticket] = request
            step.promotions.append(Promotion(ticket, wanted))

    def _join(self, request: Request) -> bool:
        """Let a request with blocks run; returns whether it goes on decoding at once."""
        if request.output_token_ids and request.num_computed_tokens == request.num_tokens - 1:
            self._decoding = [*self._decoding, request]
            return True
        self._prefilling.append(request)
        return False

    def _outgrown(self, step: Step, request: Request) -> None:
        reason = self.residency.why_never(request)
        self._finish(request, "error", f"{reason}; its tokens so far are kept")
        step.failed.append(request)
