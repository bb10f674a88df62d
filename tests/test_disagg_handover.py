"""Prefill on one side, decode on the other: tokens, with and without the check; links and fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import pytest
import torch

from ch15_helpers import Engine, EngineConfig, SamplingParams
from ch15_helpers.disagg.clock import VirtualClock
from ch15_helpers.disagg.fabric import Fabric
from ch15_helpers.disagg.faults import Fault, FaultyWire
from ch15_helpers.disagg.heads import head_routes, heads_of
from ch15_helpers.disagg.link import LINKS, LinkModel, fit_link
from ch15_helpers.disagg.pool import Part, RegisteredPool, refs_of
from ch15_helpers.disagg.recompute import chunk_metadata, recompute_blocks
from ch15_helpers.disagg.transport import BlockTransport
from ch15_helpers.disagg.wire import LocalHub
from ch15_helpers.kv.cache import PagedKVCache
from ch15_helpers.model.transformer import Transformer

FAULTS: tuple[Fault, ...] = get_args(Fault)
SIZE = 8
PROMPT = [(37 * i * i + 11 * i) % 250 for i in range(61)]
NEW = 12


def forward(
    model: Transformer, cache: PagedKVCache, table: Sequence[int], known: list[int], start: int
) -> int:
    """Compute tokens from ``start`` on, and return the greedy next one."""
    positions = torch.arange(start, len(known))
    batch = chunk_metadata(table, start, len(known), cache)
    logits = model.forward(torch.tensor(known[start:]), positions, cache.pages, batch)
    return int(logits[0].argmax())


def decode(model: Transformer, cache: PagedKVCache, table: Sequence[int], first: int) -> list[int]:
    known = [*PROMPT, first]
    while len(known) < len(PROMPT) + NEW:
        known.append(forward(model, cache, table, known, len(known) - 1))
    return known[len(PROMPT) :]


def prefilled(model: Transformer) -> tuple[PagedKVCache, list[int], int]:
    cache = PagedKVCache(model.config, 16, SIZE)
    table = [9, 2, 14, 0, 7, 5, 11, 3]
    return cache, table, forward(model, cache, table, PROMPT, 0)


@pytest.fixture(scope="module")
def monolithic(tiny: Transformer) -> list[int]:
    engine = Engine(tiny, EngineConfig(block_size=SIZE, num_blocks=32))
    params = SamplingParams(max_tokens=NEW, ignore_eos=True)
    return engine.generate([PROMPT], params)[0].token_ids


def handed_over(model: Transformer, wrap: Any, verify: bool) -> tuple[list[int], int]:
    """Tokens of the decode side, and how many it had to compute again."""
    source, table, first = prefilled(model)
    target = PagedKVCache(model.config, 20, SIZE)
    clock, hub = VirtualClock(), LocalHub(2)
    ends = [
        BlockTransport(wire, clock=clock, verify=verify)
        for wire in (wrap(hub.wire(0)), hub.wire(1))
    ]
    ends[0].register(RegisteredPool(source))
    ends[1].register(RegisteredPool(target))
    other = [17, 1, 8, 19, 4, 12, 0, 6, 3, 2]
    receive = ends[1].receive(refs_of(other[:8], 1), source=0, channel=1)
    ends[0].send(refs_of(table, 1), to=1, channel=1)
    ends[1].wait(receive)
    again = recompute_blocks(model, target, other, PROMPT, receive.to_recompute)
    return decode(model, target, other, first), again


def test_tokens_are_those_of_the_monolithic_engine(
    tiny: Transformer, monolithic: list[int]
) -> None:
    assert handed_over(tiny, lambda wire: wire, True) == (monolithic, 0)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_check_saves_the_tokens(tiny: Transformer, monolithic: list[int], fault: Fault) -> None:
    def wrap(wire: Any) -> Any:
        return FaultyWire(wire, fault, row=6)  # block 7 is partly full

    tokens, again = handed_over(tiny, wrap, verify=True)
    assert tokens == monolithic
    computed = {"corrupt": 8, "exchange": 13, "reorder": 0, "drop": 8, "duplicate": 5}
    assert again == computed[fault], "only the blocks that did not arrive are computed again"
    tokens, again = handed_over(tiny, wrap, verify=False)
    assert again == 0
    assert tokens != monolithic, "this fault changes nothing, so it proves nothing"


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_tokens_survive_a_change_of_tensor_parallelism(
    tiny: Transformer, monolithic: list[int], before: int, after: int
) -> None:
    from dataclasses import replace

    source, table, first = prefilled(tiny)
    heads = tiny.config.num_key_value_heads

    def shard(rank: int, degree: int, pages: Any = None) -> RegisteredPool:
        low, high = heads_of(rank, degree, heads)
        cache = PagedKVCache(replace(tiny.config, num_key_value_heads=high - low), 16, SIZE)
        if pages is not None:
            cache.pages.copy_(pages[:, :, :, :, low:high])
        return RegisteredPool(cache, first_head=low)

    pools = [shard(r, before, source.pages) for r in range(before)]
    pools += [shard(r, after) for r in range(after)]
    clock, hub = VirtualClock(), LocalHub(before + after)
    ends = [BlockTransport(hub.wire(r), clock=clock) for r in range(before + after)]
    for end, pool in zip(ends, pools, strict=True):
        end.register(pool)
    other = [1, 8, 4, 12, 0, 6, 3, 2, 15, 10]
    layers = (0, tiny.config.num_hidden_layers)
    for route in head_routes(heads, before, after):
        part, target = Part(layers, route.heads), before + route.target
        receive = ends[target].receive(
            refs_of(other[:8], 1), source=route.source, channel=1, part=part
        )
        ends[route.source].send(refs_of(table, 1), to=target, channel=1, part=part)
        ends[target].wait(receive)
        assert receive.report.is_clean
    # What the ranks of the decode side hold together is the cache of the whole model.
    whole = PagedKVCache(tiny.config, 16, SIZE)
    for pool in pools[before:]:
        whole.pages[:, :, :, :, slice(*pool.heads)] = pool.cache.pages
    assert decode(tiny, whole, other, first) == monolithic


def test_layer_by_layer_handover_overlaps_prefill(tiny: Transformer, monolithic: list[int]) -> None:
    """Each layer is sent as soon as ``on_layer_done`` says that its keys and values are there."""
    source = PagedKVCache(tiny.config, 16, SIZE)
    target = PagedKVCache(tiny.config, 20, SIZE)
    table, other = [9, 2, 14, 0, 7, 5, 11, 3], [17, 1, 8, 19, 4, 12, 0, 6, 3, 2]
    clock, hub = VirtualClock(), LocalHub(2)
    ends = [BlockTransport(hub.wire(r), clock=clock) for r in range(2)]
    ends[0].register(RegisteredPool(source))
    ends[1].register(RegisteredPool(target))
    heads = (0, tiny.config.num_key_value_heads)
    parts = [Part((layer, layer + 1), heads) for layer in range(tiny.config.num_hidden_layers)]
    receives = [
        ends[1].receive(refs_of(other[:8], 1), source=0, channel=layer, part=part)
        for layer, part in enumerate(parts)
    ]
    landed_before = []

    def layer_done(layer: int) -> None:
        ends[1].poll()
        landed_before.append(sum(receive.done for receive in receives))
        ends[0].send(refs_of(table, 1), to=1, channel=layer, part=parts[layer])

    batch = chunk_metadata(table, 0, len(PROMPT), source)
    positions = torch.arange(len(PROMPT))
    logits = tiny.forward(
        torch.tensor(PROMPT), positions, source.pages, batch, on_layer_done=layer_done
    )
    ends[1].wait(*receives)
    assert landed_before == list(range(tiny.config.num_hidden_layers)), "no overlap"
    assert decode(tiny, target, other, int(logits[0].argmax())) == monolithic


def test_any_set_of_blocks_can_be_computed_again(tiny: Transformer) -> None:
    cache, table, _ = prefilled(tiny)
    right = cache.pages.clone()
    missing = [7, 1, 4, 5]
    for index in missing:
        cache.corrupt_block(table[index])
    assert recompute_blocks(tiny, cache, table, PROMPT, [*missing, 9]) == 3 * SIZE + 5
    for index, block in enumerate(table):
        filled = SIZE if index < 7 else len(PROMPT) - 7 * SIZE
        computed = cache.pages[block, :, :, :filled]
        assert torch.allclose(computed, right[block, :, :, :filled], rtol=1e-4, atol=1e-5)


# ---- links -------------------------------------------------------------------------------------


def test_a_fit_finds_the_link_behind_noisy_times() -> None:
    noise = np.random.default_rng(0)
    link = LinkModel(150e-6, 3.0)
    sizes = [1 << n for n in range(10, 27)] * 3
    samples = [(size, link.transfer_s(size) * noise.uniform(0.95, 1.05)) for size in sizes]
    fit = fit_link(samples)
    assert fit.link.latency_s == pytest.approx(link.latency_s, rel=0.05)
    assert fit.link.bandwidth_GBps == pytest.approx(link.bandwidth_GBps, rel=0.05)
    assert fit.median_error < 0.05 < fit.worst_error + 0.05 and fit.num_samples == len(sizes)
    with pytest.raises(ValueError, match="two sizes"):
        fit_link([(1000, 0.1), (1000, 0.2)])
    with pytest.raises(ValueError, match="do not grow"):
        fit_link([(1000, 1.0), (10**9, 1e-6)])


def test_messages_share_ports() -> None:
    link = LinkModel(latency_s=1.0, bandwidth_GBps=1e-9)  # a byte a second

    def arrivals(routes: list[tuple[int, int]]) -> list[float]:
        fabric = Fabric(link, VirtualClock())
        return [fabric.send(route, 10).arrives_s for route in routes]

    assert arrivals([(0, 2), (1, 3)]) == [11.0, 11.0], "different ports do not meet"
    assert arrivals([(0, 2), (0, 3)]) == [11.0, 21.0], "one port out"
    assert arrivals([(0, 2), (1, 2)]) == [11.0, 21.0], "one port in"
    assert arrivals([(0, 1), (1, 0)]) == [11.0, 11.0], "the directions are apart"
    assert Fabric(link, VirtualClock()).kind == "modelled"


def test_a_stalled_link_starts_later_and_unknown_links_are_errors() -> None:
    clock = VirtualClock()
    fabric = Fabric({(0, 1): LINKS["400g"]}, clock)
    fabric.stall((0, 1), 5.0)
    delivery = fabric.send((0, 1), 48_000_000)
    assert delivery.arrives_s == pytest.approx(5.0 + 10e-6 + 1e-3)
    with pytest.raises(ValueError, match="no link"):
        fabric.send((1, 0), 1)
    with pytest.raises(ValueError, match="loss"):
        LinkModel(0.0, 1.0, loss=1.0)
