"""Colours and matplotlib style shared by every figure and widget of the book.

Figures are drawn on white and never on a transparent card. The site inverts lightness (not hue) in
its dark mode, so a curve that a caption calls blue is blue in both. Colours follow Okabe and Ito's
palette, which stays distinct for the common kinds of colour blindness; series also differ in marker
or dash, never in colour alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

BLUE: Final = "#0072b2"
ORANGE: Final = "#d55e00"
GREEN: Final = "#009e73"
PURPLE: Final = "#a35a87"
AMBER: Final = "#c78500"
SKY: Final = "#3a9bd1"
GREY: Final = "#6b7280"
INK: Final = "#1f2430"

PALETTE: Final[tuple[str, ...]] = (BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY, GREY)
MARKERS: Final[tuple[str, ...]] = ("o", "s", "^", "D", "v", "P", "X")
DASHES: Final[tuple[str, ...]] = ("-", "--", "-.", ":", "-", "--", "-.")

BASELINE: Final = GREY
"""Colour of the baseline in every before/after figure."""
OPTIMISED: Final = BLUE
"""Colour of the optimised version in every before/after figure."""
LIMIT: Final = INK
"""Colour of a physical limit (bandwidth, capacity, budget)."""

WIDTH_IN: Final = 6.0
"""Width of a full-column figure in inches; ``DPI`` gives twice the text column's pixels."""
DPI: Final = 180


def style() -> dict[str, Any]:
    """Return matplotlib's rc parameters of the book, for ``matplotlib.rc_context``."""
    from cycler import cycler

    return {
        "figure.figsize": (WIDTH_IN, 3.6),
        "figure.dpi": 100,
        "figure.facecolor": "white",
        "figure.constrained_layout.use": True,
        "axes.facecolor": "white",
        "axes.edgecolor": "#9aa1ad",
        "axes.labelcolor": INK,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelsize": 10.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.prop_cycle": cycler(color=list(PALETTE)),
        "grid.color": "#e3e6eb",
        "grid.linewidth": 0.8,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "xtick.labelsize": 9,
        "ytick.labelsize": 9,
        "legend.frameon": False,
        "legend.fontsize": 9.5,
        "lines.linewidth": 2.0,
        "lines.markersize": 5.5,
        "font.family": ["DejaVu Sans"],
        "font.size": 10.5,
        "savefig.facecolor": "white",
    }


@contextmanager
def book_style() -> Iterator[None]:
    """Draw in the book's style inside a ``with`` block; the reader's own settings come back."""
    import matplotlib as mpl

    with mpl.rc_context(style()):
        yield
