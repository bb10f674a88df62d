"""Figures carry alternative text and stay small; grids hold a picture for every combination."""

from __future__ import annotations

import re
from typing import Any

import matplotlib as mpl
import pytest

from ch15_helpers.viz import (
    Axis,
    before_after,
    breakdown,
    explore_grid,
    line_chart,
    new_figure,
    roofline_chart,
    show_figure,
)
from ch15_helpers.viz.plots import figure_html, png_bytes


def chart(**_: Any) -> Any:
    """A small line chart."""
    return line_chart([1, 2, 4], {"a": [1, 2, 3], "b": [3, 2, 1]}, x_label="x", y_label="y")


def pictures(grid: Any) -> list[Any]:
    """The picture widgets of a grid with two sliders, row by row."""
    return [page for row in grid.children[-1].children for page in row.children]


def test_a_figure_needs_alt_text() -> None:
    with pytest.raises(ValueError, match="alternative text"):
        figure_html(png_bytes(chart()), alt="  ")


def test_markup_of_a_figure(capsys: pytest.CaptureFixture[str]) -> None:
    markup = figure_html(png_bytes(chart(), dpi=96), 'a "quoted" <alt>', "caption & more", scale=1)
    assert 'alt="a &quot;quoted&quot; &lt;alt&gt;"' in markup
    assert "<figcaption>caption &amp; more</figcaption>" in markup
    size = re.search(r'width="(\d+)" height="(\d+)"', markup)
    assert size is not None
    assert (int(size[1]), int(size[2])) == (576, 326)
    show_figure(chart(), alt="three points", caption="c")
    assert "Figure: three points" in capsys.readouterr().out


def test_pictures_are_small_and_repeatable() -> None:
    first, second = png_bytes(chart()), png_bytes(chart())
    assert first == second
    assert len(first) < 40_000


def test_the_readers_matplotlib_is_left_alone() -> None:
    before = dict(mpl.rcParams)
    png_bytes(chart(), close=True)
    figure, _ = new_figure()
    assert dict(mpl.rcParams) == before
    assert figure.axes[0].get_facecolor() == (1.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    "figure",
    [
        lambda: before_after({"TPOT": (55, 8), "TTFT": (120, 118)}, unit="ms", title="t"),
        lambda: breakdown({"old": {"a": 3.0, "b": 1.0}, "new": {"a": 1.0}}, unit="ms"),
        lambda: roofline_chart({"decode": (1.0, 0.02)}, bandwidth_GBps=20, peak_tflops=0.1),
        lambda: line_chart(
            [1, 2], {"a": [1, 2]}, x_label="", y_label="", log_x=True, log_y=True, limit=("l", 2)
        ),
    ],
)
def test_every_chart_form_draws(figure: Any) -> None:
    assert png_bytes(figure()).startswith(b"\x89PNG")


def test_grid_has_every_combination() -> None:
    seen: list[tuple[int, int]] = []

    def draw(batch: int, context: int) -> Any:
        seen.append((batch, context))
        return chart()

    grid = explore_grid(
        draw,
        {"batch": [1, 4], "context": Axis([128, 512, 2048], "Context", "tokens")},
        alt="batch {batch}, context {context}",
        caption=lambda batch, context: f"{batch * context} tokens",
    )
    assert seen == [(b, c) for b in (1, 4) for c in (128, 512, 2048)]
    assert [re.search(r'alt="([^"]+)"', p.value)[1] for p in pictures(grid)] == [
        f"batch {b}, context {c}" for b, c in seen
    ]
    assert "2048 tokens" in pictures(grid)[5 - 3].value
    assert "base64" not in repr(grid)


def test_live_grid_recomputes_where_the_sliders_are() -> None:
    calls: list[dict[str, int]] = []

    def live(**values: int) -> Any:
        calls.append(values)
        return chart()

    params = {"batch": [1, 4], "context": [128, 512]}
    grid = explore_grid(chart, params, alt="b {batch} c {context}", live=live)
    batch, context = grid.children[0], grid.children[1]
    batch.index = 0
    context.index = 0
    assert calls[-1] == {"batch": 1, "context": 128}
    shown = pictures(grid)
    assert "computed in this kernel" in shown[0].value
    assert "stored with the book" in shown[3].value


def test_grid_of_three_parameters_nests_in_their_order() -> None:
    picture = chart()
    params = {"a": [1, 2], "b": [3, 4, 5], "c": [6, 7]}
    grid = explore_grid(lambda **_: picture, params, alt="{a} {b} {c}, and some more words")
    shown = [
        re.search(r'alt="(\d \d \d),', page.value)[1]
        for plane in grid.children[-1].children
        for row in plane.children
        for page in row.children
    ]
    assert shown == [f"{a} {b} {c}" for a in (1, 2) for b in (3, 4, 5) for c in (6, 7)]


@pytest.mark.parametrize("params", [{}, {key: [1] for key in "abcd"}, {"a": []}])
def test_grid_takes_one_to_three_parameters(params: Any) -> None:
    with pytest.raises(ValueError, match="one to three"):
        explore_grid(chart, params, alt="x")
