"""Numbers for people: a fitting unit and three significant digits."""

from __future__ import annotations

from ch15_helpers.bench.schema import Metric


def format_s(seconds: float) -> str:
    """Seconds with a fitting unit: ``1.23 s``, ``45.6 ms``, ``7.89 µs``."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if abs(seconds) >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def format_value(metric: Metric) -> str:
    """A metric's value for people: ``2.31×``, ``41.2 ms``, ``63 %``, ``yes``."""
    value = metric.value
    if isinstance(value, bool):
        return yes_no(value)
    if isinstance(value, str | list):
        return str(value)
    if metric.unit == "x":
        return f"{value:.3g}×"
    if metric.unit == "s":
        return format_s(value)
    if metric.unit == "fraction":
        return f"{value:.1%}"
    number = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return f"{number} {metric.unit}".rstrip()


def yes_no(value: bool) -> str:
    return "yes" if value else "no"
