"""How far the simulator is from the engine, on workloads that it was not fitted on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ch15_helpers.serving.engine import Engine
from ch15_helpers.serving.loadgen import StepRecorder, Wait, run_workload
from ch15_helpers.serving.runs import MeasuredRun, ModelledRun, ServingRun
from ch15_helpers.serving.simulator import simulate
from ch15_helpers.serving.step_time import FitReport, StepTimeModel
from ch15_helpers.serving.workload import Workload

MakeEngine = Callable[[], Engine]


@dataclass(frozen=True)
class Comparison:
    """One workload, measured and modelled. Errors are (modelled - measured) / measured.

    Attributes:
        measured, modelled: the two runs.
        steps: the step-time model on the steps of the measured run.
    """

    measured: MeasuredRun
    modelled: ModelledRun
    steps: FitReport

    def error(self, metric: Callable[[ServingRun], float]) -> float:
        """Relative error of any number that can be read off a run."""
        measured = metric(self.measured)
        return metric(self.modelled) / measured - 1

    @property
    def ttft(self) -> float:
        """Error of the median TTFT."""
        return self.error(lambda run: run.summary().ttft_s.p50)

    @property
    def tpot(self) -> float:
        """Error of the median TPOT."""
        return self.error(lambda run: run.summary().tpot_s.p50)

    @property
    def throughput(self) -> float:
        """Error of the output tokens per second."""
        return self.error(lambda run: run.summary().output_tokens_per_s)


@dataclass(frozen=True)
class Validation:
    """The outcome of ``validate_simulator``.

    Attributes:
        model: the step-time model, fitted on the fit workloads alone.
        fit: its residuals there.
        comparisons: one for each test workload.
    """

    model: StepTimeModel
    fit: FitReport
    comparisons: tuple[Comparison, ...]

    @property
    def worst(self) -> float:
        """Largest absolute error of a median TTFT or TPOT."""
        return max(max(abs(each.ttft), abs(each.tpot)) for each in self.comparisons)


def fit_step_time(
    make_engine: MakeEngine,
    workloads: Sequence[Workload],
    fitted_on: str,
    *,
    wait: Wait | None = None,
    warm_up: bool = True,
) -> tuple[StepTimeModel, FitReport]:
    """Run workloads on the engine and fit a step-time model to all their steps.

    Choose workloads that visit what the simulator will be asked about: large and small decode
    batches, short and long contexts and prompt chunks.
    """
    recorder = StepRecorder()
    for workload in workloads:
        run_workload(_engine(make_engine, warm_up), workload, recorder=recorder, wait=wait)
    return fit_recorded(recorder, fitted_on)


def fit_recorded(recorder: StepRecorder, fitted_on: str) -> tuple[StepTimeModel, FitReport]:
    """A step-time model of all recorded steps, and its residuals on them."""
    model = StepTimeModel.fit(recorder.features, recorder.seconds, fitted_on)
    return model, model.report(recorder.features, recorder.seconds)


def compare_on(
    engine: Engine, workload: Workload, model: StepTimeModel, *, wait: Wait | None = None
) -> Comparison:
    """Run one workload on an idle engine and in the simulator.

    Args:
        wait: see ``run_workload``.
    """
    recorder = StepRecorder()
    measured = run_workload(engine, workload, recorder=recorder, wait=wait)
    modelled = simulate(workload, engine.scheduler.config, model)
    steps = model.report(recorder.features, recorder.seconds)
    return Comparison(measured, modelled, steps)


def validate_simulator(
    make_engine: MakeEngine,
    fit_workloads: Sequence[Workload],
    test_workloads: Sequence[Workload],
    fitted_on: str,
    *,
    wait: Wait | None = None,
    warm_up: bool = True,
) -> Validation:
    """Fit on some workloads, then run others on the engine and in the simulator.

    Args:
        make_engine: a fresh engine for each run; all must be configured alike.
        fit_workloads, test_workloads: none of the second may be among the first.
        fitted_on: label of the model: hardware, model, threads.
        wait: see ``run_workload``.
        warm_up: run a little on each engine first, so that no first-time cost is measured.
    """
    model, fit = fit_step_time(make_engine, fit_workloads, fitted_on, wait=wait, warm_up=warm_up)
    comparisons = []
    for workload in test_workloads:
        if workload in fit_workloads:
            raise ValueError(f"{workload.name!r} is fitted on; test on another workload")
        engine = _engine(make_engine, warm_up)
        comparisons.append(compare_on(engine, workload, model, wait=wait))
    return Validation(model, fit, tuple(comparisons))


def _engine(make_engine: MakeEngine, warm_up: bool) -> Engine:
    engine = make_engine()
    if warm_up:
        engine.generate([[1] * 64, [2] * 16])
    return engine
