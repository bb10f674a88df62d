"""Profiles: none, minimal (torch.profiler) and deep_dive (Nsight where it is installed).

A notebook marks the region worth profiling with :func:`profiled`. With ``none`` that costs
nothing; with ``minimal`` it leaves a summary and a Chrome trace; with ``deep_dive`` it opens the
NVTX range that the harness tells Nsight Systems and Nsight Compute to look at.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ch15_helpers.errors import UnknownTargetError

PROFILES = ("none", "minimal", "deep_dive")
NCU_REPLAY_MODES = ("kernel", "application")
NVTX_RANGE = "ch15"
# Nsight Compute replays each kernel some ten times: this bounds a profile to minutes.
NCU_LAUNCHES = 200


@dataclass(frozen=True)
class Tool:
    """A profiler on PATH and the command line that puts it in front of another command."""

    name: str
    prefix: tuple[str, ...]
    report: Path


def check_profile(profile: str) -> str:
    """The profile itself.

    Raises:
        UnknownTargetError: not one of the three; lists them.
    """
    if profile not in PROFILES:
        raise UnknownTargetError(
            f"unknown profile {profile!r}; expected one of: {', '.join(PROFILES)}"
        )
    return profile


@contextlib.contextmanager
def profiled(name: str, profile: str = "none", out_dir: str | Path = "") -> Iterator[None]:
    """Profile the body, outside any timed region.

    ``minimal`` writes ``{name}.summary.txt`` (operators by total time) and ``{name}.trace.json``
    (chrome://tracing, Perfetto) into ``out_dir``; ``runs/profiles`` by default.

    Args:
        name: of the files and of the range.
        profile: ``none``, ``minimal`` or ``deep_dive``, as the notebook's parameter gives it.
        out_dir: the notebook's parameter of the same name.
    """
    check_profile(profile)
    if profile == "none":
        yield
    elif profile == "minimal":
        with _torch_profile(name, _directory(out_dir)):
            yield
    else:
        with _nvtx_range():
            yield


def deep_dive_tools(out_dir: Path, replay_mode: str = "kernel") -> tuple[list[Tool], list[str]]:
    """Nsight tools on PATH with their command prefixes, and a sentence for each that is not.

    Args:
        out_dir: where the reports go.
        replay_mode: Nsight Compute's: ``kernel`` saves and restores memory around each kernel,
            ``application`` runs the whole notebook again for each pass.
    """
    if replay_mode not in NCU_REPLAY_MODES:
        raise UnknownTargetError(
            f"unknown ncu replay mode {replay_mode!r}; expected one of: "
            f"{', '.join(NCU_REPLAY_MODES)}"
        )
    nsys, ncu = out_dir / "nsight_systems", out_dir / "nsight_compute"
    wanted = {
        "nsys": Tool(
            "nsys",
            (
                "nsys",
                "profile",
                "--trace=cuda,nvtx,osrt",
                "--wait=all",
                "--force-overwrite=true",
                f"--output={nsys}",
            ),
            nsys.with_suffix(".nsys-rep"),
        ),
        "ncu": Tool(
            "ncu",
            (
                "ncu",
                "--target-processes=all",
                "--nvtx",
                f"--nvtx-include={NVTX_RANGE}/",
                f"--launch-count={NCU_LAUNCHES}",
                f"--replay-mode={replay_mode}",
                "--force-overwrite",
                f"--export={ncu}",
            ),
            ncu.with_suffix(".ncu-rep"),
        ),
    }
    tools = [tool for name, tool in wanted.items() if shutil.which(name)]
    missing = [
        f"{name} is not on PATH: no {tool.report.name} was made"
        for name, tool in wanted.items()
        if not shutil.which(name)
    ]
    return tools, missing


@contextlib.contextmanager
def without_profiler_log() -> Iterator[None]:
    """Keep the lines that torch's profiler library writes to file descriptor 2 to itself."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("w") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextlib.contextmanager
def _torch_profile(name: str, out_dir: Path) -> Iterator[None]:
    import torch
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with without_profiler_log(), profile(activities=activities, record_shapes=True) as recording:
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    table = recording.key_averages().table(sort_by=by, row_limit=30)
    (out_dir / f"{name}.summary.txt").write_text(table + "\n", encoding="utf-8")
    recording.export_chrome_trace(str(out_dir / f"{name}.trace.json"))


@contextlib.contextmanager
def _nvtx_range() -> Iterator[None]:
    import torch

    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.nvtx.range_push(NVTX_RANGE)  # type: ignore[no-untyped-call]
    try:
        yield
        torch.cuda.synchronize()
    finally:
        torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]


def _directory(out_dir: str | Path) -> Path:
    if str(out_dir):
        path = Path(out_dir)
    else:
        from ch15_helpers.bench.paths import runs_dir

        path = runs_dir() / "profiles"
    path.mkdir(parents=True, exist_ok=True)
    return path
