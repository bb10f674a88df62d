"""Explorers for the notebooks: formulas drawn in the page, and grids of stored plots.

Both work in three places with the same notebook cell: in the rendered page with no kernel and no
network, in JupyterLab with a kernel, and in the stored notebook as text.
"""

from __future__ import annotations

import html
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ipywidgets

from ch15_helpers.viz.formula import (
    ChartKind,
    Curve,
    FormulaExplorer,
    Readout,
    Slider,
    format_number,
)
from ch15_helpers.viz.plots import figure_html, png_bytes

__all__ = ["Axis", "Curve", "Readout", "Slider", "explore_formula", "explore_grid"]


def explore_formula(
    title: str,
    sliders: Sequence[Slider],
    curves: Sequence[Curve],
    x: str | None = None,
    readouts: Sequence[Readout] = (),
    *,
    chart: ChartKind = "line",
    x_label: str = "",
    y_label: str = "",
    y_log: bool = False,
    y_min: float | None = None,
    y_max: float | None = None,
    alt: str = "",
) -> FormulaExplorer:
    """Return a widget that draws formulas of its sliders; make it the last expression of a cell.

    Args:
        title: what the reader explores, in one line.
        sliders: one to about five parameters. All can be dragged, and reached by keyboard.
        curves: quantities drawn. For ``chart="bar"`` one bar each, at the sliders' positions.
        x: name of the slider that is also the x axis of a line or area chart.
        readouts: numbers under the chart.
        chart: "line", "area" (curves stacked in order) or "bar".
        x_label, y_label: axis titles with units. x_label defaults to the slider's label and unit.
        y_log: logarithmic y axis. y_min and y_max fix its ends; else it follows the curves.
        alt: what the picture shows, for screen readers; the readouts are appended.

    Raises:
        ValueError: a name is used twice, or ``x`` names no slider.
        ArithmeticError: a formula fails at a slider's end; clip it there in both languages.

    Example:
        >>> kv = dict(py=lambda p: p.batch * p.context * 22.5 / 2**20,
        ...           js="p.batch * p.context * 22.5 / 2**20")
        >>> batch = Slider("batch", 1, 256, value=16, log=True, label="Batch", unit="requests")
        >>> context = Slider("context", 128, 8192, value=2048, log=True, label="Context")
        >>> widget = explore_formula(
        ...     "KV cache of SmolLM2-135M in bfloat16", sliders=[batch, context], x="context",
        ...     curves=[Curve("kv", "KV cache", **kv)], y_label="GiB",
        ...     readouts=[Readout("kv_now", "KV cache now", unit="GiB", **kv)])
        >>> round(widget.evaluate()["kv"], 3)
        0.703
    """
    formulas: list[Curve | Readout] = [*curves, *readouts]
    by_name = {s.name: s for s in sliders}
    _check_names(title, [item.name for item in (*sliders, *formulas)])
    if chart != "bar" and x not in by_name:
        raise ValueError(
            f"explorer {title!r}: x={x!r} names no slider; there are {sorted(by_name)}"
        )
    if x is not None and not x_label:
        axis = by_name[x]
        x_label = f"{axis.label or axis.name}{f' ({axis.unit})' if axis.unit else ''}"
    options = {
        "title": title, "x": x, "chart": chart, "x_label": x_label, "y_label": y_label,
        "y_log": y_log, "y_min": y_min, "y_max": y_max, "alt": alt,
    }  # fmt: skip
    spec = options | {
        "sliders": [_plain(s, "log") | {"positions": s.positions()} for s in sliders],
        "curves": [_plain(c, "js", "dashed") for c in curves],
        "readouts": [
            _plain(r, "js", "unit", "digits") | {"words": [list(w) for w in r.words]}
            for r in readouts
        ],
    }
    return FormulaExplorer(spec, sliders, {item.name: item.py for item in formulas})


def _check_names(title: str, names: list[str]) -> None:
    repeated = sorted({n for n in names if names.count(n) > 1})
    if repeated:
        raise ValueError(f"explorer {title!r}: names used twice: {', '.join(repeated)}")


def _plain(item: Slider | Curve | Readout, *fields: str) -> dict[str, Any]:
    chosen = {
        field: getattr(item, field) for field in ("name", "unit", *fields) if hasattr(item, field)
    }
    return chosen | {"label": item.label or item.name}


@dataclass(frozen=True)
class Axis:
    """One slider of :func:`explore_grid`: its values, and how they are shown."""

    values: Sequence[Any]
    label: str = ""
    unit: str = ""
    start: int | None = None

    def options(self) -> list[str]:
        """Return the texts shown beside the slider, one per value."""
        texts = [format_number(v, 6) if isinstance(v, int | float) else str(v) for v in self.values]
        return [f"{t} {self.unit}".strip() for t in texts]


class GridExplorer(ipywidgets.VBox):
    """Sliders over stored pictures; as text it is one line, not the markup of every picture."""

    def __init__(self, children: Sequence[Any], summary: str) -> None:
        super().__init__(list(children), layout={"max_width": "100%"})
        self._summary = summary
        self.add_class("ch15-grid")

    def __repr__(self) -> str:
        return self._summary


def explore_grid(
    draw: Callable[..., Any],
    params: Mapping[str, Sequence[Any] | Axis],
    *,
    alt: str | Callable[..., str],
    caption: str | Callable[..., str] = "",
    live: Callable[..., Any] | None = None,
    title: str = "",
    dpi: int = 110,
) -> GridExplorer:
    """Return sliders over pictures drawn beforehand, one for each combination of values.

    Args:
        draw: called as ``draw(**values)`` for every combination; returns a matplotlib figure. Draw
            from numbers measured or simulated once, outside; this function closes the figures.
        params: one to three parameters: ``{"batch": [1, 4, 16]}``, or with labels
            ``{"batch": Axis([1, 4, 16], "Batch size", "requests")}``.
        alt: text for readers who do not see the picture; a string with ``{batch}`` fields, or a
            callable with ``draw``'s arguments.
        caption: the same, shown under the picture.
        live: as ``draw``, but measures or simulates anew. With a kernel it is called when a slider
            comes to rest, and its picture replaces the stored one; the page without a kernel shows
            what was stored.
        title: shown above the sliders.
        dpi: pixels per inch of a picture; 16 pictures at 110 take about 250 KB of notebook.

    Raises:
        ValueError: no parameter or more than three, or an empty list of values.
    """
    axes = {k: v if isinstance(v, Axis) else Axis(tuple(v)) for k, v in params.items()}
    if not 1 <= len(axes) <= 3 or any(not a.values for a in axes.values()):
        raise ValueError("explore_grid takes one to three parameters with at least one value each")
    widest = max(len(axis.label or name) for name, axis in axes.items())
    sliders = [_slider(n, a, continuous=live is None, label_ch=widest) for n, a in axes.items()]
    combinations = list(itertools.product(*(range(len(a.values)) for a in axes.values())))
    pages: dict[tuple[int, ...], ipywidgets.HTML] = {}
    texts = _Texts(alt, caption, live is not None)
    for where in combinations:
        values = {k: a.values[i] for (k, a), i in zip(axes.items(), where, strict=True)}
        pages[where] = ipywidgets.HTML(texts.page(draw(**values), values, dpi, fresh=False))
    body = _stack(pages, sliders)
    if live is not None:
        _recompute(live, axes, sliders, pages, texts, dpi)
    head = [ipywidgets.HTML(f"<b>{html.escape(title)}</b>")] if title else []
    shown = [s.value for s in sliders]
    first = {k: a.values[i] for (k, a), i in zip(axes.items(), shown, strict=True)}
    summary = f"{title or 'Explorer'}: {len(pages)} pictures; shown: {texts.fill(first)[0]}"
    return GridExplorer([*head, *sliders, body], summary)


def _slider(name: str, axis: Axis, continuous: bool, label_ch: int) -> ipywidgets.Widget:
    start = len(axis.values) // 2 if axis.start is None else axis.start
    return ipywidgets.SelectionSlider(
        options=list(zip(axis.options(), range(len(axis.values)), strict=True)),
        value=start,
        description=axis.label or name,
        continuous_update=continuous,
        style={"description_width": f"{label_ch + 1}ch"},
        layout={"width": "100%", "max_width": "34rem"},
    )


def _stack(pages: Mapping[tuple[int, ...], Any], sliders: Sequence[Any]) -> ipywidgets.Widget:
    def linked(children: list[Any], slider: Any) -> Any:
        stack = ipywidgets.Stack(children, selected_index=slider.index)
        ipywidgets.jslink((slider, "index"), (stack, "selected_index"))
        return stack

    if len(sliders) == 1:
        return linked(list(pages.values()), sliders[0])
    groups: dict[int, dict[tuple[int, ...], Any]] = {}
    for (first, *rest), page in pages.items():
        groups.setdefault(first, {})[tuple(rest)] = page
    return linked([_stack(group, sliders[1:]) for group in groups.values()], sliders[0])


@dataclass(frozen=True)
class _Texts:
    """Alternative text and caption of one grid, filled in per picture."""

    alt: str | Callable[..., str]
    caption: str | Callable[..., str]
    can_be_fresh: bool

    def fill(self, values: Mapping[str, Any]) -> tuple[str, str]:
        """Return (alt, caption) at these values."""
        alt, caption = (
            t(**values) if callable(t) else t.format(**values) for t in (self.alt, self.caption)
        )
        return str(alt), str(caption)

    def page(self, figure: Any, values: Mapping[str, Any], dpi: int, fresh: bool) -> str:
        """Return the HTML of one picture; closes the figure."""
        alt, caption = self.fill(values)
        if self.can_be_fresh:
            source = "computed in this kernel" if fresh else "stored with the book"
            caption = f"{caption} ({source})".strip()
        return figure_html(png_bytes(figure, dpi=dpi, close=True), alt, caption, scale=dpi / 96)


def _recompute(
    live: Callable[..., Any],
    axes: Mapping[str, Axis],
    sliders: Sequence[Any],
    pages: Mapping[tuple[int, ...], Any],
    texts: _Texts,
    dpi: int,
) -> None:
    """Let a kernel replace the picture under the sliders with one computed now."""

    def moved(_change: Any) -> None:
        where = tuple(int(s.index) for s in sliders)
        values = {k: a.values[i] for (k, a), i in zip(axes.items(), where, strict=True)}
        pages[where].value = texts.page(live(**values), values, dpi, fresh=True)

    for slider in sliders:
        slider.observe(moved, names="index")
