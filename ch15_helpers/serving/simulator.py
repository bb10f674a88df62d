"""The scheduler on a virtual clock: what would this workload do, without running the model.

It is the engine's own ``Scheduler``, so batching, block limits and preemption are the real ones;
only the duration of a step comes from a ``StepTimeModel``. Results are deterministic and say
``modelled``. ``validation`` measures how far they are from the engine.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import cast

from ch15_helpers.serving.config import SchedulerConfig
from ch15_helpers.serving.content import NamedText
from ch15_helpers.serving.request import Request, RequestOutput
from ch15_helpers.serving.runs import ModelledRun, StepTotals, duration_from
from ch15_helpers.serving.scheduler import Scheduler
from ch15_helpers.serving.step import Step
from ch15_helpers.serving.step_time import StepFeatures, StepTimeModel, prompt_features
from ch15_helpers.serving.workload import Workload, WorkloadRequest

_TOKEN = 0  # what every simulated step yields; no simulated request stops at it

OnStep = Callable[[float, float, Step], None]


class Simulator:
    """One simulated replica.

    Drive it like an engine: ``advance`` to an arrival, ``add`` the request, and so on; a router
    may do so with many. A step that is under way when time stops stays under way: what it yields
    is not visible before it ends.

    Attributes:
        scheduler, model: what it runs.
        now_s: virtual time; the start of the step under way, if there is one.
        num_events: steps that were simulated one by one; the rest was skipped over.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        model: StepTimeModel,
        *,
        fast_forward: bool = True,
        on_step: OnStep | None = None,
    ) -> None:
        """Start at time 0 with nothing to do.

        Args:
            fast_forward: skip over runs of equal decode steps. The results are the same.
            on_step: called with (start, end, step) when a step ends; turns fast_forward off.
        """
        self.scheduler = Scheduler(config)
        self.model = model
        self.now_s = 0.0
        self.num_events = 0
        self._fast_forward = fast_forward and on_step is None
        self._on_step = on_step
        self._step: Step | None = None  # under way
        self._features = StepFeatures(0, 0, 0, 0, 0, 0)
        self._end_s = 0.0
        self._finished: list[Request] = []  # by being refused
        self._decodes: list[Request] = []  # of the last step; _context is theirs
        self._context = 0
        self._num_steps = self._num_tokens = self._num_decode_tokens = 0
        self._busy_s = 0.0

    @property
    def has_work(self) -> bool:
        """Whether a request is unfinished, or finished and not handed out."""
        return self.scheduler.has_work or bool(self._finished)

    @property
    def totals(self) -> StepTotals:
        """Sums over the steps that have ended."""
        return StepTotals(
            num_steps=self._num_steps,
            num_tokens=self._num_tokens,
            num_decode_tokens=self._num_decode_tokens,
            budget_tokens=self._num_steps * self.scheduler.config.max_num_batched_tokens,
            busy_s=self._busy_s,
        )

    def add(self, request: Request) -> None:
        """Queue a request that arrives at ``request.arrival_s``; advance to that time first.

        An idle simulator moves its clock there.
        """
        if not self.scheduler.has_work:
            self.now_s = max(self.now_s, request.arrival_s)
        if not self.scheduler.add(request):
            self._finished.append(request)

    def advance(self, until_s: float = math.inf) -> list[Request]:
        """Run every step that ends by ``until_s``, and start those that start before it.

        Returns:
            The requests that finished, in order.

        Raises:
            RuntimeError: the policy admits nobody although nothing runs.
        """
        finished, self._finished = self._finished, []
        while True:
            step = self._step
            if step is None:
                if self.now_s >= until_s or not self.scheduler.has_work:
                    return finished
                step = self._start()
            if self._end_s > until_s:
                return finished
            finished += self._complete(step)
            if self._fast_forward:
                self._skip(step, until_s)

    def earliest_finish_s(self) -> float:
        """A time before which no request finishes; infinity when there is no work.

        It is a lower bound: every token takes a step, and a step at least the model's constant.
        """
        if self._finished:
            return self.now_s
        scheduler = self.scheduler
        if not scheduler.has_work:
            return math.inf
        requests = itertools.chain(scheduler.running, scheduler.waiting)
        steps = min((r.max_output_tokens - len(r.output_token_ids) for r in requests), default=1)
        under_way = self._step is not None
        begin_s = self._end_s if under_way else self.now_s
        # Rounding of many additions must not make the bound too late.
        least_s = begin_s + (steps - under_way) * self.model.constant_s * (1 - 1e-9)
        return max(least_s, math.nextafter(self.now_s, math.inf))

    def _start(self) -> Step:
        self._step = step = self.scheduler.schedule(self.now_s)
        decodes = step.decodes
        # The same list object is the same set of requests, each one token further.
        if decodes is self._decodes:
            self._context += len(decodes)
        else:
            self._context = sum(r.num_computed_tokens for r in decodes) + len(decodes)
            self._decodes = decodes
        moved = len(step.swap_out) + len(step.swap_in) + len(step.copies)
        prompts = prompt_features(step) if step.chunks else (0, 0, 0)
        self._features = StepFeatures(*prompts, len(decodes), self._context, moved)
        if step.is_empty and not (step.failed or step.preempted or moved):
            raise RuntimeError(
                f"nothing runs and policy {self.scheduler.policy.name!r} admits none of "
                f"{self.scheduler.num_waiting} waiting requests; simulated time cannot go on"
            )
        self._end_s = self.now_s + self.model.step_s(self._features)
        return step

    def _complete(self, step: Step) -> list[Request]:
        start_s, self.now_s, self._step = self.now_s, self._end_s, None
        features = self._features
        self._num_steps += 1
        self._num_tokens += features.prefill_tokens + features.num_decodes
        self._num_decode_tokens += features.num_decodes
        self._busy_s += self.now_s - start_s
        self.num_events += 1
        tokens = [_TOKEN] * len(step.sampled)
        finished = self.scheduler.update(step, tokens, self.now_s)
        if self._on_step is not None:
            self._on_step(start_s, self.now_s, step)
        return finished

    def _skip(self, step: Step, until_s: float) -> None:
        """Do the steps that would repeat ``step`` in one go, up to the next event."""
        quiet = self.scheduler.num_quiet_steps(step)
        if quiet < 1:
            return
        count, token_s = len(step.decodes), self.model.context_token_s
        base_s = self.model.decode_base_s(count)
        now_s, context, busy_s = self.now_s, self._context, self._busy_s
        times_s: list[float] = []
        for _ in range(quiet):
            end_s = now_s + (base_s + token_s * (context + count))
            if end_s > until_s:
                break
            context += count
            busy_s += end_s - now_s
            now_s = end_s
            times_s.append(end_s)
        if times_s:
            self.scheduler.repeat(times_s, _TOKEN)
            self.now_s, self._context, self._busy_s = now_s, context, busy_s
            self._num_steps += len(times_s)
            self._num_tokens += len(times_s) * count
            self._num_decode_tokens += len(times_s) * count


def simulate(
    workload: Workload,
    config: SchedulerConfig,
    model: StepTimeModel,
    *,
    fast_forward: bool = True,
    on_step: OnStep | None = None,
) -> ModelledRun:
    """Serve a workload on one simulated replica.

    Args:
        config: of the scheduler, its policy included.
        model: step times, fitted or given.
        fast_forward, on_step: see ``Simulator``.
    """
    simulator = Simulator(config, model, fast_forward=fast_forward, on_step=on_step)
    requests = [request_of(each, index) for index, each in enumerate(workload)]
    for request in requests:
        simulator.advance(request.arrival_s)
        simulator.add(request)
    simulator.advance()
    outputs = [output_of(request) for request in requests]
    arrivals_s = [request.arrival_s for request in requests]
    return ModelledRun(
        workload=workload.name,
        policy=simulator.scheduler.policy.name,
        outputs=outputs,
        arrivals_s=arrivals_s,
        duration_s=duration_from(outputs, arrivals_s),
        steps=simulator.totals,
        fitted_on=model.fitted_on,
    )


def request_of(request: WorkloadRequest, index: int) -> Request:
    """A Request without tokens; its prompt is named text, which a prefix cache can compare."""
    segments = request.segments or ((-1 - index, request.num_prompt_tokens),)
    return Request(
        request_id=f"request-{index}",
        prompt_token_ids=cast("list[int]", NamedText(segments)),
        params=request.params,
        arrival_s=request.arrival_s,
        priority=request.priority,
        slo=request.slo,
    )


def output_of(request: Request) -> RequestOutput:
    """What a simulated request came to; its tokens are placeholders."""
    return RequestOutput(
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        token_ids=request.output_token_ids,
        text="",
        finish_reason=request.finish_reason or "",
        error=request.error,
        metrics=request.metrics(),
    )
