"""Tables for the terminal: targets, and what a run measured against what was expected."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ch15_helpers.bench.expectations import Comparison
from ch15_helpers.bench.formatting import format_value
from ch15_helpers.bench.runs import Outcome, Run
from ch15_helpers.bench.schema import TargetResult
from ch15_helpers.bench.targets import Target

COLOURS = {
    "ok": "green",
    "improved": "cyan",
    "new": "yellow",
    "missing": "red",
    "regressed": "bold red",
    "failed": "bold red",
}
PLAIN_WIDTH = 140


def console() -> Console:
    """Standard output; wide where it is not a terminal, so that a log keeps whole lines."""
    return Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)


def targets_table(targets: Mapping[str, Target]) -> Table:
    table = Table(title="Targets (run with: ch15 run --targets ch15:NAME)")
    for column in ("name", "chapter", "needs", "what it compares"):
        table.add_column(column)
    for target in targets.values():
        table.add_row(target.name, target.chapter, target.needs, escape(target.summary))
    return table


def run_table(run: Run, *, updated: bool = False) -> Table:
    """One row for each timed pair: both medians, speed-up with interval, share of the limit."""
    title = "Verdicts against the expectations before this update" if updated else run.command
    table = Table(title=escape(title))
    for column in ("target", "hardware"):
        table.add_column(column)
    for column in ("baseline", "optimised", "speed-up", "of the limit"):
        table.add_column(column, justify="right")
    table.add_column("verdict")
    for outcome in run.outcomes:
        verdict = f"[{COLOURS[outcome.verdict]}]{outcome.verdict}[/]"
        if outcome.result is None:
            table.add_row(outcome.target, "–", "–", "–", "–", "–", verdict)
            continue
        for number, prefix in enumerate(_pairs(outcome.result)):
            label = outcome.target if not prefix else f"{outcome.target} ({prefix.rstrip('_')})"
            cells = _pair_cells(outcome.result, prefix)
            table.add_row(label, outcome.result.key, *cells, verdict if number == 0 else "")
    return table


def print_run(run: Run, to: Console, *, updated: bool = False) -> None:
    """The table, then every metric that is not simply ok, every failure, every note."""
    to.print(run_table(run, updated=updated))
    for outcome in run.outcomes:
        for line in _remarks(outcome):
            to.print(f"  {outcome.target}: {line}", soft_wrap=True)
    to.print(f"results: {escape(str(run.directory))}", soft_wrap=True)


def _remarks(outcome: Outcome) -> Iterable[str]:
    if outcome.error:
        yield f"[red]{escape(outcome.error)}[/]"
    new = [c for c in outcome.comparisons if c.verdict == "new"]
    for reason in dict.fromkeys(c.reason for c in new):
        names = [c.name for c in new if c.reason == reason]
        yield f"[yellow]new[/] {', '.join(names)}: {escape(reason)}"
    for comparison in outcome.comparisons:
        if comparison.verdict in ("regressed", "missing", "improved"):
            yield _change_line(comparison)
    for note in outcome.notes:
        yield escape(note)


def _change_line(c: Comparison) -> str:
    now = format_value(c.measured) if c.measured else "not recorded"
    was = format_value(c.expected) if c.expected else "nothing"
    colour = COLOURS[c.verdict]
    return f"[{colour}]{c.verdict}[/] {c.name}: {escape(now)}, expected {escape(was)} ({c.reason})"


def _pairs(result: TargetResult) -> list[str]:
    """Name prefixes of the timed pairs; one empty prefix where there is none."""
    suffix = "baseline_s"
    found = [m.name.removesuffix(suffix) for m in result.metrics if m.name.endswith(suffix)]
    return found or [""]


def _pair_cells(result: TargetResult, prefix: str) -> list[str]:
    cells = []
    for name in ("baseline_s", "optimised_s", "speedup", "fraction_of_limit"):
        metric = result.metric(prefix + name)
        cells.append("–" if metric is None else format_value(metric))
    timing = result.timings.get(prefix.rstrip("_") or "pair")
    if timing and cells[2] != "–":
        cells[2] += f" ({timing['speedup_low']:.3g}–{timing['speedup_high']:.3g})"
    return cells
