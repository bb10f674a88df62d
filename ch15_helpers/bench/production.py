"""Our kernels and engine beside what production systems were recorded to do.

``python -m ch15_helpers.bench.production --out DIR`` measures ours on this GPU; stored as
``data/ours_KEY.json`` it is what the chapter shows. ``make peers`` measures ours and, where they
are installed, the peers again.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from ch15_helpers.bench import engine, kernels, moe, products
from ch15_helpers.bench.expectations import write_json_atomically
from ch15_helpers.bench.records import (
    ATTENTION,
    ENGINE,
    EXPERTS,
    FILLS_CHIP,
    GROUPS,
    PRODUCTS_MODEL,
    PRODUCTS_TOKENS,
    Record,
    Row,
    attention_work,
    expert_work,
    load,
    product_work,
)
from ch15_helpers.bench.runs import commit_id
from ch15_helpers.errors import HardwareError
from ch15_helpers.hardware import HardwareProfile
from ch15_helpers.model.config import PRESETS

OURS, LIBRARY = "this book", "cuBLAS"


@dataclass(frozen=True)
class Comparison:
    """One work: ours, and the peers' rows, the fastest first."""

    ours: Row
    peers: tuple[Row, ...]

    @property
    def ratio(self) -> float:
        """Our speed over the fastest peer's; above 1 we are ahead."""
        return self.ours.speed_over(self.peers[0])


def compare(ours: Sequence[Row], peers: Sequence[Row], group: str) -> list[Comparison]:
    """The works of a group that both sides did, in our order.

    A library's rows in our record count among the peers'.
    """
    found = []
    everybody = [*peers, *(row for row in ours if row.system == LIBRARY)]
    for row in ours:
        rivals = [p for p in everybody if (p.group, p.work, p.unit) == (group, row.work, row.unit)]
        if row.group == group and row.system != LIBRARY and rivals:
            rivals.sort(key=lambda rival: -rival.speed_over(row))
            found.append(Comparison(row, tuple(rivals)))
    return found


def table(comparisons: Sequence[Comparison]) -> str:
    """Markdown: achieved, limit, fraction, the fastest peer and our speed over its."""
    names = ("work", "unit", "this book", "limit", "fraction of the limit", "fastest peer",
             "its number", "our speed over its")  # fmt: skip
    lines = [f"| {' | '.join(names)} |", "|---|---|--:|--:|--:|---|--:|--:|"]
    for c in comparisons:
        limit = "–" if c.ours.limit is None else _number(c.ours.limit)
        fraction = "–" if c.ours.fraction is None else f"{c.ours.fraction:.0%}"
        peer = c.peers[0]
        lines.append(
            f"| {c.ours.work} | {c.ours.unit} | {_number(c.ours.value)} | {limit} | {fraction} "
            f"| {peer.system} | {_number(peer.value)} | {c.ratio:.2f}× |"
        )
    return "\n".join(lines)


def limits_table(rows: Sequence[Row], group: str) -> str:
    """Markdown of our rows of a group for which no peer was recorded: beside their limits."""
    lines = ["| work | unit | this book | limit | fraction |", "|---|---|--:|--:|--:|"]
    for row in rows:
        if row.group == group and row.limit is not None:
            numbers = f"{_number(row.value)} | {_number(row.limit)} | {row.fraction:.0%}"
            lines.append(f"| {row.work} | {row.unit} | {numbers} |")
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def measure_ours(profile: HardwareProfile) -> list[Row]:
    """Every work that the peers were recorded on, on this GPU, in bfloat16."""
    rows, dtype = [], torch.bfloat16
    cases = {case.name: case for case in kernels.gpu_cases() if case.kernel == "decode"}
    for name in ATTENTION:
        k = kernels.attention_row(cases[name], profile, dtype)
        rows.append(Row("attention", attention_work(name), k.unit, OURS, k.achieved, k.limit))
    for model, tokens in EXPERTS:
        m = moe.measure_row(model, tokens, profile, dtype)
        work = expert_work(model, tokens)
        rows.append(Row("experts", work, "µs", OURS, m.eager_s * 1e6, m.limit_s * 1e6))
        if tokens >= FILLS_CHIP and m.sustained_s and m.sustained_limit_s:
            loaded_us, limit_us = m.sustained_s * 1e6, m.sustained_limit_s * 1e6
            rows.append(Row("experts under load", work, "µs", OURS, loaded_us, limit_us))
    return rows + product_rows(profile) + engine_rows(profile)


def product_rows(profile: HardwareProfile) -> list[Row]:
    """A dense layer's products, ours and the library's in turn, on a chip under load."""
    rows, config = [], PRESETS[PRODUCTS_MODEL]
    for name in products.layer_products(config):
        p = products.measure_product(name, config, PRODUCTS_TOKENS, profile)
        for system, seconds in ((OURS, p.ours_s), (LIBRARY, p.library_s)):
            rows.append(Row("products under load", product_work(name), "µs", system, seconds * 1e6))
    return rows


def peer_loads() -> tuple[engine.Suite, tuple[engine.Load, ...]]:
    """The engine's suite and loads that the peers were recorded on."""
    suite = engine.gpu_suites()[0]
    return suite, tuple(load for load in suite.loads if load.name in ENGINE)


def engine_rows(profile: HardwareProfile) -> list[Row]:
    """The engine's loads of the records, on this GPU, in bfloat16."""
    suite, loads = peer_loads()
    rows, _ = engine.run_suites([replace(suite, loads=loads)], profile, torch.bfloat16)
    return [Row("engine", r.load, r.unit, OURS, r.achieved, r.limit) for r in rows]


def record_of(profile: HardwareProfile, rows: Sequence[Row]) -> Record:
    """Rows measured now, with their provenance."""
    now = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    software = f"torch {profile.torch}, triton {profile.triton}, commit {commit_id()[:12]}"
    return Record(profile.name, now, software, {}, tuple(rows))


def main(
    out: Annotated[Path, typer.Option(help="Folder for ours_KEY.json.")],
    device: Annotated[str, typer.Option(help="cuda, or another GPU by number.")] = "cuda",
) -> None:
    """Measure every work that the peers were recorded on, and store it."""
    profile = HardwareProfile.measure(device)
    if not profile.device.startswith("cuda"):
        raise HardwareError("the peers were recorded on a GPU; this needs --device cuda")
    rows = measure_ours(profile)
    write_json_atomically(out / f"ours_{profile.key}.json", record_of(profile, rows).to_json())
    peers = load(f"peers_{profile.key}")
    for group in GROUPS:
        compared = compare(rows, peers.rows if peers else (), group)
        print(table(compared) if compared else limits_table(rows, group))


if __name__ == "__main__":
    typer.run(main)
