"""The strip of one step: what ran when, on one line of time for each trace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ch15_helpers.bench.step_profile import GAPS, KINDS, OTHER, StepTrace
from ch15_helpers.viz.plots import new_figure
from ch15_helpers.viz.theme import GREY, PALETTE


def step_strips(traces: Mapping[str, StepTrace]) -> Any:
    """Return a figure with one strip for each trace, coloured by kind of work; white is a gap.

    Each strip has its own time axis, because a prefill is many times longer than a decode.

    Raises:
        ValueError: no traces.
    """
    if not traces:
        raise ValueError("traces is empty; the figure needs at least one step")
    figure, axes = new_figure(0.9 + 0.95 * len(traces), rows=len(traces), squeeze=False)
    colours = dict(zip([kind for kind, _ in KINDS], PALETTE, strict=False)) | {OTHER: GREY}
    handles: dict[str, Any] = {}
    for ax, (name, trace) in zip(axes[:, 0], traces.items(), strict=True):
        for kind, colour in colours.items():
            spans = [(s.start_s * 1e3, s.duration_s * 1e3) for s in trace.spans if s.kind == kind]
            if spans:
                bars = ax.broken_barh(spans, (0, 1), facecolors=colour, linewidth=0)
                handles.setdefault(kind, bars)
        busy = 1 - trace.by_kind()[GAPS] / trace.wall_s
        what = "kernels and copies" if trace.device_type == "cuda" else "operators"
        ax.set_title(f"{name}: {len(trace.spans)} {what}, {busy:.0%} of the time busy")
        ax.set_yticks([])
        ax.set_xlim(0, trace.wall_s * 1e3)
        ax.grid(visible=False)
    axes[-1, 0].set_xlabel("time since the step's first start [ms]")
    figure.legend(
        handles.values(), handles, loc="outside upper left", ncols=3, frameon=False, fontsize=8
    )
    return figure
