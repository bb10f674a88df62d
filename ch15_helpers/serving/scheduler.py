"""Iteration-level scheduling: what each step computes, decided in plain Python.

Requests join and leave between any two steps (Orca, Yu et al., OSDI 2022); decodes run first and
prompts fill the rest of a token budget in chunks (Sarathi-Serve, Agrawal et al., OSDI 2024);
when KV blocks run out, the latest arrival is preempted by recomputation or by swapping (vLLM,
Kwon et al., SOSP 2023). The scheduler knows no tensors: the engine and the simulator drive it.

The hot path is a decode step. It does constant work for a request that only gets one more token:
``event_at`` is the output length at which a request finishes or needs a block, so nothing is
looked up before that.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain

from ch15_helpers.errors import InvalidRequestError
from ch15_helpers.serving.config import SchedulerConfig
from ch15_helpers.serving.policy import Policy, make_policy
from ch15_helpers.serving.request import INVALID_TOKEN, Request, RequestStatus
from ch15_helpers.serving.residency import Residency
from ch15_helpers.serving.step import ScheduledChunk, Step

__all__ = ["ScheduledChunk", "Scheduler", "SchedulerConfig", "Step"]

_RUNNING, _FINISHED = RequestStatus.RUNNING, RequestStatus.FINISHED


class Scheduler:
    """Decides each step; ``update`` tells it what came out.

    Call ``schedule``, run the step, then ``update`` (or ``fail``) with the same step before the
    next ``schedule``.
    """

    def __init__(self, config: SchedulerConfig, policy: Policy | None = None) -> None:
        self.config = config
        self.policy = policy if policy is not None else make_policy(config.policy)
        self.residency = Residency(config)
        self.blocks = self.residency.blocks
        self.host_blocks = self.residency.host_blocks
        self.num_preemptions = 0
        self._watermark_blocks = math.ceil(config.watermark * config.num_blocks)
        self._requests: dict[str, Request] = {}
        self._waiting: deque[Request] = deque()
        self._prefilling: list[Request] = []
        # Replaced, never changed in place: a Step keeps the list, and the runner reuses what it
        # built for the same list.
        self._decoding: list[Request] = []
        self._growing: list[Request] = []  # must get a block, or a private copy of one, first
        self._num_added = 0

    # ---- state -----------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether any request is not finished."""
        return bool(self._requests)

    @property
    def num_waiting(self) -> int:
        """Requests in the queue, preempted ones included."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that hold KV blocks on the device."""
        return len(self._prefilling) + len(self._decoding)

    @property
    def waiting(self) -> Sequence[Request]:
        """The queue, next to be admitted first."""
        return tuple(self._waiting)

    @property
    def running(self) -> Iterator[Request]:
        """Requests that hold KV blocks, those still in their prompt first."""
        return chain(self._prefilling, self._decoding)

    def get(self, request_id: str) -> Request | None:
        """An unfinished request by id."""
        return self._requests.get(request_id)

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
        self._waiting.append(request)
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
        return request

    # ---- one step --------------------------------------------------------------------------

    def schedule(self, now_s: float) -> Step:
        """Decide the next step: decodes, then prompts under way, then admissions."""
        step = Step()
        if self._growing:
            self._grow(step)
        budget = self.config.max_num_batched_tokens - len(self._decoding)
        for request in self._prefilling:
            if budget <= 0:
                break
            budget -= self._add_chunk(step, request, budget)
        # Nobody is admitted into room that a preemption has just made.
        if self._waiting and not step.preempted:
            self._admit(step, budget, now_s)
        step.decodes = self._decoding
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
            output = request.output_token_ids
            output.append(token)
            request.token_times_s.append(now_s)
            request.num_computed_tokens += 1
            if len(output) >= request.event_at or token in request.stop_ids:
                events.append(request)
        if step.chunks:
            events += self._update_chunks(step, token_ids, now_s)
        finished = list(step.failed)
        for request in events:
            if self._reached_end(request):
                finished.append(request)
            else:
                self._growing.append(request)
        if finished:
            self._decoding = [r for r in self._decoding if r.status is _RUNNING]
        return finished

    def fail(self, step: Step, error: str) -> list[Request]:
        """The step did not run: end every request in it, and trust no copy that it was to make.

        Requests that are not in the step go on. Returns the finished ones.
        """
        finished = list(step.failed)
        for request in step.requests:
            self._unlink(request)
            self._finish(request, "error", error)
            finished.append(request)
        for request in step.preempted:
            if request.status is RequestStatus.SWAPPED:
                self.residency.forget(request)
        return finished

    def check_invariants(self) -> None:
        """Raise AssertionError when queues, statuses, tables and pools disagree."""
        self.residency.check_invariants()
        running, waiting = list(self.running), list(self._waiting)
        assert {*running, *waiting} == set(self._requests.values()), "a request is lost"
        assert len(running) + len(waiting) == len(self._requests), "a request is queued twice"
        assert self.blocks.num_seqs == len(running), "a table without a running request"
        assert len(running) <= self.config.max_num_seqs, "more than max_num_seqs run"
        assert len(self._decoding) <= self.config.max_num_batched_tokens, "decodes exceed budget"
        for request in running:
            assert request.status is _RUNNING, f"{request.request_id} runs as {request.status}"
            assert request.slot == self.blocks.row(request.request_id), "stale slot"
            assert not request.host_blocks, "blocks on the device and on the host"
        for request in waiting:
            assert request.status is not _RUNNING, f"{request.request_id} waits as running"
            swapped = request.status is RequestStatus.SWAPPED
            assert swapped == bool(request.host_blocks), "SWAPPED means: blocks on the host"
            assert swapped or request.num_computed_tokens == 0, "tokens computed, but nowhere"
        on_host = sum(len(request.host_blocks) for request in waiting)
        assert on_host == self.host_blocks.num_used, "host blocks leak"
        for request in self._decoding:
            assert request.num_computed_tokens == request.num_tokens - 1, "decode out of step"
            position = request.num_computed_tokens
            ready = self.blocks.can_write(request.request_id, position)
            assert ready or request in self._growing, f"{request.request_id} has nowhere to write"

    # ---- inside ----------------------------------------------------------------------------

    def _register(self, request: Request) -> None:
        if request.request_id in self._requests:
            raise InvalidRequestError(
                f"request id {request.request_id!r} is in use; choose another"
            )
        self._requests[request.request_id] = request
        request.ordinal = self._num_added
        self._num_added += 1
        self._limit_output(request)

    def _limit_output(self, request: Request) -> None:
        request.max_output_tokens = request.params.max_tokens
        if self.config.max_model_len is not None:
            # A prompt that fills the context still gets the token that its last position predicts.
            room = max(1, self.config.max_model_len - request.num_prompt_tokens)
            request.max_output_tokens = min(request.max_output_tokens, room)

    def _add_chunk(self, step: Step, request: Request, budget: int) -> int:
        """Put as much of a prompt as the budget allows into the step; returns the tokens."""
        start = request.num_computed_tokens
        remaining = request.num_tokens - start
        num_tokens = remaining if not self.config.enable_chunked_prefill else min(remaining, budget)
        step.chunks.append(ScheduledChunk(request, start, num_tokens, num_tokens == remaining))
        return num_tokens

    def _admit(self, step: Step, budget: int, now_s: float) -> None:
        chunked = self.config.enable_chunked_prefill
        while self._waiting and budget > 0 and self.num_running < self.config.max_num_seqs:
            index = self.policy.next_index(self._waiting, self.num_running, now_s)
            if index < 0:
                return
            request = self._waiting[index]
            needed = self.blocks.blocks_for(request.num_tokens)
            reserve = self._watermark_blocks if self.num_running else 0
            if needed > self.config.num_blocks:
                del self._waiting[index]
                self._outgrown(step, request)
                continue
            if needed + reserve > self.blocks.allocator.num_free:
                return
            remaining = request.num_tokens - request.num_computed_tokens
            if not chunked and remaining > budget and step.chunks:
                return
            del self._waiting[index]
            self.residency.bring_in(request, step)
            if request.first_scheduled_s is None:
                request.first_scheduled_s = now_s
            if remaining == 1 and request.output_token_ids:
                self._decoding = [*self._decoding, request]
                budget -= 1
            else:
                self._prefilling.append(request)
                budget -= self._add_chunk(step, request, budget)

    def _grow(self, step: Step) -> None:
        """Give blocks to the decodes that need one, oldest first, preempting as needed."""
        growing, self._growing = self._growing, []
        growing.sort(key=lambda request: request.ordinal)
        copies: dict[int, int] = {}  # new block: the shared block that it must be a copy of
        for request in growing:
            while request.status is _RUNNING:
                if self.residency.can_grow(request):
                    self.residency.grow(request, copies)
                    break
                if self.num_running == 1:
                    self._unlink(request)
                    self._outgrown(step, request)
                else:
                    self._preempt(step, self.policy.victim(self.running), copies)
        step.copies = [(source, target) for target, source in copies.items()]

    def _preempt(self, step: Step, request: Request, copies: dict[int, int]) -> None:
        self._unlink(request)
        self.residency.evict(request, step, copies)
        step.preempted.append(request)
        self.num_preemptions += 1
        request.num_preemptions += 1
        self._waiting.appendleft(request)

    def _update_chunks(self, step: Step, token_ids: Sequence[int], now_s: float) -> list[Request]:
        """Advance prompts; those complete join the decodes. Returns requests with an event."""
        row = len(step.decodes)
        joined: list[Request] = []
        for chunk in step.chunks:
            request = chunk.request
            request.num_computed_tokens += chunk.num_tokens
            if chunk.is_last:
                request.output_token_ids.append(token_ids[row])
                request.token_times_s.append(now_s)
                joined.append(request)
                row += 1
        if joined:
            done = set(map(id, joined))
            self._prefilling = [r for r in self._prefilling if id(r) not in done]
            self._decoding = self._decoding + joined
        return [
            request
            for request in joined
            if len(request.output_token_ids) >= request.event_at
            or request.output_token_ids[-1] in request.stop_ids
        ]

    def _reached_end(self, request: Request) -> bool:
        """Finish a request whose last token ended it; False when it only needs a block."""
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
            return False
        return True

    def _outgrown(self, step: Step, request: Request) -> None:
        reason = self.residency.why_never(request)
        self._finish(request, "error", f"{reason}; its tokens so far are kept")
        step.failed.append(request)

    def _finish(self, request: Request, reason: str, error: str | None = None) -> None:
        """Free everything; the caller takes the request out of the lists."""
        self.residency.release(request)
        request.status, request.finish_reason, request.error = _FINISHED, reason, error
        del self._requests[request.request_id]

    def _unlink(self, request: Request) -> None:
        if request.status is not _RUNNING:
            self._waiting.remove(request)
        elif request in self._prefilling:
            self._prefilling.remove(request)
        else:
            self._decoding = [r for r in self._decoding if r is not request]
