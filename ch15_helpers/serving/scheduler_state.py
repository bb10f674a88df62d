"""What a scheduler knows: its requests, where each of them stands, and what must always hold."""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Iterator, Sequence
from itertools import chain

from ch15_helpers.errors import InvalidRequestError
from ch15_helpers.serving.config import SchedulerConfig
from ch15_helpers.serving.policy import Policy, make_policy
from ch15_helpers.serving.request import Request, RequestStatus
from ch15_helpers.serving.residency import Residency

_RUNNING, _FINISHED = RequestStatus.RUNNING, RequestStatus.FINISHED
_LOADING = RequestStatus.LOADING


class SchedulerState:
    """Queues and pools of a scheduler; ``Scheduler`` decides what happens to them."""

    def __init__(self, config: SchedulerConfig, policy: Policy | None = None) -> None:
        self.config = config
        self.policy = policy if policy is not None else make_policy(config.policy)
        self.residency = Residency(config)
        self.blocks = self.residency.blocks
        self.host_blocks = self.residency.host_blocks
        self.num_preemptions = 0
        self.num_guests = 0  # tables in the pool that belong to no request of this scheduler
        self._watermark_blocks = math.ceil(config.watermark * config.num_blocks)
        self._requests: dict[str, Request] = {}
        self._waiting: list[Request] = []  # by rank, then order of arrival
        self._prefilling: list[Request] = []
        # Replaced, never changed in place: a Step keeps the list, and the runner reuses what it
        # built for the same list.
        self._decoding: list[Request] = []
        self._loading: dict[int, Request | None] = {}  # by ticket; None has ended meanwhile
        self._growing: list[Request] = []  # must get a block, or a private copy of one, first
        self._ending: list[Request] = []  # their last token is being computed; see Lookahead
        self._num_prefill_steps = 0  # in a row, for policies that keep prompts apart
        self._disturbed = False  # since the last schedule, requests came or went from outside
        self._num_added = 0
        self._num_tickets = 0
        # Every running request may need a token of the budget in the same step.
        self._max_running = min(config.max_num_seqs, config.max_num_batched_tokens)

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
        return len(self._prefilling) + len(self._decoding) + self.num_loading

    @property
    def num_loading(self) -> int:
        """Of those, requests that wait for blocks from a lower tier."""
        return sum(request is not None for request in self._loading.values())

    @property
    def waiting(self) -> Sequence[Request]:
        """The queue, next to be admitted first."""
        return tuple(self._waiting)

    @property
    def running(self) -> Iterator[Request]:
        """Requests that hold KV blocks and can be computed, those still in their prompt first."""
        return chain(self._prefilling, self._decoding)

    def get(self, request_id: str) -> Request | None:
        """An unfinished request by id."""
        return self._requests.get(request_id)

    def check_invariants(self) -> None:
        """Raise AssertionError when queues, statuses, tables and pools disagree."""
        self.residency.check_invariants()
        assert not self._ending, "a step was advanced and never resolved"
        loading = [request for request in self._loading.values() if request is not None]
        running, waiting = [*self.running, *loading], list(self._waiting)
        assert {*running, *waiting} == set(self._requests.values()), "a request is lost"
        assert len(running) + len(waiting) == len(self._requests), "a request is queued twice"
        ended = len(self._loading) - len(loading)
        others = ended + self.num_guests
        assert self.blocks.num_seqs == len(running) + others, "a table without a running request"
        assert len(running) <= self.config.max_num_seqs, "more than max_num_seqs run"
        assert len(running) <= self.config.max_num_batched_tokens, "decodes may exceed the budget"
        places = [_place(request) for request in waiting]
        assert places == sorted(places), "the queue is out of order"
        for request in running:
            status = _LOADING if request in loading else _RUNNING
            assert request.status is status, f"{request.request_id} runs as {request.status}"
            held = self.blocks.table(request.request_id)[: len(request.path)]
            assert held == [node.block for node in request.path], "stale path"
            assert request.slot == self.blocks.row(request.request_id), "stale slot"
            assert not request.host_blocks, "blocks on the device and on the host"
        for request in waiting:
            assert request.status not in (_RUNNING, _LOADING), f"{request.request_id} waits as it"
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
        self._disturbed = True
        self._limit_output(request)

    def _limit_output(self, request: Request) -> None:
        request.max_output_tokens = request.params.max_tokens
        if self.config.max_model_len is not None:
            # A prompt that fills the context still gets the token that its last position predicts.
            room = max(1, self.config.max_model_len - request.num_prompt_tokens)
            request.max_output_tokens = min(request.max_output_tokens, room)

    def _enqueue(self, request: Request) -> None:
        request.rank = self.policy.rank(request)
        insort(self._waiting, request, key=_place)

    def _finish(self, request: Request, reason: str, error: str | None = None) -> None:
        """Free everything; the caller takes the request out of the lists."""
        self.residency.release(request, trusted=reason != "error")
        request.status, request.finish_reason, request.error = _FINISHED, reason, error
        del self._requests[request.request_id]

    def _unlink(self, request: Request) -> None:
        if request.status is _LOADING:
            ticket = next(key for key, other in self._loading.items() if other is request)
            # Its blocks are being written to; they are free when that is over.
            self.blocks.rename(request.request_id, ticket)
            self._loading[ticket] = None
        elif request.status is not _RUNNING:
            self._waiting.remove(request)
        elif request in self._prefilling:
            self._prefilling.remove(request)
        else:
            self._decoding = [r for r in self._decoding if r is not request]


def _place(request: Request) -> tuple[float, int]:
    return request.rank, request.ordinal
