"""Offload and promotion against the measured link, and how much of both decode hides.

``python -m ch15_helpers.bench.tiers --device cuda`` checks contents first, then prints GB/s and
the fraction of the link for Llama-3-8B's blocks (2 MiB) and for SmolLM2's (360 KiB), in either
layout, and the share that is hidden behind the decode steps of an engine.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from typing import Any

import torch

from ch15_helpers.ceilings import measure_ceilings
from ch15_helpers.hardware import resolve_device
from ch15_helpers.kv.cache import Layout, PagedKVCache
from ch15_helpers.kv.keys import BlockKey, KeyTable
from ch15_helpers.kv.quantised import make_kv_cache
from ch15_helpers.kv.tier_config import LoadPath, TierConfig
from ch15_helpers.kv.tiers import TieredStore
from ch15_helpers.model.config import LLAMA3_8B, SMOLLM2_135M, ModelConfig

BLOCK_SIZE = 16


def fresh_keys(table: KeyTable, count: int, rng: random.Random) -> list[BlockKey]:
    """Keys that no tier has."""
    return [
        table.intern(None, [rng.randrange(1 << 30) for _ in range(table.block_size)])
        for _ in range(count)
    ]


def check_contents(
    device: torch.device, dtype: torch.dtype | str, layout: Layout, peer: str | None = None
) -> None:
    """Demote, overwrite at once on the compute stream, promote elsewhere, compare bit by bit.

    ``peer`` names the CUDA device whose memory the blocks go to; without it they go to RAM.
    """
    cache = make_kv_cache(SMOLLM2_135M, 96, BLOCK_SIZE, dtype=dtype, device=device, layout=layout)
    generator = torch.Generator(device).manual_seed(0)
    parts = [cache.pages] if cache.scales is None else [cache.pages, cache.scales]
    for part in parts:
        noise = torch.rand(part.shape, generator=generator, device=device)
        part.copy_(noise.mul_(64).to(part.dtype))
    before = [part[:40].clone() for part in parts]
    table = KeyTable(BLOCK_SIZE)
    keys = fresh_keys(table, 40, random.Random(0))
    config = TierConfig(host_blocks=64, staging_blocks=7)
    if peer is not None:
        config = TierConfig(peer_device=peer, peer_blocks=64, staging_blocks=7)
    store = TieredStore(cache, table, config)
    store.demote([(i, key) for i, key in enumerate(keys)])
    for part in parts:
        part[:40].view(torch.uint8).fill_(1)
    order = random.Random(1).sample(range(40), 40)
    transfer = store.promote([(keys[i], 40 + j) for j, i in enumerate(order)])
    transfer.wait()
    assert all(transfer.ok), f"{transfer.ok.count(False)} blocks did not come back"
    for part, was in zip(parts, before, strict=True):
        for j, i in enumerate(order):
            same = torch.equal(part[40 + j].view(torch.uint8), was[i].view(torch.uint8))
            assert same, f"block {i} came back different ({dtype}, {layout})"
    store.check_invariants()
    store.close()


def throughput(
    model: ModelConfig, layout: Layout, path: LoadPath, count: int, device: torch.device
) -> dict[str, Any]:
    """GB/s of demoting and of promoting ``count`` blocks at once, best of three."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    cache = PagedKVCache(model, count, BLOCK_SIZE, dtype=dtype, device=device, layout=layout)
    table, rng = KeyTable(BLOCK_SIZE), random.Random(0)
    store = TieredStore(cache, table, TierConfig(host_blocks=2 * count, load_path=path))
    best = {"demote": float("inf"), "promote": float("inf")}
    for _ in range(4):  # the first also warms up
        keys = fresh_keys(table, count, rng)
        blocks = rng.sample(range(count), count)
        for name in best:
            _settle(device)
            start_s = time.perf_counter()
            if name == "demote":
                store.demote(list(zip(blocks, keys, strict=True)))
                store.drain()
            else:
                store.promote(list(zip(keys, blocks, strict=True))).wait()
            best[name] = min(best[name], time.perf_counter() - start_s)
    store.close()
    size = cache.nbytes / 1e9
    return {
        "block_KiB": cache.block_bytes / 1024,
        "layout": layout,
        "path": path,
        **{f"{name}_GBps": size / seconds for name, seconds in best.items()},
    }


def one_or_many(model: ModelConfig, device: torch.device) -> dict[str, float]:
    """GB/s to the host of one block as one copy, and as one for each layer's K and V."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    whole = PagedKVCache(model, 64, BLOCK_SIZE, dtype=dtype, device=device)
    pin = device.type == "cuda"
    host = torch.empty(whole.pages.shape, dtype=dtype, pin_memory=pin)

    def many() -> None:
        for block in range(64):
            for layer in range(model.num_hidden_layers):
                for side in range(2):
                    source = whole.pages[block, layer, side]
                    host[block, layer, side].copy_(source, non_blocking=True)

    def one() -> None:
        for block in range(64):
            host[block].copy_(whole.pages[block], non_blocking=True)

    result = {}
    for name, run in (("one", one), ("many", many)):
        run()
        _settle(device)
        start_s = time.perf_counter()
        run()
        _settle(device)
        result[f"{name}_GBps"] = whole.nbytes / (time.perf_counter() - start_s) / 1e9
    return result


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def hidden_share(source: str, device: torch.device, blocks: int, steps: int) -> dict[str, Any]:
    """Decode steps without transfers, then with ``blocks`` out and ``blocks`` in during each.

    hidden = 1 - (step with - step without) / time that the copies take alone.
    """
    from ch15_helpers.model.loading import load_model
    from ch15_helpers.serving.config import EngineConfig
    from ch15_helpers.serving.engine import Engine
    from ch15_helpers.serving.request import SamplingParams

    model = load_model(source, device=device)
    engine = Engine(
        model,
        EngineConfig(
            num_blocks=3072 if device.type == "cuda" else 1024,
            max_num_seqs=32,
            max_num_batched_tokens=8192,
        ),
    )
    rng = random.Random(0)
    length = 512 if device.type == "cuda" else 32
    for _ in range(32 if device.type == "cuda" else 4):
        prompt = [rng.randrange(model.config.vocab_size) for _ in range(length)]
        engine.add_request(prompt, SamplingParams(max_tokens=4 * steps + 40, ignore_eos=True))
    while engine.scheduler.num_waiting or engine.scheduler._prefilling:
        engine.step()
    mine = engine.scheduler.blocks.allocator.allocate_many(2 * blocks)
    store = TieredStore(engine.cache, KeyTable(BLOCK_SIZE), TierConfig(host_blocks=16 * blocks))
    moves = _moves(store, mine, blocks, rng)
    for _ in range(16):
        next(moves)
    store.drain()
    alone = []
    for _ in range(8):
        start_s = time.perf_counter()
        next(moves)
        store.drain()
        alone.append(time.perf_counter() - start_s)
    without, with_ = [], []
    for _ in range(steps):  # interleaved: contexts grow
        store.drain()
        without.append(_step_s(engine))
        next(moves)
        with_.append(_step_s(engine))
    store.check_invariants()
    store.close()
    middle = {
        name: sorted(v)[len(v) // 2]
        for name, v in (("alone", alone), ("without", without), ("with", with_))
    }
    extra_s = middle["with"] - middle["without"]
    return {
        "model": source,
        "blocks_each_way": blocks,
        "bytes_each_way": blocks * engine.cache.block_bytes,
        **{f"{name}_ms": seconds * 1e3 for name, seconds in middle.items()},
        "hidden_share": 1 - extra_s / middle["alone"],
    }


def _step_s(engine: Any) -> float:
    start_s = time.perf_counter()
    engine.step()
    return time.perf_counter() - start_s


def _moves(store: TieredStore, mine: list[int], count: int, rng: random.Random) -> Iterator[None]:
    """Each ``next`` demotes ``count`` blocks under new keys and promotes those of before."""
    table = KeyTable(BLOCK_SIZE)
    previous: list[BlockKey] = []
    while True:
        keys = fresh_keys(table, count, rng)
        if previous:
            store.promote(list(zip(previous, rng.sample(mine[count:], count), strict=True)))
        store.demote(list(zip(rng.sample(mine[:count], count), keys, strict=True)))
        previous = keys
        yield


def main() -> None:
    """Check, measure, print one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--model", default=None, help="decodes while blocks move")
    parser.add_argument("--blocks", type=int, default=48, help="each way in a step")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    device = resolve_device(args.device)
    on_gpu = device.type == "cuda"
    torch.set_grad_enabled(False)
    kinds: list[torch.dtype | str] = [torch.bfloat16, torch.float32, "int8", "fp8_e4m3"]
    for kind in kinds:
        check_contents(device, kind, "block_major")
    check_contents(device, torch.bfloat16, "layer_major")
    print("contents: equal in every type and layout", flush=True)
    link = measure_ceilings(str(device), torch.get_num_threads()).host_link_GBps
    print(json.dumps({"host_link_GBps": link}), flush=True)
    big = LLAMA3_8B if on_gpu else SMOLLM2_135M
    print(json.dumps({"copies_of_a_block": one_or_many(big, device)}), flush=True)
    cases: list[tuple[ModelConfig, Layout, LoadPath]] = [
        (big, "block_major", "direct"),
        (big, "block_major", "staged"),
        (big, "layer_major", "staged"),
        (SMOLLM2_135M, "block_major", "direct"),
        (SMOLLM2_135M, "block_major", "staged"),
    ]
    for config, layout, path in cases:
        row = throughput(config, layout, path, 512 if on_gpu else 32, device)
        if link is not None:
            for name in ("demote", "promote"):
                row[f"{name}_fraction"] = row[f"{name}_GBps"] / link
        print(json.dumps(row), flush=True)
    source = args.model or ("random:LLAMA3_8B" if on_gpu else "random:TINY")
    row = hidden_share(source, device, args.blocks if on_gpu else 8, args.steps)
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
