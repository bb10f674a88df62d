"""Figures and explorers of the book. Only notebooks import it: it needs matplotlib and widgets."""

from ch15_helpers.viz.explore import Axis, Curve, Readout, Slider, explore_formula, explore_grid
from ch15_helpers.viz.plots import (
    before_after,
    breakdown,
    line_chart,
    new_figure,
    roofline_chart,
    show_figure,
)
from ch15_helpers.viz.step_trace import step_strips
from ch15_helpers.viz.timeline import RequestSpans, request_spans, timeline

__all__ = [
    "Axis",
    "Curve",
    "Readout",
    "RequestSpans",
    "Slider",
    "before_after",
    "breakdown",
    "explore_formula",
    "explore_grid",
    "line_chart",
    "new_figure",
    "request_spans",
    "roofline_chart",
    "show_figure",
    "step_strips",
    "timeline",
]
