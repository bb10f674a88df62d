"""Metrics and targets' results as data: what notebooks record and expectations store."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from ch15_helpers.errors import Ch15Error

Kind = Literal["exact", "modelled", "measured"]
Direction = Literal["higher", "lower", "equal"]
Value = bool | int | float | str | list[Any]

KINDS = ("exact", "modelled", "measured")
DIRECTIONS = ("higher", "lower", "equal")
# A unit without dimension marks a ratio, which is compared on every machine.
RATIO_UNITS = ("x", "fraction", "%")
METRIC_FIELDS = ("name", "value", "unit", "kind", "tolerance", "direction")
HARDWARE_FIELDS = ("name", "driver", "torch", "triton", "ceilings")
MODELLED_TOLERANCE = 1e-6


class SchemaError(Ch15Error, ValueError):
    """A metric or a result does not have the stored form; names the field."""


@dataclass(frozen=True)
class Metric:
    """One recorded number or fact.

    Attributes:
        name: unique in its target. value: JSON value; a number unless ``kind`` is exact.
        unit: ``s``, ``tokens/s``, …; ``x``, ``fraction`` and ``%`` mark ratios; ``""`` for counts.
        kind: ``exact`` must be equal, ``modelled`` equal to 1e-6, ``measured`` within tolerance.
        tolerance: relative; 0 for exact, 1e-6 for modelled, in (0, 1) for measured.
        direction: which way is better, or ``equal``.
    """

    name: str
    value: Value
    unit: str
    kind: Kind
    tolerance: float
    direction: Direction

    def __post_init__(self) -> None:
        problem = _metric_problem(self)
        if problem:
            raise SchemaError(f"metric {self.name!r}: {problem}")

    @property
    def is_ratio(self) -> bool:
        """Whether the number has no dimension, so that it is compared on CPUs too."""
        return self.unit in RATIO_UNITS

    @property
    def number(self) -> float:
        """The value as a float.

        Raises:
            SchemaError: it is not a number.
        """
        if isinstance(self.value, int | float):
            return float(self.value)
        raise SchemaError(f"metric {self.name!r}: {self.value!r} is not a number")

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in METRIC_FIELDS}

    @classmethod
    def from_dict(cls, data: object) -> Metric:
        """Inverse of :meth:`to_dict`; exactly these fields.

        Raises:
            SchemaError: a missing, unknown or ill-typed field.
        """
        fields = _object(data, "metric", METRIC_FIELDS)
        return cls(**{name: fields[name] for name in METRIC_FIELDS})


@dataclass(frozen=True)
class TargetResult:
    """What one notebook recorded for one target.

    Attributes:
        target: registered name. key: hardware key that the numbers belong to.
        hardware: the expectations file's hardware block. metrics: in recorded order.
        parameters: everything that the numbers depend on (model, dtype, batch, …).
        sample_count: timed rounds behind the measured metrics.
        timings: per pair, the samples and the interval, for plots and re-analysis.
    """

    target: str
    key: str
    hardware: Mapping[str, Any]
    metrics: tuple[Metric, ...]
    parameters: Mapping[str, Any]
    sample_count: int
    timings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [m.name for m in self.metrics]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise SchemaError(f"target {self.target!r}: recorded twice: {', '.join(twice)}")

    def metric(self, name: str) -> Metric | None:
        return next((m for m in self.metrics if m.name == name), None)

    @property
    def tokens_agree(self) -> bool:
        """False if the chapter recorded that optimised tokens differ from the baseline's."""
        same = self.metric("same_tokens")
        return same is None or same.value is True

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, as ``results.json`` and a notebook's output hold them."""
        return {
            "target": self.target,
            "key": self.key,
            "hardware": dict(self.hardware),
            "metrics": [m.to_dict() for m in self.metrics],
            "parameters": dict(self.parameters),
            "sample_count": self.sample_count,
            "timings": dict(self.timings),
        }

    @classmethod
    def from_dict(cls, data: object) -> TargetResult:
        """Inverse of :meth:`to_dict`.

        Raises:
            SchemaError: the data do not have that form.
        """
        names = ("target", "key", "hardware", "metrics", "parameters", "sample_count", "timings")
        fields = _object(data, "result", names)
        if not isinstance(fields["metrics"], list):
            raise SchemaError("result: metrics must be a list")
        for name in ("target", "key"):
            if not isinstance(fields[name], str) or not fields[name]:
                raise SchemaError(f"result: {name} must be a non-empty string")
        for name in ("parameters", "timings"):
            if not isinstance(fields[name], dict):
                raise SchemaError(f"result: {name} must be an object")
        count = fields["sample_count"]
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise SchemaError("result: sample_count must be a whole number ≥ 0")
        return cls(
            target=fields["target"],
            key=fields["key"],
            hardware=check_hardware(fields["hardware"]),
            metrics=tuple(Metric.from_dict(m) for m in fields["metrics"]),
            parameters=fields["parameters"],
            sample_count=count,
            timings=fields["timings"],
        )


def check_hardware(data: object) -> dict[str, Any]:
    """The hardware block, checked.

    Raises:
        SchemaError: a missing or unknown field, a ceiling that is not a positive number.
    """
    block = _object(data, "hardware", HARDWARE_FIELDS)
    for name in ("name", "torch"):
        if not isinstance(block[name], str) or not block[name]:
            raise SchemaError(f"hardware: {name} must be a non-empty string")
    for name in ("driver", "triton"):
        if block[name] is not None and not isinstance(block[name], str):
            raise SchemaError(f"hardware: {name} must be a string or null")
    names = ("read_GBps", "copy_GBps", "matmul_tflops", "launch_us", "host_link_GBps")
    ceilings = _object(block["ceilings"], "hardware: ceilings", names)
    rates = ceilings["matmul_tflops"]
    if not isinstance(rates, dict) or not rates:
        raise SchemaError("hardware: ceilings: matmul_tflops must be an object with a dtype")
    numbers = {k: v for k, v in ceilings.items() if k != "matmul_tflops"}
    numbers.update({f"matmul_tflops.{k}": v for k, v in rates.items()})
    for name, value in numbers.items():
        if value is None and name == "host_link_GBps":
            continue
        if not is_number(value) or value <= 0:
            raise SchemaError(f"hardware: ceilings: {name} is {value!r}; expected a number > 0")
    return block


def is_number(value: object) -> bool:
    """A finite int or float; booleans are not numbers here."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _object(data: object, what: str, fields: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise SchemaError(f"{what} must be an object, not {type(data).__name__}")
    missing = [f for f in fields if f not in data]
    unknown = [str(k) for k in data if k not in fields]
    if missing or unknown:
        raise SchemaError(
            f"{what}: missing fields: {', '.join(missing) or 'none'}; unknown fields: "
            f"{', '.join(unknown) or 'none'}; expected {', '.join(fields)}"
        )
    return cast("dict[str, Any]", data)


def _metric_problem(m: Metric) -> str | None:
    name, unit = cast("Any", m.name), cast("Any", m.unit)  # JSON may hold anything
    if not isinstance(name, str) or not name:
        return "name must be a non-empty string"
    if not isinstance(unit, str):
        return f"unit is {unit!r}; expected a string"
    if m.kind not in KINDS:
        return f"kind is {m.kind!r}; expected one of {', '.join(KINDS)}"
    if m.direction not in DIRECTIONS:
        return f"direction is {m.direction!r}; expected one of {', '.join(DIRECTIONS)}"
    if not is_number(m.tolerance) or m.tolerance < 0:
        return f"tolerance is {m.tolerance!r}; expected a number ≥ 0"
    if m.kind == "exact":
        return None if _is_json(m.value) else f"value {m.value!r} is not a JSON value"
    if not is_number(m.value):
        return f"value is {m.value!r}; a {m.kind} metric needs a finite number"
    if m.kind == "measured" and m.direction == "equal":
        return "direction is 'equal'; a measured metric says whether higher or lower is better"
    if m.kind == "measured" and not 0 < m.tolerance < 1:
        return f"tolerance is {m.tolerance!r}; a measured metric needs one between 0 and 1"
    return None


def _is_json(value: object) -> bool:
    if isinstance(value, list):
        return all(_is_json(v) for v in value)
    return isinstance(value, bool | str) or is_number(value)
