"""The life of each request of a run as a line: waiting, prompt, output, and the stalls in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ch15_helpers.serving.runs import ServingRun
from ch15_helpers.viz.plots import new_figure
from ch15_helpers.viz.theme import BLUE, GREY, INK, ORANGE


@dataclass(frozen=True)
class RequestSpans:
    """When one request arrived, was first worked on, gave its first and its last token [s].

    Attributes:
        stalls_s: (begin, end) of each gap between two tokens that is longer than was asked for.
    """

    arrival_s: float
    started_s: float
    first_token_s: float
    end_s: float
    stalls_s: tuple[tuple[float, float], ...] = ()


def request_spans(run: ServingRun, stall_s: float = float("inf")) -> list[RequestSpans]:
    """Spans of the requests that completed, in order of arrival.

    Args:
        stall_s: gaps between tokens above this are listed as stalls.
    """
    found = []
    for output, arrival_s in zip(run.outputs, run.arrivals_s, strict=True):
        m = output.metrics
        if output.finish_reason not in ("stop", "length") or m.ttft_s is None or m.e2e_s is None:
            continue
        at_s, stalls = arrival_s + m.ttft_s, []
        for gap_s in m.itl_s:
            if gap_s > stall_s:
                stalls.append((at_s, at_s + gap_s))
            at_s += gap_s
        found.append(
            RequestSpans(
                arrival_s=arrival_s,
                started_s=arrival_s + (m.queue_s or 0.0),
                first_token_s=arrival_s + m.ttft_s,
                end_s=arrival_s + m.e2e_s,
                stalls_s=tuple(stalls),
            )
        )
    return found


def timeline(
    runs: Mapping[str, ServingRun],
    *,
    num_requests: int = 40,
    stall_s: float = float("inf"),
    title: str = "",
    height_in: float | None = None,
) -> Any:
    """Return a figure with one panel for each run over a shared time axis, a line per request.

    Waiting is thin and grey, the prompt thick and orange, the output blue; stalls are dark ticks
    over it. ``title`` is put before the panel's name.

    Args:
        runs: by name, of the same workload.
        num_requests: the first ones are drawn.
        stall_s: see ``request_spans``.

    Raises:
        ValueError: no runs.
    """
    if not runs:
        raise ValueError("runs is empty; a timeline needs at least one run")
    height_in = height_in or 0.9 + len(runs) * (0.6 + 0.035 * num_requests)
    figure, axes = new_figure(height_in, rows=len(runs), sharex=True, squeeze=False)
    for ax, (name, run) in zip(axes[:, 0], runs.items(), strict=True):
        _panel(ax, request_spans(run, stall_s)[:num_requests], height_in / len(runs))
        kind = "" if run.kind == "measured" else " (modelled)"
        ax.set_title(f"{title}{': ' if title else ''}{name}{kind}")
        ax.set_ylabel("request")
    axes[-1, 0].set_xlabel("time since the start [s]")
    labelled = [ax.get_legend_handles_labels() for ax in axes[:, 0]]
    handles = {name: h for hs, names in labelled for h, name in zip(hs, names, strict=True)}
    figure.legend(
        handles.values(), handles, loc="outside upper right", ncols=4, frameon=False, fontsize=8
    )
    return figure


def _panel(ax: Any, spans: list[RequestSpans], height_in: float) -> None:
    rows = list(range(len(spans)))
    pitch = 60 * height_in / max(8, len(spans))  # points from one line to the next, about
    parts = (
        ("waiting", [s.arrival_s for s in spans], [s.started_s for s in spans], GREY, 0.3),
        ("prompt", [s.started_s for s in spans], [s.first_token_s for s in spans], ORANGE, 0.85),
        ("output", [s.first_token_s for s in spans], [s.end_s for s in spans], BLUE, 0.6),
    )
    for label, begin, end, colour, share in parts:
        ax.hlines(rows, begin, end, colors=colour, linewidth=share * pitch, label=label)
    stalls = [(row, pair) for row, s in zip(rows, spans, strict=True) for pair in s.stalls_s]
    if stalls:
        at, pairs = [row for row, _ in stalls], [pair for _, pair in stalls]
        begins, ends = zip(*pairs, strict=True)
        ax.hlines(at, begins, ends, colors=INK, linewidth=0.25 * pitch, label="stall")
    ax.set_ylim(len(spans) - 0.3, -0.7)
    ax.set_xlim(left=0)
    ax.grid(axis="y", visible=False)
