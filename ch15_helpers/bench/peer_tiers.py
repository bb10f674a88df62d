"""Promotion from a peer GPU's memory beside pinned host memory, and both links, in one run.

``python -m ch15_helpers.bench.peer_tiers`` prints one JSON object a line: each link's rate for one
contiguous copy of as many bytes, then the rate of a promotion of blocks that lie anywhere in
either, from the call to the last byte and on the copy's stream alone. Needs two CUDA devices.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ch15_helpers.bench.tiers import BLOCK_SIZE, fresh_keys
from ch15_helpers.kv.cache import Layout, PagedKVCache
from ch15_helpers.kv.keys import KeyTable
from ch15_helpers.kv.tier_config import TierConfig
from ch15_helpers.kv.tiers import TieredStore
from ch15_helpers.model.config import LLAMA3_8B, SMOLLM2_135M, ModelConfig


def copy_GBps(target: Tensor, source: Tensor, repeats: int = 5) -> float:
    """Median rate of one contiguous copy, by events on the CUDA side; uint8, equally long."""
    device = target.device if target.is_cuda else source.device
    seconds: list[float] = []
    for _ in range(repeats + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        with torch.cuda.device(device):
            begin.record()
            target.copy_(source, non_blocking=True)
            end.record()
            end.synchronize()
        seconds.append(float(begin.elapsed_time(end)) / 1e3)
    return target.numel() / statistics.median(seconds[1:]) / 1e9


def link_rates(device: torch.device, peer: torch.device, num_bytes: int) -> dict[str, float]:
    """GB/s into ``device`` of ``num_bytes`` at once: from a peer's memory, and from pinned RAM."""
    here = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    there = torch.zeros(num_bytes, dtype=torch.uint8, device=peer)
    host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)
    return {"peer": copy_GBps(here, there), "host": copy_GBps(here, host)}


def promotion_rates(
    model: ModelConfig,
    count: int,
    device: torch.device,
    peer: torch.device | None,
    *,
    block_size: int = BLOCK_SIZE,
    layout: Layout = "block_major",
    rounds: int = 5,
) -> dict[str, float]:
    """GB/s of promoting ``count`` blocks in one call, from ``peer`` or, without one, from RAM.

    Returns:
        medians: ``call_GBps`` from the call to the last byte seen by the caller, ``stream_GBps``
        on the copy's stream, and ``demote_GBps`` of putting them there, wait included.
    """
    cache = PagedKVCache(
        model, count, block_size, dtype=torch.bfloat16, device=device, layout=layout
    )
    table, rng = KeyTable(block_size), random.Random(0)
    config = TierConfig(host_blocks=2 * count)
    if peer is not None:
        config = TierConfig(peer_device=str(peer), peer_blocks=2 * count)
    store = TieredStore(cache, table, config)
    taken: dict[str, list[float]] = {"call": [], "stream": [], "demote": []}
    for _ in range(rounds + 1):  # the first one warms up
        keys = fresh_keys(table, count, rng)
        torch.cuda.synchronize(device)
        start_s = time.perf_counter()
        store.demote(list(zip(rng.sample(range(count), count), keys, strict=True)))
        store.drain()
        taken["demote"].append(time.perf_counter() - start_s)
        pairs = list(zip(keys, rng.sample(range(count), count), strict=True))
        start_s = time.perf_counter()
        transfer = store.promote(pairs)
        transfer.wait()
        taken["call"].append(time.perf_counter() - start_s)
        taken["stream"].append(transfer.copy_s or 0.0)
        assert all(transfer.ok), f"{transfer.ok.count(False)} blocks did not come back"
    store.close()
    middle = {name: statistics.median(values[1:]) for name, values in taken.items()}
    return {f"{name}_GBps": cache.nbytes / seconds / 1e9 for name, seconds in middle.items()}


def compare(
    model: ModelConfig,
    count: int,
    device: torch.device,
    peer: torch.device,
    *,
    block_size: int = BLOCK_SIZE,
    layout: Layout = "block_major",
) -> dict[str, Any]:
    """One row: links, promotions from both, what each reaches of its link, and both ratios.

    Args:
        count: blocks in one promotion, of ``block_size`` tokens each.
        device, peer: two CUDA devices.
    """
    num_bytes = count * block_size * model.kv_bytes_per_token(2)
    links = link_rates(device, peer, num_bytes)
    row: dict[str, Any] = {"MiB": num_bytes / 2**20, "blocks": count, "block_size": block_size}
    row["layout"] = layout
    for name, where in (("peer", peer), ("host", None)):
        rates = promotion_rates(model, count, device, where, block_size=block_size, layout=layout)
        row[f"{name}_link_GBps"] = links[name]
        row |= {f"{name}_{key}": value for key, value in rates.items()}
        row[f"{name}_of_link"] = rates["call_GBps"] / links[name]
    row["ratio_of_links"] = links["peer"] / links["host"]
    row["ratio_of_promotions"] = row["peer_call_GBps"] / row["host_call_GBps"]
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure between ``--device`` and ``--peer``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--peer", default="cuda:1")
    args = parser.parse_args(arguments)
    device, peer = torch.device(args.device), torch.device(args.peer)
    cases: list[tuple[ModelConfig, int, int, Layout]] = [
        *((LLAMA3_8B, count, 16, "block_major") for count in (16, 64, 256, 512)),
        *((LLAMA3_8B, count, 64, "block_major") for count in (16, 64, 128)),
        (LLAMA3_8B, 256, 16, "layer_major"),
        (SMOLLM2_135M, 512, 16, "block_major"),
    ]
    for model, count, block_size, layout in cases:
        row = compare(model, count, device, peer, block_size=block_size, layout=layout)
        shown = {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}
        print(json.dumps({"model": model.architecture} | shown), flush=True)


if __name__ == "__main__":
    main()
