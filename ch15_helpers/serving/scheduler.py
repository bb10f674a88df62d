"""Iteration-level scheduling: what each step computes, decided in plain Python.

Requests join and leave between any two steps (Orca, Yu et al., OSDI 2022); decodes run first and
prompts fill the rest of a token budget in chunks (Sarathi-Serve, Agrawal et al., OSDI 2024);
when KV blocks run out, the latest arrival is preempted by recomputation or by swapping (vLLM,
Kwon et al., SOSP 2023). The scheduler knows no tensors: the engine and the simulator drive it.

The hot path is a decode step. It does constant work for a request that only gets one more token:
``event_at`` is the number of computed tokens at which a request finishes or needs a block, so
nothing is looked up before that.
"""

from __future__ import annotations

from collections.abc import Sequence

from ch15_helpers.errors import InvalidRequestError
from ch15_helpers.serving.config import SchedulerConfig
from ch15_helpers.serving.lookahead import Lookahead
from ch15_helpers.serving.request import INVALID_TOKEN, Request, RequestStatus
from ch15_helpers.serving.step import ScheduledChunk, Step

__all__ = ["ScheduledChunk", "Scheduler", "SchedulerConfig", "Step"]

_RUNNING = RequestStatus.RUNNING


class Scheduler(Lookahead):
    """Decides each step; ``update`` tells it what came out.

    Call ``schedule``, run the step, then ``update`` (or ``fail``) with the same step before the
    next ``schedule``; or ``advance`` before the next ``schedule`` and ``resolve`` after it.
    """

    # ---- requests in and out ---------------------------------------------------------------

    def add(self, request: Request) -> bool:
        """Queue a request. One that can never run is finished with an error; returns False.

        Raises:
            InvalidRequestError: the prompt is empty or the id is in use.
        """
        if not request.prompt_token_ids:
            raise InvalidRequestError(
                f"request {request.request_id!r} has an empty prompt; it needs at least one token"
            )
        self._register(request)
        reason = self.residency.why_never(request)
        if reason is not None:
            self._finish(request, "error", reason)
            return False
        self._enqueue(request)
        return True

    def fork(self, parent_id: str, child: Request) -> None:
        """Start ``child`` as a copy of a decoding request, sharing its KV blocks until one writes.

        The child takes over the parent's prompt, output so far and computed tokens; its own
        parameters hold from there on.

        Raises:
            InvalidRequestError: the parent is not decoding, the id is in use, the child would be
                finished already, or no more requests may run at once.
        """
        parent = self._requests.get(parent_id)
        if parent is None or parent not in self._decoding:
            raise InvalidRequestError(
                f"request {parent_id!r} is not decoding; only a decoding request can be forked"
            )
        if len(parent.output_token_ids) >= child.params.max_tokens:
            raise InvalidRequestError(
                f"max_tokens of the fork is {child.params.max_tokens}, but the parent has "
                f"{len(parent.output_token_ids)} output tokens already; ask for more"
            )
        limit = min(self.config.max_num_seqs, self.config.max_num_batched_tokens)
        if self.num_running >= limit:
            raise InvalidRequestError(
                f"{self.num_running} requests are running and the limit is {limit}; fork later, or "
                "raise max_num_seqs and max_num_batched_tokens"
            )
        self._register(child)
        child.take_over(parent)
        self._limit_output(child)
        self.residency.share(parent, child)
        self._decoding = [*self._decoding, child]
        self._growing += (parent, child)

    def abort(self, request_id: str) -> Request | None:
        """End a request now and free what it holds; None when there is no such request."""
        request = self._requests.get(request_id)
        if request is not None:
            self._unlink(request)
            self._finish(request, "abort")
            self._disturbed = True
        return request

    # ---- one step --------------------------------------------------------------------------

    def schedule(self, now_s: float) -> Step:
        """Decide the next step: decodes, and prompts as the policy wants them beside or before."""
        step = self._new_step()
        self._disturbed = False
        self._fill(step, now_s)
        if self.residency.prefix is not None and self.residency.prefix.keep_evicted:
            step.demotions = self.residency.prefix.take_evicted()
        return step

    def update(self, step: Step, token_ids: Sequence[int], now_s: float) -> list[Request]:
        """Record the outcome of a step.

        Args:
            step: what ``schedule`` returned.
            token_ids: one for each request of ``step.sampled``, in that order.
            now_s: when the tokens were ready.

        Returns:
            Requests that are finished, those that ``schedule`` had to give up included.
        """
        events: list[Request] = []
        for request, token in zip(step.decodes, token_ids, strict=False):
            request.output_token_ids.append(token)
            request.token_times_s.append(now_s)
            request.num_computed_tokens = computed = request.num_computed_tokens + 1
            if computed >= request.event_at or token in request.stop_ids:
                events.append(request)
        ended = [request for request in events if self._ends_or_grows(request)]
        if ended:
            self._decoding = [r for r in self._decoding if r.status is _RUNNING]
        if step.chunks:
            ended += self._update_chunks(step, token_ids, now_s)
        return step.failed + ended

    def fail(self, step: Step, error: str) -> list[Request]:
        """The step did not run: end every request in it, and trust no copy that it was to make.

        Requests that are not in the step go on. Returns the finished ones.
        """
        finished = list(step.failed)
        for request in step.requests:
            if request.is_finished:  # by the step before, while this one was under way
                continue
            self._retract(request)
            self._unlink(request)
            self._finish(request, "error", error)
            finished.append(request)
        for request in step.preempted:
            if request.status is RequestStatus.SWAPPED:
                self.residency.forget(request)
        for request in step.admitted:
            if request.status is _RUNNING:  # not in the step, but a copy for it may have been
                self._unlink(request)
                self.residency.withdraw(request)
                request.num_preemptions += 1
                self._enqueue(request)
        return finished

    def fail_all(self, error: str) -> list[Request]:
        """The device is gone: end every request there is, and return them. The pools are empty."""
        finished = list(self._requests.values())
        for request in finished:
            self._retract(request)
            self._unlink(request)
            self._finish(request, "error", error)
        for ticket in list(self._loading):  # nothing more will arrive
            self.loaded(ticket, [])
        self._growing, self._ending = [], []
        return finished

    # ---- inside ----------------------------------------------------------------------------

    def _new_step(self) -> Step:
        return Step()

    def _fill(self, step: Step, now_s: float) -> None:
        prompts_apart = self.policy.max_prefill_steps > 0
        if prompts_apart and self._prompts_alone(step, now_s):
            return
        if self._growing:
            self._grow(step)
        if not prompts_apart and (self._waiting or self._prefilling):
            budget = self.config.max_num_batched_tokens - len(self._decoding)
            self._add_prompts(step, budget, now_s)
        step.decodes = self._decoding

    def _prompts_alone(self, step: Step, now_s: float) -> bool:
        """Make this a step of prompts, if there are any and decodes have not waited too long."""
        if self._decoding and self._num_prefill_steps >= self.policy.max_prefill_steps:
            self._num_prefill_steps = 0
            return False
        if self._waiting or self._prefilling:
            self._add_prompts(step, self.config.max_num_batched_tokens, now_s)
            if step.chunks or step.swap_in or step.failed:
                self._num_prefill_steps += bool(self._decoding)  # only these have to wait
                return True
        self._num_prefill_steps = 0
        return False

    def _grow(self, step: Step) -> None:
        """Give blocks to the decodes that need one, oldest first, preempting as needed."""
        growing, self._growing = self._growing, []
        growing.sort(key=lambda request: request.ordinal)
        # New block: the shared block that it must be a copy of.
        copies = {target: source for source, target in step.copies}
        for request in growing:
            while request.status is _RUNNING:
                if self.residency.can_grow(request):
                    self.residency.grow(request, copies)
                    break
                if self.num_running == 1:
                    self._unlink(request)
                    self._outgrown(step, request)
                elif self.num_running - self.num_loading == 1:
                    self._preempt(step, request, copies)  # who is loading cannot give way
                else:
                    self._preempt(step, self.policy.victim(self.running), copies)
        step.copies = [(source, target) for target, source in copies.items()]

    def _preempt(self, step: Step, request: Request, copies: dict[int, int]) -> None:
        self._unlink(request)
        self.residency.evict(request, step, copies)
        step.preempted.append(request)
        self.num_preemptions += 1
        request.num_preemptions += 1
        self._enqueue(request)

    def _update_chunks(self, step: Step, token_ids: Sequence[int], now_s: float) -> list[Request]:
        """Advance prompts; those complete join the decodes. Returns the finished ones."""
        tokens = iter(token_ids[len(step.decodes) :])
        complete = [chunk.request for chunk in step.chunks if chunk.is_last]
        for chunk in step.chunks:
            chunk.request.num_computed_tokens += chunk.num_tokens
            if not chunk.is_last:
                self.residency.keep(chunk.request)
        ended: list[Request] = []
        for request, token in zip(complete, tokens, strict=False):
            if token != INVALID_TOKEN:
                self.residency.keep(request)
            request.output_token_ids.append(token)
            request.token_times_s.append(now_s)
            event = request.num_computed_tokens >= request.event_at or token in request.stop_ids
            if event and self._ends_or_grows(request):
                ended.append(request)
        if complete:
            done = set(map(id, complete))
            self._prefilling = [r for r in self._prefilling if id(r) not in done]
            joining = [request for request in complete if request.status is _RUNNING]
            if joining:
                self._decoding = self._decoding + joining
        return ended

    def _ends_or_grows(self, request: Request) -> bool:
        """Finish a request that its last token ended; otherwise have it get a block."""
        output = request.output_token_ids
        if output[-1] == INVALID_TOKEN:
            output.pop()
            request.token_times_s.pop()
            self._finish(request, "error", "the model's logits are not finite (NaN or infinite)")
        elif output[-1] in request.stop_ids:
            self._finish(request, "stop")
        elif len(output) >= request.max_output_tokens:
            self._finish(request, "length")
        else:
            self._growing.append(request)
            return False
        return True
