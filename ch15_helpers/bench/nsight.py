"""What Nsight Compute measured of each kernel, read from its report."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
from collections import defaultdict
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from statistics import median

from ch15_helpers.errors import Ch15Error

METRICS = {
    "time_us": "gpu__time_duration.sum",
    "dram": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "sm": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
}
SCALES = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3,
          "s": 1e6, "second": 1e6}  # fmt: skip
EXPORT_TIMEOUT_S = 120


@dataclass(frozen=True)
class KernelFigures:
    """Medians over the launches of one kernel; ``dram`` and ``sm`` are fractions of the peak."""

    name: str
    launches: int
    time_us: float
    dram: float
    sm: float


def kernel_figures(report: Path) -> list[KernelFigures]:
    """The kernels of a report, those that took most time first.

    Raises:
        Ch15Error: ncu cannot export the report, or the report lacks a metric.
    """
    command = ["ncu", "--import", str(report), "--csv", "--page", "raw"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=EXPORT_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Ch15Error(f"ncu cannot read {report.name}: {error}") from error
    if done.returncode:
        raise Ch15Error(f"ncu cannot read {report.name}: {(done.stderr or done.stdout).strip()}")
    return parse(done.stdout)


def parse(text: str) -> list[KernelFigures]:
    """Figures from the raw page in CSV: a header, a line of units, a line for each launch.

    Raises:
        Ch15Error: a metric is not in the report, or there is no launch in it.
    """
    rows = list(csv.DictReader(io.StringIO(text[text.find('"ID"') :])))
    if len(rows) < 2:
        raise Ch15Error("the report of Nsight Compute has no kernel in it")
    missing = [metric for metric in METRICS.values() if metric not in rows[0]]
    if missing:
        raise Ch15Error(f"the report of Nsight Compute lacks {', '.join(missing)}")
    scale = SCALES.get(rows[0][METRICS["time_us"]], 1.0)
    launches: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for row in rows[1:]:
        time, dram, sm = (float(row[m].replace(",", "")) for m in METRICS.values())
        name = re.sub(r"[<(].*", "", row["Kernel Name"]).split("::")[-1].strip()
        launches[name].append((time * scale, dram / 100, sm / 100))
    found = [
        KernelFigures(name, len(each), *(median(column) for column in zip(*each, strict=True)))
        for name, each in launches.items()
    ]
    return sorted(found, key=lambda f: -f.launches * f.time_us)


def describe(figures: list[KernelFigures], limit: int = 5) -> list[str]:
    """One sentence for each of the kernels that took most time."""
    return [
        f"{f.name}: {f.launches} launches of {f.time_us:.1f} µs, "
        f"DRAM at {f.dram:.0%} and SMs at {f.sm:.0%} of their peak rates"
        for f in figures[:limit]
    ]


def stored(key: str = "h200") -> str:
    """Markdown: the figures of the attention kernel that were recorded on one hardware key."""
    path = files("ch15_helpers.bench").joinpath("data", f"ncu_{key}.json")
    data = json.loads(path.read_text(encoding="utf-8"))
    rows = [KernelFigures(**kernel) for kernel in data["kernels"]]
    lines = [
        f"Recorded on {data['hardware']}, {data['recorded']}, with {data['tool']}; "
        f"commit `{data['commit']}`.",
        "",
        "| kernel | time | DRAM, of its peak rate | multiprocessors, of their peak rate |",
        "|---|--:|--:|--:|",
    ]
    lines += [f"| {f.name} | {f.time_us:.1f} µs | {f.dram:.0%} | {f.sm:.0%} |" for f in rows]
    return "\n".join(lines)
