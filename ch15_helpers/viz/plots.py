"""Figures with alternative text and captions, and the few chart forms that chapters share."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

from ch15_helpers.viz.theme import (
    BASELINE,
    DASHES,
    DPI,
    LIMIT,
    MARKERS,
    OPTIMISED,
    PALETTE,
    WIDTH_IN,
    book_style,
)


def new_figure(
    height_in: float = 3.4, columns: int = 1, rows: int = 1, **kwargs: Any
) -> tuple[Any, Any]:
    """Return ``(figure, axes)`` of the text column's width in the book's style.

    The figure belongs to no window and no pyplot state, so nothing is displayed twice and nothing
    leaks; hand it to :func:`show_figure`. ``kwargs`` go to ``Figure.subplots``.
    """
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    class BookAxes(Axes):
        """Titles and legends in the book's style, also when set after the style's context ended."""

        def set_title(self, label: str, *args: Any, **options: Any) -> Any:
            with book_style():
                return super().set_title(label, *args, **options)

        def legend(self, *args: Any, **options: Any) -> Any:
            with book_style():
                return super().legend(*args, **options)

    with book_style():
        figure = Figure(figsize=(WIDTH_IN, height_in))
        subplot = {"axes_class": BookAxes} | kwargs.pop("subplot_kw", {})
        axes = figure.subplots(rows, columns, subplot_kw=subplot, **kwargs)
    return figure, axes


def png_bytes(figure: Any, dpi: int = DPI, close: bool = False) -> bytes:
    """Render a figure to PNG with a palette of 128 colours (about a quarter of the size)."""
    from PIL import Image

    raw, packed = io.BytesIO(), io.BytesIO()
    with book_style():
        figure.savefig(raw, format="png", dpi=dpi, metadata={"Software": None})
    with Image.open(raw) as image:
        flat = image.convert("RGB").quantize(
            128, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE
        )
        flat.save(packed, format="png", optimize=True)
    if close:
        import matplotlib.pyplot as plt

        plt.close(figure)
    return packed.getvalue()


def figure_html(png: bytes, alt: str, caption: str = "", scale: float = DPI / 96) -> str:
    """Return a ``<figure>`` with the picture inline; width and height are given, so nothing jumps.

    Raises:
        ValueError: the alternative text is empty.
    """
    if not alt.strip():
        raise ValueError(
            "every picture needs alternative text: say what it shows, with the numbers"
        )
    width, height = (int.from_bytes(png[i : i + 4], "big") for i in (16, 20))
    data = base64.b64encode(png).decode("ascii")
    image = (
        f'<img src="data:image/png;base64,{data}" alt="{html.escape(alt, quote=True)}" '
        f'width="{round(width / scale)}" height="{round(height / scale)}" '
        'style="max-width:100%;height:auto">'
    )
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f'<figure class="ch15-figure">{image}{below}</figure>'


class _Shown:
    def __init__(self, markup: str, alt: str) -> None:
        self._markup, self._alt = markup, alt

    def __repr__(self) -> str:
        return f"Figure: {self._alt}"

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        return {"text/html": self._markup, "text/plain": repr(self)}


def show_figure(figure: Any, alt: str, caption: str = "", dpi: int = DPI) -> None:
    """Display a matplotlib figure with alternative text and a caption; works in page, Lab and file.

    ``alt`` says what a reader would see, numbers included; ``caption`` says what to conclude.
    nbval compares the text but not the pixels. Put measured numbers into ``alt`` only in cells
    tagged ``nbval-ignore-output``.
    """
    from IPython.display import display

    markup = figure_html(png_bytes(figure, dpi=dpi, close=True), alt, caption, scale=dpi / 96)
    display(_Shown(markup, alt))


def line_chart(
    x: Sequence[float],
    series: Mapping[str, Sequence[float]],
    *,
    x_label: str,
    y_label: str,
    title: str = "",
    log_x: bool = False,
    log_y: bool = False,
    limit: tuple[str, float] | None = None,
    height_in: float = 3.4,
) -> Any:
    """Return a figure with one line per series over a shared x; ``limit`` adds a dashed ceiling."""
    figure, ax = new_figure(height_in)
    for i, (name, ys) in enumerate(series.items()):
        ax.plot(
            x, ys, label=name, color=PALETTE[i % 7], marker=MARKERS[i % 7], linestyle=DASHES[i % 7]
        )
    if limit is not None:
        ax.axhline(limit[1], color=LIMIT, linestyle="--", linewidth=1.5, label=limit[0])
    if log_x:
        ax.set_xscale("log", base=2)
        ax.set_xticks(list(x), [f"{v:g}" for v in x])
        ax.minorticks_off()
    if log_y:
        ax.set_yscale("log")
    elif min((min(ys) for ys in series.values()), default=0) >= 0:
        ax.set_ylim(bottom=0)
    ax.set(xlabel=x_label, ylabel=y_label, title=title)
    if len(series) > 1 or limit is not None:
        ax.legend()
    return figure


def before_after(
    rows: Mapping[str, tuple[float, float]],
    *,
    unit: str,
    title: str = "",
    names: tuple[str, str] = ("baseline", "optimised"),
) -> Any:
    """Return paired horizontal bars, ``{label: (baseline, optimised)}``, each with its number."""
    figure, ax = new_figure(0.9 + 0.62 * len(rows))
    labels = list(rows)
    for offset, which, colour in ((0.19, 0, BASELINE), (-0.19, 1, OPTIMISED)):
        values = [rows[label][which] for label in labels]
        places = [len(labels) - 1 - i + offset for i in range(len(labels))]
        bars = ax.barh(places, values, height=0.34, color=colour, label=names[which])
        ax.bar_label(bars, labels=[f"{v:,.3g}" for v in values], padding=4, fontsize=9)
    ax.set_yticks([len(labels) - 1 - i for i in range(len(labels))], labels)
    ax.grid(axis="y", visible=False)
    ax.margins(x=0.14)
    ax.set(xlabel=unit, title=title)
    figure.legend(loc="outside upper left", ncols=2, frameon=False)
    return figure


def breakdown(rows: Mapping[str, Mapping[str, float]], *, unit: str, title: str = "") -> Any:
    """Return stacked horizontal bars, ``{version: {cause: amount}}``: where time or bytes went."""
    figure, ax = new_figure(1.2 + 0.5 * len(rows))
    causes = list(dict.fromkeys(cause for parts in rows.values() for cause in parts))
    places = [len(rows) - 1 - i for i in range(len(rows))]
    left = [0.0] * len(rows)
    hatches = ("", "//", "..", "\\\\", "xx", "--", "oo")
    for i, cause in enumerate(causes):
        amounts = [parts.get(cause, 0.0) for parts in rows.values()]
        ax.barh(places, amounts, 0.6, left=left, label=cause, color=PALETTE[i % 7],
                hatch=hatches[i % 7], edgecolor="white", linewidth=0.6)  # fmt: skip
        left = [a + b for a, b in zip(left, amounts, strict=True)]
    for place, total in zip(places, left, strict=True):
        ax.annotate(
            f"{total:,.3g}", (total, place), (5, -3), textcoords="offset points", fontsize=9
        )
    ax.set_yticks(places, list(rows))
    ax.grid(axis="y", visible=False)
    ax.margins(x=0.12)
    ax.set(xlabel=unit, title=title)
    figure.legend(loc="outside upper left", ncols=min(4, len(causes)), frameon=False)
    return figure


def roofline_chart(
    points: Mapping[str, tuple[float, float]],
    *,
    bandwidth_GBps: float,
    peak_tflops: float,
    title: str = "",
) -> Any:
    """Return a roofline: ``{label: (flops per byte, achieved TFLOP/s)}`` under the measured roof.

    Williams, Waterman and Patterson, "Roofline", CACM 2009. The roof is
    ``min(peak, intensity × bandwidth)``, from ceilings measured on this machine.
    """
    figure, ax = new_figure(3.8)
    knee = peak_tflops * 1e3 / bandwidth_GBps
    lows = [i for i, _ in points.values()] or [knee]
    left, right = min(*lows, knee) / 4, max(*lows, knee) * 8
    ax.plot([left, knee, right], [left * bandwidth_GBps / 1e3, peak_tflops, peak_tflops],
            color=LIMIT, label="measured roof")  # fmt: skip
    for i, (name, (intensity, achieved)) in enumerate(points.items()):
        ax.plot(
            [intensity], [achieved], MARKERS[i % 7], color=PALETTE[i % 7], markersize=8, label=name
        )
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set(xlabel="arithmetic intensity (FLOP per byte)", ylabel="TFLOP/s", title=title)
    ax.legend(loc="lower right")
    return figure
