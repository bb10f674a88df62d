"""Many simulated replicas behind the router, on one virtual clock. All results are modelled.

Each replica is a ``Simulator``: the engine's own scheduler with modelled step times. The router is
the one that real replicas have. Before a request is placed, every answer that came before it has
been given, so the router sees the loads of that moment. Yet a replica is advanced only when it
gets a request or may have an answer, which is what lets 1,000 of them run in seconds.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, NamedTuple

from ch15_helpers.serving.config import SchedulerConfig
from ch15_helpers.serving.metrics import Percentiles, percentiles
from ch15_helpers.serving.prefix_index import segment_keys
from ch15_helpers.serving.request import SLO, Request
from ch15_helpers.serving.router import Router
from ch15_helpers.serving.routing import RoutedRequest
from ch15_helpers.serving.runs import StepTotals
from ch15_helpers.serving.simulator import Simulator, request_of
from ch15_helpers.serving.step_time import StepTimeModel
from ch15_helpers.serving.workload import Workload, WorkloadRequest


class Served(NamedTuple):
    """One simulated request: where it ran and what it came to. NaN where it never got that far.

    Attributes:
        replica: who answered.
        completed: False for one that was refused.
        ttft_s, tpot_s, e2e_s: as in RequestMetrics; ``tpot_s`` is 0 for a single token.
        max_itl_s: longest gap between two tokens.
        num_prompt_tokens, num_cached_tokens, num_output_tokens: cached ones were not computed.
    """

    replica: int
    completed: bool
    ttft_s: float
    tpot_s: float
    e2e_s: float
    max_itl_s: float
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int

    def meets(self, slo: SLO) -> bool:
        """Whether it completed within both limits."""
        return self.completed and self.ttft_s <= slo.ttft_s and self.tpot_s <= slo.tpot_s


@dataclass(frozen=True)
class ClusterRun:
    """A workload on simulated replicas.

    Attributes:
        workload, policy: names of the workload and of the routing policy.
        served: one for each request, in the workload's order.
        duration_s: from the first arrival to the last token.
        steps: sums over the steps, one for each replica.
        fitted_on: what the step-time model was fitted on.
    """

    workload: str
    policy: str
    served: tuple[Served, ...]
    duration_s: float
    steps: tuple[StepTotals, ...]
    fitted_on: str

    kind: ClassVar[Literal["modelled"]] = "modelled"

    @property
    def num_replicas(self) -> int:
        """Replicas, those without a request included."""
        return len(self.steps)

    @cached_property
    def ttft_s(self) -> Percentiles:
        """Time to first token, of completed requests."""
        return percentiles([each.ttft_s for each in self.served if each.completed])

    @cached_property
    def tpot_s(self) -> Percentiles:
        """Time per output token after the first, of completed requests."""
        return percentiles([each.tpot_s for each in self.served if each.completed])

    @property
    def hit_rate(self) -> float:
        """Share of prompt tokens that were found in a replica's prefix cache."""
        total = sum(each.num_prompt_tokens for each in self.served)
        return sum(each.num_cached_tokens for each in self.served) / total if total else 0.0

    @property
    def output_tokens_per_s(self) -> float:
        """Generated tokens over the duration."""
        return sum(each.num_output_tokens for each in self.served) / self.duration_s

    @property
    def imbalance(self) -> float:
        """Busy time of the busiest replica over the mean; 1 is perfect balance."""
        busy = [steps.busy_s for steps in self.steps]
        return max(busy) * len(busy) / sum(busy) if sum(busy) else 1.0

    def attainment(self, slo: SLO) -> float:
        """Share of requests that met the objective; NaN without requests."""
        if not self.served:
            return math.nan
        return sum(each.meets(slo) for each in self.served) / len(self.served)

    def goodput_per_s(self, slo: SLO) -> float:
        """Requests per second that met the objective."""
        return sum(each.meets(slo) for each in self.served) / self.duration_s


class Cluster:
    """Simulated replicas behind a router. Use ``simulate_cluster`` for a whole workload.

    Attributes:
        router: places requests; it must have as many replicas as there are simulators.
        replicas: the simulators.
    """

    def __init__(
        self, router: Router, config: SchedulerConfig, model: StepTimeModel, *, key_block: int
    ) -> None:
        """Start all replicas at time 0.

        Args:
            config: of each replica's scheduler.
            key_block: tokens per block in the keys that the router gets.
        """
        self.router = router
        self.replicas = [Simulator(config, model) for _ in range(router.num_replicas)]
        self._key_block = key_block
        self._checks: list[tuple[float, int]] = []  # (no answer before, replica)
        self._next_s = [math.inf] * router.num_replicas  # the check of each that counts
        self._attempts: dict[str, tuple[int, int]] = {}  # request id: attempt, index
        self.done: dict[int, Served] = {}

    def add(self, request: WorkloadRequest, index: int) -> None:
        """Give all answers before the request's arrival, then place it."""
        self.advance(request.arrival_s)
        simulated = request_of(request, index)
        routed = RoutedRequest(
            request_id=simulated.request_id,
            num_prompt_tokens=request.num_prompt_tokens,
            num_output_tokens=request.num_output_tokens,
            keys=segment_keys(request.segments, self._key_block),
            session=request.session if request.session >= 0 else None,
        )
        attempt = self.router.route(routed)
        self._attempts[simulated.request_id] = attempt.attempt_id, index
        simulator = self.replicas[attempt.replica]
        self._answer(attempt.replica, simulator.advance(request.arrival_s))
        simulator.add(simulated)
        self._check_later(attempt.replica)

    def advance(self, until_s: float = math.inf) -> None:
        """Give every answer up to this time; infinity finishes all."""
        checks, next_s = self._checks, self._next_s
        while checks and checks[0][0] <= until_s:
            time_s, number = heapq.heappop(checks)
            if time_s != next_s[number]:
                continue  # a newer check replaced it
            self._answer(number, self.replicas[number].advance(min(until_s, time_s)))
            self._check_later(number)

    def _check_later(self, number: int) -> None:
        self._next_s[number] = time_s = self.replicas[number].earliest_finish_s()
        if time_s < math.inf:
            heapq.heappush(self._checks, (time_s, number))

    def _answer(self, number: int, finished: Sequence[Request]) -> None:
        for request in finished:
            attempt_id, index = self._attempts.pop(request.request_id)
            self.router.complete(attempt_id)
            self.done[index] = _served(request, number)


def simulate_cluster(
    workload: Workload,
    router: Router,
    config: SchedulerConfig,
    model: StepTimeModel,
    *,
    key_block: int = 16,
    on_request: Callable[[int], None] | None = None,
) -> ClusterRun:
    """Serve a workload on simulated replicas.

    Args:
        router: decides where; a new one, as it keeps state.
        config: of each replica's scheduler.
        model: step times of each replica, fitted or given.
        key_block: tokens per block in the router's keys; the ``block_size`` of ``KVAware``.
        on_request: called with the number of requests placed so far, e.g. for a progress bar.
    """
    cluster = Cluster(router, config, model, key_block=key_block)
    for index, request in enumerate(workload):
        cluster.add(request, index)
        if on_request is not None:
            on_request(index + 1)
    cluster.advance()
    served = tuple(cluster.done[index] for index in range(len(workload)))
    pairs = list(zip(workload, served, strict=True))
    ends_s = [request.arrival_s + each.e2e_s for request, each in pairs if each.completed]
    first_s = min((request.arrival_s for request in workload), default=0.0)
    return ClusterRun(
        workload=workload.name,
        policy=router.policy.name,
        served=served,
        duration_s=max(ends_s) - first_s if ends_s else 0.0,
        steps=tuple(each.totals for each in cluster.replicas),
        fitted_on=model.fitted_on,
    )


def _served(request: Request, replica: int) -> Served:
    times_s, arrival_s = request.token_times_s, request.arrival_s
    count = len(times_s)
    gaps_s = [later - earlier for earlier, later in itertools.pairwise(times_s)]
    return Served(
        replica=replica,
        completed=request.finish_reason in ("stop", "length"),
        ttft_s=times_s[0] - arrival_s if count else math.nan,
        tpot_s=(times_s[-1] - times_s[0]) / (count - 1) if count > 1 else 0.0,
        e2e_s=times_s[-1] - arrival_s if count else math.nan,
        max_itl_s=max(gaps_s, default=0.0),
        num_prompt_tokens=request.num_prompt_tokens,
        num_cached_tokens=request.num_cached_tokens,
        num_output_tokens=len(request.output_token_ids),
    )
