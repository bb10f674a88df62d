"""Fit a step-time model on this machine, with its error, for everything that simulates.

``python -m ch15_helpers.bench.fit_step_time`` sweeps batch sizes, contexts and prompt chunks on the
real engine, adds a mixed workload, fits, and compares the simulator with the engine on other
workloads. It prints the result; ``--write`` stores it in the package, ``--out`` elsewhere,
with every step that was fitted on.

The engine runs one step after the other, on CUDA too, as the simulator does. Ahead of time
(``async_scheduling``) it is faster by what the host needs between two steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from ch15_helpers.bench.expectations import write_json_atomically
from ch15_helpers.bench.runs import commit_id
from ch15_helpers.errors import Ch15Error
from ch15_helpers.hardware import device_name, hardware_key, resolve_device
from ch15_helpers.model.loading import load_model
from ch15_helpers.model.transformer import Transformer
from ch15_helpers.serving.config import EngineConfig, SchedulerConfig
from ch15_helpers.serving.engine import Engine
from ch15_helpers.serving.loadgen import SkippingClock, StepRecorder, run_workload
from ch15_helpers.serving.simulator import simulate
from ch15_helpers.serving.step_time import StepTimeModel
from ch15_helpers.serving.step_time_data import StoredStepTime, file_name
from ch15_helpers.serving.validation import Validation, compare_on, fit_recorded
from ch15_helpers.serving.workload import Workload, WorkloadRequest, azure_conversation

MODULE = "ch15_helpers.bench.fit_step_time"


@dataclass(frozen=True)
class Mix:
    """An Azure-like conversation workload, cut to the device's size.

    Attributes:
        load: arrival rate as a fraction of what the engine can serve.
        prompt, output: factors on the lengths.
    """

    num_requests: int
    load: float
    prompt: float
    output: float

    def workload(self, seed: int, config: SchedulerConfig, model: StepTimeModel) -> Workload:
        """Requests at ``load`` times the simulated capacity for just these lengths."""
        work = azure_conversation(self.num_requests, seed=seed, rate_per_s=1.0)
        work = work.scaled(prompt=self.prompt, output=self.output).clipped(7000, 1000)
        return work.scaled(rate=self.load * capacity_per_s(work, config, model))


@dataclass(frozen=True)
class Sweep:
    """What is run to fit, and to test the fit.

    Attributes:
        cells: (batch, prompt tokens, output tokens) of requests that all arrive at once. With
            one request the prompt is the chunk; with many, chunks and decodes share steps.
        mixed: fitted on too. tests: not fitted on; other seeds.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    cells: tuple[tuple[int, int, int], ...]
    mixed: Mix
    tests: tuple[Mix, ...]

    def cell_workloads(self) -> list[Workload]:
        """One for each cell."""
        return [
            Workload(f"batch {b}, context {p}", (WorkloadRequest(0.0, p, o),) * b, seed=n)
            for n, (b, p, o) in enumerate(self.cells)
        ]


SWEEPS: Mapping[str, Sweep] = MappingProxyType(
    {
        "cpu": Sweep(
            max_num_seqs=16,
            max_num_batched_tokens=256,
            cells=(
                *((1, 16, 8), (1, 64, 8), (1, 250, 8), (1, 500, 8), (2, 40, 8)),
                *((4, 32, 8), (4, 120, 6), (8, 16, 8), (8, 80, 6), (16, 8, 6), (16, 30, 6)),
            ),
            mixed=Mix(24, 0.8, 0.06, 0.06),
            tests=(Mix(120, 0.5, 0.04, 0.05), Mix(120, 0.8, 0.04, 0.05)),
        ),
        "cuda": Sweep(
            max_num_seqs=256,
            max_num_batched_tokens=2048,
            cells=(
                *((1, 64, 16), (1, 512, 16), (1, 2000, 16), (1, 7500, 16), (8, 1000, 16)),
                *((2, 64, 16), (32, 500, 16), (64, 1000, 16), (128, 500, 16), (256, 120, 16)),
                (32, 4000, 8),
            ),
            mixed=Mix(120, 0.8, 1.0, 0.6),
            tests=(Mix(160, 0.5, 1.0, 0.5), Mix(160, 0.8, 0.8, 0.5)),
        ),
    }
)


def capacity_per_s(work: Workload, config: SchedulerConfig, model: StepTimeModel) -> float:
    """Requests per second that a simulated engine serves when all of them wait already."""
    at_once = work.map(lambda request: replace(request, arrival_s=0.0))
    return len(work) / simulate(at_once, config, model).duration_s


@dataclass(frozen=True)
class Timer:
    """How steps are timed: an engine's clock, and how to pass the time between arrivals."""

    clock: SkippingClock
    description: str

    @classmethod
    def wall(cls) -> Timer:
        """Real time, idle time left out."""
        return cls(SkippingClock(), "wall clock, idle time skipped")

    @classmethod
    def cpu(cls) -> Timer:
        """CPU time of this process: what a machine without other load would take on one thread."""
        torch.set_num_threads(1)
        return cls(SkippingClock(time.process_time), "CPU time of one thread")


def fit_on(
    model: Transformer,
    sweep: Sweep,
    timer: Timer,
    report: Callable[[str], None] = lambda _: None,
    recorder: StepRecorder | None = None,
) -> Validation:
    """Run a sweep on an engine and fit; then run and simulate the test workloads.

    Args:
        report: told the name of each workload before it runs.
        recorder: gets the steps that are fitted on, to look at them afterwards.
    """
    recorder = StepRecorder() if recorder is None else recorder
    config = EngineConfig(
        max_num_seqs=sweep.max_num_seqs,
        max_num_batched_tokens=sweep.max_num_batched_tokens,
        async_scheduling=False,  # each step has a time of its own, as in the simulator
    )
    engine = Engine(model, config, clock=timer.clock)
    engine.generate([[1] * 64, [2] * 16])
    limits, wait = engine.scheduler.config, timer.clock.wait
    label = f"{model.source} in {str(model.dtype).removeprefix('torch.')} on {_where(model)}"
    for workload in sweep.cell_workloads():
        report(workload.name)
        run_workload(engine, workload, recorder=recorder, wait=wait)
    step_time, _ = fit_recorded(recorder, label)
    report("mixed")
    mixed = sweep.mixed.workload(100, limits, step_time)
    run_workload(engine, mixed, recorder=recorder, wait=wait)
    step_time, fit = fit_recorded(recorder, label)
    comparisons = []
    for number, mix in enumerate(sweep.tests):
        report(f"test at load {mix.load}")
        workload = mix.workload(200 + number, limits, step_time)
        comparisons.append(compare_on(engine, workload, step_time, wait=wait))
    return Validation(step_time, fit, tuple(comparisons))


def _where(model: Transformer) -> str:
    return device_name(model.device)


def to_store(
    model: Transformer, sweep: Sweep, timer: Timer, found: Validation, command: str
) -> StoredStepTime:
    """The outcome with everything that it depends on."""
    held_out = tuple(
        {
            "workload": each.measured.workload,
            "num_requests": mix.num_requests,
            "load": mix.load,
            "ttft_p50_error": each.ttft,
            "tpot_p50_error": each.tpot,
            "throughput_error": each.throughput,
            "steps": asdict(each.steps),
        }
        for mix, each in zip(sweep.tests, found.comparisons, strict=True)
    )
    provenance: dict[str, Any] = {
        "hardware": _where(model),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "model": model.source,
        "dtype": str(model.dtype).removeprefix("torch."),
        "clock": timer.description,
        "sweep": asdict(sweep),
        "commit": commit_id(),
        "command": command,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return StoredStepTime(
        hardware_key(model.device), found.model, asdict(found.fit), held_out, provenance
    )


def _print(stored: StoredStepTime, console: Console) -> None:
    for name, value in stored.model.to_dict().items():
        console.print(f"{name:16} {value}" if isinstance(value, str) else f"{name:16} {value:.4g}")
    fit = stored.fit
    console.print(
        f"fit: {fit['num_steps']} steps, error of a step {fit['median_abs']:.1%} (median), "
        f"{fit['p90_abs']:.1%} (p90), sum {fit['total']:+.1%}"
    )
    for each in stored.held_out:
        console.print(
            f"held out: {each['num_requests']} requests at load {each['load']}: median TTFT "
            f"{each['ttft_p50_error']:+.1%}, TPOT {each['tpot_p50_error']:+.1%}, throughput "
            f"{each['throughput_error']:+.1%}; steps {each['steps']['median_abs']:.1%}"
        )


def main(
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    model: Annotated[str, typer.Option(help="Any source that load_model takes.")] = "smollm2",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    cpu_time: Annotated[
        bool, typer.Option(help="Count CPU time on one thread: where others compute too.")
    ] = False,
    write: Annotated[bool, typer.Option(help="Store the fit in the package.")] = False,
    out: Annotated[Path | None, typer.Option(help="Store it in this folder instead.")] = None,
) -> None:
    """Fit step times on this machine and report the error on workloads that were not fitted on."""
    console = Console(width=100)
    try:
        where = resolve_device(device)
        if cpu_time and where.type != "cpu":
            raise Ch15Error("--cpu-time counts the host's time, so it needs --device cpu")
        timer = Timer.cpu() if cpu_time else Timer.wall()
        precision = None if dtype == "auto" else getattr(torch, dtype)
        lm = load_model(model, device=where, dtype=precision)
        sweep = SWEEPS[where.type]
        with Progress(console=console) as bar:
            total = len(sweep.cells) + 1 + len(sweep.tests)
            task = bar.add_task("fitting", total=total)
            steps = StepRecorder()
            found = fit_on(lm, sweep, timer, lambda name: bar.update(task, advance=1), steps)
    except Ch15Error as error:
        console.print(f"error: {error}")
        raise typer.Exit(1) from None
    options = f"--device {where.type} --model {model} --dtype {dtype}"
    command = f"python -m {MODULE} {options}{' --cpu-time' if cpu_time else ''} --write"
    stored = to_store(lm, sweep, timer, found, command)
    _print(stored, console)
    folder = out if out is not None else Path(__file__).parents[1] / "serving" / "data"
    if write or out is not None:
        write_json_atomically(folder / file_name(stored.key), stored.to_dict())
        console.print(f"stored as {file_name(stored.key)}")
    if out is not None:
        raw = {"features": [list(f) for f in steps.features], "seconds": steps.seconds}
        write_json_atomically(out / f"steps_{stored.key}.json", raw)


if __name__ == "__main__":
    typer.run(main)
