"""Formulas in the page equal those in Python, for every explorer of the book and for odd cases."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import javascript
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ch15_helpers.viz import Curve, Readout, Slider, explore_formula
from ch15_helpers.viz.formula import format_number

BOOK = Path(__file__).parent.parent / "book"
STATE = "application/vnd.jupyter.widget-state+json"
KV = {
    "py": lambda p: p.batch * p.context * 23040 / 2**30,
    "js": "p.batch * p.context * 23040 / 2**30",
}


def explorer(**changes: Any) -> Any:
    """One explorer with a line, a limit and a verdict."""
    left = {"py": lambda p: p.memory - KV["py"](p), "js": f"p.memory - {KV['js']}"}
    spec = {
        "title": "KV cache",
        "sliders": [
            Slider("batch", 1, 256, value=16, log=True, label="Batch", unit="requests"),
            Slider("context", 128, 8192, value=2048, log=True, label="Context", unit="tokens"),
            Slider("memory", 1, 80, value=8, label="Memory", unit="GiB"),
        ],
        "x": "context",
        "curves": [Curve("kv", "KV cache", **KV)],
        "readouts": [
            Readout("left", "Left", unit="GiB", **left),
            Readout("fits", "Fits", words=((-1e99, "no"), (0, "yes")), **left),
        ],
    }
    return explore_formula(**(spec | changes))


def stored_explorers() -> list[Any]:
    """(notebook and title, spec, Python's numbers) of every explorer stored in the book."""
    found = []
    for path in sorted(BOOK.glob("*.ipynb")):
        widgets = json.loads(path.read_text(encoding="utf-8"))["metadata"].get("widgets", {})
        for model in widgets.get(STATE, {}).get("state", {}).values():
            state = model["state"]
            if "spec" in state and "checks" in state:
                name = f"{path.stem}: {state['spec']['title']}"
                found.append(pytest.param(state["spec"], state["checks"], id=name))
    return found


def test_javascript_equals_python_on_a_grid() -> None:
    widget = explorer()
    grid = [[point, widget.evaluate(point)] for point in widget.grid(points_per_slider=7)]
    assert len(grid) == 7**3
    assert javascript.call("disagreement", widget.spec, grid) is None


@pytest.mark.parametrize(("spec", "checks"), stored_explorers())
def test_stored_explorers_agree_with_python(spec: Any, checks: Any) -> None:
    assert len(checks) >= 2
    assert javascript.call("disagreement", spec, checks) is None


def test_a_wrong_formula_is_found() -> None:
    widget = explorer(curves=[Curve("kv", "KV cache", py=KV["py"], js=KV["js"] + " * 1.001")])
    fault = javascript.call("disagreement", widget.spec, widget.checks)
    assert fault is not None
    assert fault["name"] == "kv"


def test_infinities_agree() -> None:
    curve = Curve(
        "kv", "x", py=lambda p: math.inf if p.batch > 1 else 1.0, js="p.batch > 1 ? 1/0 : 1"
    )
    widget = explorer(curves=[curve])
    assert javascript.call("disagreement", widget.spec, widget.checks) is None


def test_math_functions_are_in_scope() -> None:
    js = "ceil(p.batch / 3) + log2(p.context) + max(1, min(2, sqrt(p.memory)))"

    def py(p: Any) -> float:
        return math.ceil(p.batch / 3) + math.log2(p.context) + max(1, min(2, math.sqrt(p.memory)))

    widget = explorer(curves=[Curve("kv", "x", py=py, js=js)])
    assert javascript.call("disagreement", widget.spec, widget.checks) is None


@pytest.mark.parametrize("value", [0, 1, 0.5, 12.345, 1234.5, 8192, 0.000012, -3.7, 1e16, 999.96])
def test_numbers_are_printed_alike(value: float) -> None:
    here, there = format_number(value), javascript.call("format", value, 3)
    assert here.replace("e-0", "e-") == there.replace("e+", "e+")


@given(low=st.integers(1, 1000), span=st.integers(1, 10**6), log=st.booleans(), at=st.floats(0, 1))
def test_slider_positions(low: int, span: int, log: bool, at: float) -> None:
    high = low + span
    value = round(low + at * span)
    slider = Slider("x", low, high, value=value, log=log, step=None if log else max(1, span // 50))
    positions = slider.positions()
    assert positions == sorted(set(positions))
    assert (positions[0], positions[-1]) == (low, high)
    assert positions[slider.start()] == value
    assert len(positions) < 200


def test_powers_of_two_on_a_log_slider() -> None:
    assert Slider("b", 1, 16, log=True).positions() == [1, 2, 3, 4, 6, 8, 12, 16]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Slider("not a name", 0, 1), "identifier"),
        (lambda: Slider("x", 2, 2), "below"),
        (lambda: Slider("x", 0, 8, log=True), "low > 0"),
        (lambda: explorer(x="nope"), "names no slider"),
        (lambda: explorer(curves=[Curve("batch", "x", **KV)]), "used twice"),
    ],
)
def test_mistakes_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_text_for_readers_without_a_browser() -> None:
    text = explorer()._repr_mimebundle_()[0]["text/plain"]
    assert text == (
        "KV cache: at Batch 16 requests, Context 2,048 tokens, Memory 8 GiB: Left 7.3 GiB; Fits yes"
    )


def test_kernel_follows_the_sliders() -> None:
    widget = explorer()
    widget.values = {"batch": 256, "context": 8192, "memory": 8}
    assert widget.evaluate()["left"] == pytest.approx(8 - 45)
