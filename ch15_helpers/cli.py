"""``ch15``: list-targets, run, compare, validate.

Exit status: 0 all is well; 1 a notebook failed, a result regressed or a bound was exceeded;
2 the request itself is wrong (unknown name, a flag that a chapter cannot honour, a device that
is not here, a malformed expectations file).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ch15_helpers.errors import Ch15Error, NotebookError

if TYPE_CHECKING:
    from ch15_helpers.bench.runs import Run, RunOptions
    from ch15_helpers.bench.targets import Target

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Run the book's chapters headlessly and compare them with stored expectations.",
)

Profile = Annotated[
    str,
    typer.Option(help="none (times only), minimal (torch.profiler) or deep_dive (Nsight)."),
]
Iterations = Annotated[
    int | None, typer.Option(help="Timed rounds; default: the chapter's.", show_default=False)
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Model = Annotated[
    str | None,
    typer.Option(
        help="smollm2, a Hugging Face folder, a .gguf file or random:PRESET.", show_default=False
    ),
]


@app.command("list-targets")
def list_targets() -> None:
    """List the targets: name, chapter, needs, and what each compares."""
    from ch15_helpers.bench.report import console, targets_table

    with _errors():
        console().print(targets_table(_available()))


@app.command("run")
def run_command(
    targets: Annotated[str, typer.Option(help="ch15 for all, or ch15:NAME[,NAME].")],
    profile: Profile = "none",
    iterations: Iterations = None,
    device: Device = "auto",
    model: Model = None,
    simulate_network: Annotated[
        bool, typer.Option("--simulate-network", help="Model the network instead of using it.")
    ] = False,
    ncu_replay_mode: Annotated[
        str | None,
        typer.Option(
            help="Nsight Compute's replay, kernel or application (with deep_dive).",
            show_default=False,
        ),
    ] = None,
    update_expectations: Annotated[
        bool,
        typer.Option("--update-expectations", help="Store the results as the new expectations."),
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; default runs/<time>.")
    ] = None,
) -> None:
    """Execute targets' notebooks and judge what they recorded."""
    with _errors():
        from ch15_helpers.bench.runs import RunOptions
        from ch15_helpers.bench.targets import select

        options = RunOptions(
            profile=profile,
            iterations=iterations,
            device=device,
            model=model,
            simulate_network=simulate_network,
            ncu_replay_mode=ncu_replay_mode,
        )
        finished = _execute(select(targets, _available()), options, out)
        _report(finished, update=update_expectations)


@app.command("compare")
def compare_command(
    examples: Annotated[
        list[str] | None, typer.Option(help="Targets; default all.", show_default=False)
    ] = None,
    more: Annotated[
        list[str] | None, typer.Argument(metavar="NAME...", help="More targets.")
    ] = None,
    profile: Profile = "none",
    from_dir: Annotated[
        Path | None,
        typer.Option("--from", help="Show a stored run instead of making a new one."),
    ] = None,
) -> None:
    """Show baseline against optimised, from a new run or from a stored one."""
    with _errors():
        import dataclasses

        from ch15_helpers.bench.runs import RunOptions, load_run
        from ch15_helpers.bench.targets import find

        names = list(dict.fromkeys([*(examples or []), *(more or [])]))
        if from_dir is None:
            available = _available()
            chosen = [find(n, available) for n in names] or list(available.values())
            finished = _execute(chosen, RunOptions(profile=profile), None)
        else:
            if profile != "none":
                raise typer.BadParameter("--profile applies to a new run, not to --from")
            try:
                finished = load_run(from_dir)
            except NotebookError as error:
                raise typer.BadParameter(str(error)) from error
            have = {o.target: o for o in finished.outcomes}
            unknown = [n for n in names if n not in have]
            if unknown:
                raise typer.BadParameter(
                    f"the run has no {', '.join(unknown)}; it has: {', '.join(have)}"
                )
            kept = tuple(have[n] for n in names or have)
            finished = dataclasses.replace(finished, outcomes=kept)
        _report(finished)


@app.command("validate")
def validate_command(
    target: Annotated[str, typer.Argument(help="A target whose chapter promises a bound.")],
) -> None:
    """Check a chapter's promised bound; exit 1 where it is exceeded."""
    with _errors():
        from ch15_helpers.bench.targets import find, validator_of

        available = _available()
        outcome = validator_of(find(target, available), available)()
        typer.echo(outcome.report)
        if not outcome.passed:
            raise typer.Exit(1)


def main() -> None:
    """Entry point of the console script."""
    app()


def _available() -> dict[str, Target]:
    from ch15_helpers.bench import targets
    from ch15_helpers.bench.paths import book_dir

    return targets.existing(book_dir(), targets.TARGETS)


def _execute(chosen: list[Target], options: RunOptions, out: Path | None) -> Run:
    """Run with a progress bar on the terminal."""
    from ch15_helpers.bench import harness
    from ch15_helpers.bench.report import console
    from ch15_helpers.bench.staging import cell_progress

    with cell_progress(console()) as progress:
        tasks = {t.notebook: progress.add_task(t.notebook, total=None) for t in chosen}

        def on_progress(notebook: str, done: int, total: int) -> None:
            progress.update(tasks[notebook], completed=done, total=total)

        return harness.run(chosen, options, out, on_progress)


def _report(finished: Run, *, update: bool = False) -> None:
    from ch15_helpers.bench.report import console, print_run
    from ch15_helpers.bench.runs import store_expectations

    to = console()
    print_run(finished, to, updated=update)
    if not update:
        if not finished.ok:
            raise typer.Exit(1)
        return
    for path in store_expectations(finished):
        to.print(f"stored: {path}", soft_wrap=True)
    if any(o.error for o in finished.outcomes):
        raise typer.Exit(1)


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Package errors become one line on stderr and an exit status."""
    try:
        yield
    except Ch15Error as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1 if isinstance(error, NotebookError) else 2) from error
