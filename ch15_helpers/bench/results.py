"""Results: what a notebook records, and how the harness reads it back.

A chapter uses it like this (``out_dir`` and ``profile`` come from the parameters cell)::

    hardware = HardwareProfile.measure(device)
    record = Recorder("inference_monolithic", hardware=hardware,
                      parameters={"model": model, "dtype": "float32", "new_tokens": 32})
    record.same_tokens(baseline_ids == optimised_ids)
    timing = measure_pair(baseline, optimised, device=device, iterations=iterations)
    limit = generate_limit_s(config, [len(prompt)], 32, hardware.ceilings, dtype, dtype_bytes=4)
    record.pair(timing, limit_s=limit, expected_speedup=0.5 * predicted_speedup)
    record.exact("launches_saved", 30, "launches")
    with profiled("decode", profile, out_dir):  # writes only when a profile was asked for
        optimised()
    record.save()            # its own cell, tagged nbval-ignore-output
    print(record.verdict_line())   # deterministic; nbval compares it

No file is written by a notebook: ``save`` displays the result under a mime type of its own, and
the harness reads it from the executed notebook.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ch15_helpers.bench.binding import (
    bound_text,
    on_other_hardware,
    recorded,
    recorded_metric,
    what_you_should_see,
)
from ch15_helpers.bench.formatting import format_value, yes_no
from ch15_helpers.bench.schema import (
    MODELLED_TOLERANCE,
    RATIO_UNITS,
    Direction,
    Metric,
    SchemaError,
    TargetResult,
    Value,
)

if TYPE_CHECKING:
    from ch15_helpers.bench.timing import PairTiming, Samples
    from ch15_helpers.hardware import HardwareProfile

__all__ = [
    "MIME_TYPE",
    "Recorder",
    "bound_text",
    "on_other_hardware",
    "read_results",
    "recorded",
    "what_you_should_see",
]

MIME_TYPE = "application/vnd.ch15.result+json"


class Recorder:
    """Collects one target's metrics in a notebook.

    Args:
        target: registered name, e.g. ``"inference_monolithic"``.
        hardware: measured profile; its key decides which expectations file applies.
        parameters: all that the numbers depend on, resolved (no ``"auto"``): results are
            compared only with expectations of the same parameters.
    """

    def __init__(
        self, target: str, *, hardware: HardwareProfile, parameters: Mapping[str, Any]
    ) -> None:
        self.target = target
        self.hardware = hardware
        self.parameters = dict(parameters)
        self._metrics: list[Metric] = []
        self._timings: dict[str, Any] = {}
        self._bounds: dict[str, float] = {}

    def exact(self, name: str, value: Value, unit: str = "") -> None:
        """A count, a size, token ids: must be equal on every machine with this key."""
        self._add(Metric(name, value, unit, "exact", 0.0, "equal"))

    def modelled(self, name: str, value: float, unit: str, direction: Direction = "equal") -> None:
        """A number from an equation or a simulation: must agree to 1e-6."""
        self._add(Metric(name, value, unit, "modelled", MODELLED_TOLERANCE, direction))

    def measured(
        self,
        name: str,
        value: float,
        unit: str,
        *,
        direction: Direction,
        tolerance: float = 0.2,
        ratio: bool | None = None,
    ) -> None:
        """A number from a clock.

        Args:
            unit: ``x``, ``fraction`` and ``%`` mark ratios, which are compared everywhere;
                anything else is absolute and compared on GPUs only.
            direction: ``"higher"`` or ``"lower"`` is better.
            tolerance: relative change that is still the same.
            ratio: states the intent; a contradiction with the unit is an error.
        """
        if ratio is not None and ratio != (unit in RATIO_UNITS):
            raise SchemaError(
                f"metric {name!r}: ratio={ratio} but the unit is {unit!r}; "
                f"ratios have one of the units {', '.join(RATIO_UNITS)}"
            )
        self._add(Metric(name, value, unit, "measured", tolerance, direction))

    def same_tokens(self, same: bool) -> None:
        """Whether the optimised version gave the baseline's token ids."""
        self.exact("same_tokens", bool(same))

    def pair(
        self,
        timing: PairTiming,
        *,
        limit_s: float | None = None,
        expected_speedup: float | None = None,
        tolerance: float = 0.2,
        name: str = "",
    ) -> None:
        """A timed pair: ``baseline_s``, ``optimised_s``, ``speedup``, ``fraction_of_limit``.

        Args:
            limit_s: least time of the optimised version's work (see ``roofline``).
            expected_speedup: lower bound for :meth:`verdict_line`, from the chapter's prediction.
            tolerance: relative, for all of these metrics.
            name: prefix of the metrics' names where a target has several pairs.
        """
        prefix = f"{name}_" if name else ""
        times = (("baseline_s", timing.baseline), ("optimised_s", timing.optimised))
        for suffix, samples in times:
            self.measured(
                prefix + suffix, samples.median_s, "s", direction="lower", tolerance=tolerance
            )
        self.measured(
            prefix + "speedup", timing.speedup, "x", direction="higher", tolerance=tolerance
        )
        if limit_s is not None:
            self.measured(
                prefix + "fraction_of_limit",
                limit_s / timing.optimised.median_s,
                "fraction",
                direction="higher",
                tolerance=tolerance,
            )
        self._timings[name or "pair"] = _timing_dict(timing, limit_s)
        if expected_speedup is not None:
            self._bounds[prefix + "speedup"] = expected_speedup

    def result(self) -> TargetResult:
        """Everything recorded so far."""
        counts = [len(t["baseline_s"]) for t in self._timings.values()]
        return TargetResult(
            target=self.target,
            key=self.hardware.key,
            hardware=self.hardware.block(),
            metrics=tuple(self._metrics),
            parameters=self.parameters,
            sample_count=min(counts, default=0),
            timings=self._timings,
        )

    def save(self) -> None:
        """Display the result so that the harness finds it; a table for the reader beside it.

        Call it last, in a cell tagged ``nbval-ignore-output``.
        """
        from IPython.display import display

        bundle = {MIME_TYPE: self.result().to_dict(), "text/plain": self.table()}
        display(bundle, raw=True)

    def table(self) -> str:
        """Plain-text table of the recorded metrics."""
        width = max((len(m.name) for m in self._metrics), default=0)
        rows = [f"{m.name:<{width}}  {format_value(m)}  ({m.kind})" for m in self._metrics]
        return "\n".join([f"{self.target} on {self.hardware.key}", *rows])

    def verdict_line(self, expected_speedup: float | None = None) -> str:
        """``NAME: same tokens yes, speed-up as expected yes``, equal on every run that is right.

        Args:
            expected_speedup: the least speed-up that counts as expected. Default: what each
                ``pair`` was given; else this hardware's stored expectation less its tolerance.

        Raises:
            SchemaError: no ``same_tokens`` or no ``pair`` was recorded, or no bound is known.
        """
        metrics = {m.name: m for m in self._metrics}
        same = metrics.get("same_tokens")
        speedups = [m for n, m in metrics.items() if n.endswith("speedup")]
        if same is None or not speedups:
            raise SchemaError(
                f"target {self.target!r}: the verdict needs same_tokens() and pair() first"
            )
        first, bounds = speedups[0], dict(self._bounds)
        if expected_speedup is not None:
            bounds[first.name] = expected_speedup
        elif not bounds:
            stored = recorded_metric(self.target, first.name, self.hardware.key).number
            bounds[first.name] = stored * (1 - first.tolerance)
        fast = all(metrics[n].number >= bound for n, bound in bounds.items())
        return (
            f"{self.target}: same tokens {yes_no(same.value is True)}, "
            f"speed-up as expected {yes_no(fast)}"
        )

    def _add(self, metric: Metric) -> None:
        # Running a cell twice in JupyterLab replaces its metrics; it does not double them.
        self._metrics = [m for m in self._metrics if m.name != metric.name] + [metric]


def read_results(notebook: Mapping[str, Any]) -> list[TargetResult]:
    """Results that an executed notebook displayed, the last one for each target.

    Args:
        notebook: parsed .ipynb.

    Raises:
        SchemaError: an output of our mime type that does not have the form.
    """
    found: dict[str, TargetResult] = {}
    for cell in notebook.get("cells", []):
        for output in cell.get("outputs", []):
            payload = output.get("data", {}).get(MIME_TYPE)
            if payload is not None:
                result = TargetResult.from_dict(payload)
                found[result.target] = result
    return list(found.values())


def _timing_dict(timing: PairTiming, limit_s: float | None) -> dict[str, Any]:
    def rounded(samples: Samples) -> list[float]:
        return [float(f"{t:.6g}") for t in samples.samples_s]

    return {
        "baseline_s": rounded(timing.baseline),
        "optimised_s": rounded(timing.optimised),
        "speedup_low": timing.speedup_low,
        "speedup_high": timing.speedup_high,
        "confidence": timing.confidence,
        "limit_s": limit_s,
    }
