"""A widget whose picture is computed in the reader's browser from a formula.

The formula is written twice, once as a Python callable and once as a JavaScript expression, because
the rendered page has no Python. The Python one is the reference: at construction it is evaluated
on a few slider positions, and these values travel with the widget as ``checks``. The page computes
them again and says so in red if its own formula disagrees; a test does it for stored notebooks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import anywidget
import traitlets

Point = SimpleNamespace
"""Slider values by name, as attributes: ``p.batch``. The same spelling works in JavaScript."""

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Slider:
    """One parameter that the reader can move.

    Args:
        name: identifier used in the formulas, ``p.<name>``.
        low, high: ends of the range, both reachable.
        value: position at first; the nearest choice is taken. Default: the middle choice.
        step: distance of neighbours on a linear slider. Default: 1 for whole numbers, else 1/60 of
            the range.
        log: powers of two and the values half-way between them instead of equal steps.
        label: what it is, in words. Default: the name.
        unit: printed after the value.
        choices: explicit values, instead of low, high, step and log.
    """

    name: str
    low: float = 0
    high: float = 1
    value: float | None = None
    step: float | None = None
    log: bool = False
    label: str = ""
    unit: str = ""
    choices: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ValueError(
                f"slider name {self.name!r} is not an identifier; use letters, _ and digits"
            )
        if not self.choices and not self.low < self.high:
            raise ValueError(f"slider {self.name!r}: low {self.low} must be below high {self.high}")
        if self.log and not self.choices and self.low <= 0:
            raise ValueError(f"slider {self.name!r}: a log slider needs low > 0, not {self.low}")

    def positions(self) -> list[float]:
        """Return every value that the slider can take, ascending and without repeats."""
        if self.choices:
            return sorted(set(self.choices))
        whole = float(self.low).is_integer() and float(self.high).is_integer()
        extra = {self.low, self.high} | ({self.value} if self.value is not None else set())
        if self.log:
            first, last = math.floor(math.log2(self.low)), math.ceil(math.log2(self.high))
            octaves = [2.0**k for k in range(first, last + 1)]
            values = {v * m for v in octaves for m in (1.0, 1.5)}
            if whole:
                values = {v for v in values if v.is_integer()}
        else:
            step = self.step or (1.0 if whole else (self.high - self.low) / 60)
            count = int((self.high - self.low) / step + 1e-9)
            values = {self.low + i * step for i in range(count + 1)}
        kept = sorted({v for v in values if self.low <= v <= self.high} | extra)
        return [int(v) if float(v).is_integer() else round(v, 10) for v in kept]

    def start(self) -> int:
        """Return the index of the first position shown."""
        values = self.positions()
        if self.value is None:
            return len(values) // 2
        target = self.value
        return min(range(len(values)), key=lambda i: abs(values[i] - target))


@dataclass(frozen=True)
class Curve:
    """A quantity drawn in the chart, given twice.

    Args:
        name: identifier, unique within a widget.
        label: name in the legend.
        py: the formula in Python, from a point ``p`` to a number.
        js: the same as a JavaScript expression of ``p``; Math's functions are in scope by bare name
            (``min``, ``max``, ``ceil``, ``log2`` …) and ``**`` is a power, as in Python.
        dashed: draw it as a limit: dashed, in the ink's colour.
    """

    name: str
    label: str
    py: Callable[[Any], float]
    js: str
    dashed: bool = False


@dataclass(frozen=True)
class Readout:
    """A number printed under the chart, given twice like a :class:`Curve`.

    ``digits`` is the count of significant digits. ``words`` maps the number to text: a list of
    (lower bound, text) pairs, ascending, where the last bound at or below the number counts.
    """

    name: str
    label: str
    py: Callable[[Any], float]
    js: str
    unit: str = ""
    digits: int = 3
    words: tuple[tuple[float, str], ...] = ()


def format_number(value: float, digits: int = 3) -> str:
    """Return ``value`` with ``digits`` significant digits and commas, as the page prints it."""
    if not math.isfinite(value):
        return "∞" if value > 0 else ("−∞" if value < 0 else "undefined")
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude >= 15 or magnitude < -4:
        return f"{value:.{digits - 1}e}"
    decimals = max(0, digits - 1 - magnitude)
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


class FormulaExplorer(anywidget.AnyWidget):
    """Sliders, an SVG chart and numeric readouts; see :func:`ch15_helpers.viz.explore_formula`.

    With a kernel, :attr:`values` follows the sliders and :meth:`evaluate` gives the Python numbers
    at their present positions. Without one, the page computes everything itself.
    """

    _esm = (_HERE / "formula_explorer.js").read_text(encoding="utf-8")
    _css = (_HERE / "formula_explorer.css").read_text(encoding="utf-8")

    spec = traitlets.Dict().tag(sync=True)
    values = traitlets.Dict().tag(sync=True)
    checks: traitlets.List[Any] = traitlets.List().tag(sync=True)

    def __init__(
        self,
        spec: dict[str, Any],
        sliders: Sequence[Slider],
        formulas: Mapping[str, Callable[[Any], float]],
    ) -> None:
        self._formulas = dict(formulas)
        self._positions = {s.name: s.positions() for s in sliders}
        start = {s.name: self._positions[s.name][s.start()] for s in sliders}
        super().__init__(spec=spec, values=start, checks=[])
        self.checks = [
            [point, self.evaluate(point)] for point in self.grid(points_per_slider=3)[:27]
        ]

    def evaluate(self, values: Mapping[str, float] | None = None) -> dict[str, float | None]:
        """Evaluate every formula in Python at ``values`` (default: where the sliders are).

        Infinities and NaN become ``None``, as JSON has neither.
        """
        point = SimpleNamespace(**dict(values or self.values))
        results: dict[str, float | None] = {}
        for name, formula in self._formulas.items():
            number = float(formula(point))
            results[name] = number if math.isfinite(number) else None
        return results

    def grid(self, points_per_slider: int = 5) -> list[dict[str, float]]:
        """Return slider positions spread over every range: all combinations, ends included."""
        axes = []
        for values in self._positions.values():
            n = min(points_per_slider, len(values))
            picks = {round(i * (len(values) - 1) / max(1, n - 1)) for i in range(n)}
            axes.append([values[i] for i in sorted(picks)])
        return [dict(zip(self._positions, c, strict=True)) for c in itertools.product(*axes)]

    def summary(self) -> str:
        """Return one line with slider positions and readouts, for readers without a browser."""
        numbers = self.evaluate()
        at = [
            f"{s['label']} {format_number(self.values[s['name']])} {s['unit']}".strip()
            for s in self.spec["sliders"]
        ]
        shown = []
        for item in self.spec["readouts"] or self.spec["curves"]:
            value = numbers[item["name"]]
            text = next(
                (t for low, t in reversed(item.get("words", [])) if (value or 0) >= low), ""
            )
            if not text:
                text = format_number(math.inf if value is None else value, item.get("digits", 3))
                text = f"{text} {item.get('unit', '')}".strip()
            shown.append(f"{item['label']} {text}")
        return f"{self.spec['title']}: at {', '.join(at)}: {'; '.join(shown)}"

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        bundle = super()._repr_mimebundle_(**kwargs)
        if bundle is None:
            return {"text/plain": self.summary()}
        data = bundle[0] if isinstance(bundle, tuple) else bundle
        data["text/plain"] = self.summary()
        return bundle


ChartKind = Literal["line", "area", "bar"]
