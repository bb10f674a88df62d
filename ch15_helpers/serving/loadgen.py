"""Open-loop load on the real engine.

Requests come when the workload says, whatever the engine does. Each latency counts from that
moment, as in MLPerf's LoadGen, so a driver or an engine that falls behind makes latencies worse
and cannot hide queueing (coordinated omission); how late each request was submitted is reported
as lag.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from rich.progress import Progress

from ch15_helpers.serving.engine import Engine, StepRecord
from ch15_helpers.serving.request import RequestOutput
from ch15_helpers.serving.runs import MeasuredRun, StepTotals, duration_from
from ch15_helpers.serving.step_time import StepFeatures, features_of
from ch15_helpers.serving.workload import Workload

Wait = Callable[[float], object]


class SkippingClock:
    """A clock that jumps over idle time instead of waiting for it.

    Give the engine the clock and ``run_workload`` its ``wait``: then a run takes as long as its
    steps. Busy time is real, so latencies are those of a run that waits.

    Args:
        base: what is read while the engine works. ``time.process_time`` counts this process's CPU
            time alone: with one thread it is the time that an otherwise idle machine would take,
            which is what to fit on where others compute too.
    """

    def __init__(self, base: Callable[[], float] = time.perf_counter) -> None:
        self._base = base
        self._skipped_s = 0.0

    def __call__(self) -> float:
        """Seconds, monotonic."""
        return self._base() + self._skipped_s

    def wait(self, seconds: float) -> None:
        """Move on by that much."""
        self._skipped_s += max(0.0, seconds)


class StepRecorder:
    """Collects what steps did and how long they took, for ``StepTimeModel.fit``.

    A step takes until the next one begins, so what lies between two steps (outputs handed out,
    requests taken in, this record) counts too: on a GPU it is a few percent. Where the engine has
    nothing left to do after a step, the step ends with its own update.

    Attributes:
        features, seconds: one for each step.
    """

    def __init__(self) -> None:
        self.features: list[StepFeatures] = []
        self.seconds: list[float] = []
        self._began_s: float | None = None  # of the last step, while the engine stays busy

    def __call__(self, record: StepRecord) -> None:
        """An engine's ``on_step``. It must be called at once: the step's requests move on."""
        if self._began_s is not None:
            self.seconds[-1] = record.start_s - self._began_s
        self._began_s = record.start_s if record.has_work else None
        self.features.append(features_of(record.step, updated=True))
        self.seconds.append(record.end_s - record.start_s + record.update_s)

    def totals(self, budget: int, since: int = 0) -> StepTotals:
        """Sums over the steps from number ``since`` on; ``budget`` is the token budget of one."""
        features = self.features[since:]
        return StepTotals(
            num_steps=len(features),
            num_tokens=sum(f.prefill_tokens + f.num_decodes for f in features),
            num_decode_tokens=sum(f.num_decodes for f in features),
            budget_tokens=budget * len(features),
            busy_s=sum(self.seconds[since:]),
        )


def run_workload(
    engine: Engine,
    workload: Workload,
    *,
    recorder: StepRecorder | None = None,
    wait: Wait | None = None,
    progress: bool = False,
) -> MeasuredRun:
    """Serve a workload on an idle engine.

    Args:
        recorder: gets every step; give the same one to several runs to fit on all of them.
        wait: called with the seconds until the next arrival while the engine is idle; None waits
            on the real clock. With an engine on a virtual clock it must move that clock.
        progress: show a progress bar.

    Raises:
        ValueError: the engine has unfinished requests.
    """
    if engine.has_unfinished:
        raise ValueError("the engine has unfinished requests; run a workload on an idle one")
    wait = threading.Event().wait if wait is None else wait
    recorder = StepRecorder() if recorder is None else recorder
    since, before = len(recorder.features), engine.on_step
    engine.on_step = _both(recorder, before)
    # Building prompts takes time that is not the engine's.
    vocab_size = engine.model.config.vocab_size
    prompts = [workload.prompt(index, vocab_size) for index in range(len(workload))]
    try:
        with Progress(disable=not progress) as bar:
            task = bar.add_task(workload.name, total=len(workload))
            outputs, lag_s = _drive(
                engine, workload, prompts, wait, lambda done: bar.update(task, completed=done)
            )
    finally:
        engine.on_step = before
    arrivals_s = [request.arrival_s for request in workload]
    return MeasuredRun(
        workload=workload.name,
        policy=engine.scheduler.policy.name,
        outputs=outputs,
        arrivals_s=arrivals_s,
        duration_s=duration_from(outputs, arrivals_s),
        steps=recorder.totals(engine.config.max_num_batched_tokens, since),
        lag_s=lag_s,
    )


def _drive(
    engine: Engine,
    workload: Workload,
    prompts: list[list[int]],
    wait: Wait,
    report: Callable[[int], None],
) -> tuple[list[RequestOutput], list[float]]:
    """Submit what is due, step, and again; returns outputs in order, and lags."""
    requests, clock = workload.requests, engine.clock
    places: dict[str, int] = {}
    outputs: dict[int, RequestOutput] = {}
    lag_s: list[float] = []
    start_s = clock()
    while len(outputs) < len(requests):
        now_s = clock() - start_s
        while len(lag_s) < len(requests) and requests[len(lag_s)].arrival_s <= now_s:
            index = len(lag_s)
            request = requests[index]
            name = engine.add_request(
                prompts[index],
                request.params,
                arrival_s=start_s + request.arrival_s,
                priority=request.priority,
                slo=request.slo,
            )
            places[name] = index
            lag_s.append(clock() - start_s - request.arrival_s)
        if engine.has_unfinished:
            for output in engine.step():
                outputs[places[output.request_id]] = output
            report(len(outputs))
        else:
            wait(requests[len(lag_s)].arrival_s - now_s)
    return [outputs[index] for index in range(len(requests))], lag_s


def _both(
    first: Callable[[StepRecord], None], second: Callable[[StepRecord], None] | None
) -> Callable[[StepRecord], None]:
    if second is None:
        return first

    def call(record: StepRecord) -> None:
        first(record)
        second(record)

    return call
