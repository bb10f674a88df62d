"""``ch15 validate continuous_batching``: how far the simulator is from the engine.

Step times are fitted on this machine, then the simulator serves workloads that the fit did not
see, and so does the engine. The chapter promises that the median TTFT and TPOT agree within
``BOUND``, which is what Vidur (Agrawal et al., MLSys 2024) reports for its own simulator.
"""

from __future__ import annotations

from rich.progress import Progress

from ch15_helpers.bench.fit_step_time import SWEEPS, Sweep, Timer, fit_on
from ch15_helpers.bench.targets import Validation
from ch15_helpers.model.loading import load_model
from ch15_helpers.model.transformer import Transformer

BOUND = 0.09
"""Largest relative error of a median."""


def validate_simulator_error() -> Validation:
    """Fit and test with SmolLM2 on the best device here.

    On a CPU, steps are timed by the CPU time of one thread, so that other processes do not count.
    """
    model = load_model("smollm2")
    return judge(model, SWEEPS[model.device.type])


def judge(model: Transformer, sweep: Sweep, bound: float = BOUND) -> Validation:
    """The same with any model and sweep; the error must not exceed ``bound``."""
    timer = Timer.cpu() if model.device.type == "cpu" else Timer.wall()
    with Progress(transient=True) as bar:
        task = bar.add_task("fitting and testing", total=len(sweep.cells) + 1 + len(sweep.tests))
        found = fit_on(model, sweep, timer, lambda name: bar.advance(task))
    lines = [
        f"{mix.num_requests} requests at load {mix.load}: median TTFT {each.ttft:+.1%}, "
        f"TPOT {each.tpot:+.1%}; a step {each.steps.median_abs:.1%}"
        for mix, each in zip(sweep.tests, found.comparisons, strict=True)
    ]
    passed = found.worst <= bound
    verdict = "within" if passed else "beyond"
    lines.append(
        f"largest error of a median {found.worst:.1%}, {verdict} the bound of {bound:.0%} "
        f"({timer.description}; fitted on {found.fit.num_steps} steps)"
    )
    return Validation(passed, "\n".join(lines))
