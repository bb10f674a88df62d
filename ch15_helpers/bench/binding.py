"""Numbers in prose, bound to stored expectations: no chapter types a measured number.

Every function takes a hardware key; by default it is this machine's where something is stored
for it, else ``cpu``. Text that a reader sees names the key it shows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ch15_helpers.bench.expectations import (
    Expectations,
    TargetExpectation,
    load_all,
    load_key,
)
from ch15_helpers.bench.formatting import format_value
from ch15_helpers.bench.paths import expectations_dir
from ch15_helpers.bench.schema import Metric, Value
from ch15_helpers.errors import ExpectationsError

if TYPE_CHECKING:
    from IPython.display import Markdown


def recorded(target: str, metric: str, key: str | None = None) -> Value:
    """The stored value of one metric, for arithmetic and for numbers in prose.

    Raises:
        ExpectationsError: nothing is stored under that key, target or name; lists what is.
    """
    return recorded_metric(target, metric, key).value


def recorded_metric(target: str, metric: str, key: str | None = None) -> Metric:
    """The stored metric with its unit, tolerance and direction; raises as ``recorded``."""
    key = key or key_to_show(target)
    _, entry = _find(target, key)
    if entry is None:
        raise ExpectationsError(_nothing_stored(target, key))
    by_name = {m.name: m for m in entry.metrics}
    if metric not in by_name:
        raise ExpectationsError(
            f"no metric {metric!r} is stored for {target} on {key}; stored: {', '.join(by_name)}"
        )
    return by_name[metric]


def bound_text(template: str, target: str, key: str | None = None) -> Markdown:
    """Markdown with stored metrics in place of ``{name}``: formatted with unit, e.g. ``2.31×``.

    Where nothing is stored yet, a placeholder says so, so that a first run can store it.

    Raises:
        ExpectationsError: the target is stored, but not a metric that the text names.
    """
    from IPython.display import Markdown

    key = key or key_to_show(target)
    _, entry = _find(target, key)
    if entry is None:
        return Markdown(f"*{_nothing_stored(target, key)}*")
    values = {m.name: format_value(m) for m in entry.metrics}
    try:
        return Markdown(template.format_map({**values, "key": key}))
    except KeyError as error:
        raise ExpectationsError(
            f"the text names {error.args[0]!r}, which is not stored for {target} on {key}; "
            f"stored: {', '.join(values)}"
        ) from None


def what_you_should_see(target: str, key: str | None = None) -> Markdown:
    """Table of a target's stored metrics, their kind and what still counts as the same."""
    from IPython.display import Markdown

    key = key or key_to_show(target)
    stored, entry = _find(target, key)
    if stored is None or entry is None:
        return Markdown(f"*{_nothing_stored(target, key)}*")
    rows = [
        f"| {_label(m)} | {format_value(m)} | {m.kind} | {_allowance(m, key)} |"
        for m in entry.metrics
    ]
    p = entry.provenance
    return Markdown(
        f"Recorded on `{key}` ({stored.hardware['name']}), {p.time[:10]}, "
        f"{p.sample_count} timed rounds, commit `{p.commit[:12]}`.\n\n"
        "| metric | value | kind | counts as the same |\n| --- | ---: | --- | --- |\n"
        + "\n".join(rows)
    )


def on_other_hardware(target: str) -> Markdown:
    """Table with one column for every stored hardware key, one row for each metric."""
    from IPython.display import Markdown

    everything = load_all(expectations_dir())
    columns = {k: e for k, e in everything.items() if target in e.targets}
    if not columns:
        return Markdown(f"*{_nothing_stored(target, 'cpu')}*")
    metrics = {k: {m.name: m for m in e.targets[target].metrics} for k, e in columns.items()}
    names = list(dict.fromkeys(name for by_name in metrics.values() for name in by_name))
    lines = [
        f"| metric | {' | '.join(f'`{k}`' for k in columns)} |",
        f"| --- |{' ---: |' * len(columns)}",
        f"| hardware | {' | '.join(str(e.hardware['name']) for e in columns.values())} |",
        f"| read bandwidth | {' | '.join(_read(e) for e in columns.values())} |",
    ]
    parameters = {k: e.targets[target].provenance.parameters for k, e in columns.items()}
    for name in _differing(list(parameters.values())):
        cells = [str(p.get(name, "–")) for p in parameters.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for name in names:
        cells = [format_value(m[name]) if name in m else "–" for m in metrics.values()]
        label = _label(next(m[name] for m in metrics.values() if name in m))
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return Markdown("\n".join(lines))


def key_to_show(target: str) -> str:
    """This machine's hardware key if the target is stored for it, else ``cpu``."""
    from ch15_helpers.hardware import hardware_key

    key = hardware_key("auto")
    _, entry = _find(target, key)
    return key if entry is not None else "cpu"


def _find(target: str, key: str) -> tuple[Expectations | None, TargetExpectation | None]:
    stored = load_key(expectations_dir(), key)
    return stored, None if stored is None else stored.targets.get(target)


def _nothing_stored(target: str, key: str) -> str:
    return (
        f"No expectation is stored for {target} on {key}. "
        f"`ch15 run --targets ch15:{target} --update-expectations` records one."
    )


def _label(m: Metric) -> str:
    """``optimised_s`` → ``optimised``: the value shows its unit."""
    return m.name.removesuffix("_s").replace("_", " ")


def _allowance(m: Metric, key: str) -> str:
    if m.kind == "exact":
        return "equal"
    if m.kind == "modelled":
        return "equal to 1e-6"
    if not m.is_ratio and key == "cpu":
        return "not compared (absolute, on a CPU)"
    worse = "less" if m.direction == "higher" else "more"
    return f"not {m.tolerance:.0%} {worse}"


def _read(e: Expectations) -> str:
    return f"{e.hardware['ceilings']['read_GBps']:,.4g} GB/s"


def _differing(parameters: list[Any]) -> list[str]:
    """Parameters that are not the same on all hardware, without those that do not matter."""
    from ch15_helpers.bench.expectations import INCOMPARABLE_EXEMPT

    names = sorted({name for p in parameters for name in p if name not in INCOMPARABLE_EXEMPT})
    return [n for n in names if any(p.get(n) != parameters[0].get(n) for p in parameters)]
