"""FP8 and INT8 blocks: error bounds, appending, heads apart, scales that travel, and the engine.

Runs on CH15_TEST_DEVICE too: writes and both portable attention backends work on any device.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modelzoo import make_batch, relative_error, scrambled_tables
from torch import Tensor

from ch15_helpers import Engine, EngineConfig, SamplingParams
from ch15_helpers.kernels import kv_quant
from ch15_helpers.kernels.batch import BatchMetadata
from ch15_helpers.kernels.kv_quant import (
    decode,
    dequantise,
    encode,
    largest_value,
    quantise,
    resolve_kv_dtype,
    scale_for,
    write_kv_quantised,
)
from ch15_helpers.kernels.paged_attention import paged_attention
from ch15_helpers.kv.cache import PagedKVCache, num_blocks_for_memory, swap_blocks
from ch15_helpers.kv.quantised import QuantisedKVCache, make_kv_cache
from ch15_helpers.kv.tier_config import TierConfig
from ch15_helpers.model.config import SMOLLM2_135M, TINY

NAMES = ["int8", "fp8_e4m3"]
DTYPES = {"int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn}
HEADS, DIM = TINY.num_key_value_heads, TINY.head_dim


def bound(x: Tensor, scale: Tensor, name: str, appended: bool = False) -> Tensor:
    """Largest error that the module's documentation allows; scale broadcasts against x."""
    if name == "int8":
        return scale * (1.0 if appended else 0.5)
    once = torch.maximum(x.abs() / 16, scale * 2**-10)
    return once + scale * 2**-9 if appended else once


def wild(shape: tuple[int, ...], seed: int) -> Tensor:
    """Values of very different sizes, by head too."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return x * torch.exp(3 * torch.randn(*shape[:-1], 1, generator=generator))


def metadata(
    query_lens: list[int], context_lens: list[int], tables: list[list[int]], size: int, device: str
) -> BatchMetadata:
    return make_batch(query_lens, context_lens, tables, size, device)[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("magnitude", [1e-30, 1e-3, 1.0, 5e4, 1e30])
def test_round_trip_is_within_the_bound_and_zeros_are_not(name: str, magnitude: float) -> None:
    x = wild((3, 16, 4, 32), seed=1) * magnitude
    stored, scale = quantise(x, DTYPES[name])
    assert stored.dtype == DTYPES[name] and stored.element_size() == 1
    wide = scale[:, None, :, None]
    limit = bound(x, wide, name)
    error = (dequantise(stored, scale) - x).abs()
    assert (error <= limit * (1 + 1e-5)).all()
    assert (x.abs() > limit).any(dim=3).any(dim=1).all()  # zeros fail in every block and head
    tame = torch.randn(3, 16, 4, 32)
    assert (tame.abs() > bound(tame, quantise(tame, DTYPES[name])[1][:, None, :, None], name)).mean(
        dtype=torch.float32
    ) > 0.95
    largest = x.abs().amax(dim=(1, 3))
    assert (scale * largest_value(DTYPES[name]) >= largest * (1 - 1e-6)).all()
    assert (scale * largest_value(DTYPES[name]) < 2 * largest).all()


def test_scales_are_the_smallest_powers_of_two_that_do() -> None:
    largest = torch.tensor([0.0, 127.0, 127.01, 254.0, 1e-38, 3e38, float("inf"), float("nan")])
    scale = scale_for(largest, torch.int8)
    assert scale[:4].tolist() == [0.0, 1.0, 2.0, 2.0]
    assert (scale[4:6].frexp().mantissa == 0.5).all()
    assert scale[6:].isnan().all()


def test_every_fp8_value_decodes_as_torch_does() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    finite = (every & 0x7F) != 0x7F
    ours = decode(every, torch.float8_e4m3fn)[finite]
    assert torch.equal(ours, every.view(torch.float8_e4m3fn).float()[finite])
    again = encode(ours, torch.float8_e4m3fn)
    assert torch.equal(again, every[finite])


def test_what_is_out_of_range_is_clamped_and_never_stored_as_nan() -> None:
    odd = torch.tensor([1e9, -1e9, float("nan"), float("inf")])
    for dtype in DTYPES.values():
        limit = largest_value(dtype)
        assert decode(encode(odd, dtype), dtype).tolist() == [limit, -limit, 0.0, limit]


def written(
    name: str, x: Tensor, steps: list[int], device: str, size: int = 8
) -> tuple[QuantisedKVCache, list[int]]:
    """A cache with one sequence, K = x and V = -x [tokens, heads, dim], written in some steps."""
    tables, num_blocks = scrambled_tables([len(x)], size, seed=3)
    cache = make_kv_cache(TINY, num_blocks, size, dtype=name, device=device)
    assert isinstance(cache, QuantisedKVCache)
    done = 0
    for count in steps:
        batch = metadata([count], [done + count], tables, size, device)
        k = x[done : done + count].to(device)
        views = cache.pages[:, 1, 0], cache.pages[:, 1, 1]
        write_kv_quantised(*views, cache.scales[:, 1, 0], cache.scales[:, 1, 1], k, -k, batch)
        done += count
    assert done == len(x)
    return cache, tables[0]


def read(cache: QuantisedKVCache, table: list[int], tokens: int) -> tuple[Tensor, Tensor]:
    """K [tokens, heads, dim] of layer 1, and the scale of each [tokens, heads, 1]; V checked."""
    blocks = torch.stack([cache.dequantised(b)[1] for b in table]).cpu()  # [n, 2, size, H, D]
    scales = cache.scales[table, 1].cpu()  # [n, 2, H]
    assert torch.equal(blocks[:, 0], -blocks[:, 1]) and torch.equal(scales[:, 0], scales[:, 1])
    wide = scales[:, 0].repeat_interleave(cache.block_size, 0)[:tokens, :, None]
    return blocks[:, 0].flatten(0, 1)[:tokens], wide


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    steps=st.lists(st.integers(1, 11), min_size=1, max_size=12),
    seed=st.integers(0, 99),
)
def test_appending_equals_writing_at_once_within_the_bound(
    name: str, steps: list[int], seed: int
) -> None:
    x = wild((sum(steps), HEADS, DIM), seed)
    at_once, scale = read(*written(name, x, [len(x)], "cpu"), len(x))
    appended, grown = read(*written(name, x, steps, "cpu"), len(x))
    assert torch.equal(grown, scale)  # the final scale does not depend on the way
    assert ((at_once - x).abs() <= bound(x, scale, name) * (1 + 1e-5)).all()
    assert ((appended - x).abs() <= bound(x, scale, name, appended=True) * (1 + 1e-5)).all()


@pytest.mark.parametrize("name", NAMES)
def test_token_by_token_on_the_device(name: str, device: str) -> None:
    """Decode steps take the path of fixed shapes on a GPU."""
    x = wild((21, HEADS, DIM), seed=5)
    appended, scale = read(*written(name, x, [1] * 21, device), 21)
    assert ((appended - x).abs() <= bound(x, scale, name, appended=True) * (1 + 1e-5)).all()
    assert (appended - x).abs().max() > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [[1] * 21, [21], [5, 1, 1, 9, 5]])
def test_one_launch_writes_what_torch_writes(
    name: str, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = wild((21, HEADS, DIM), seed=8)
    x[17, 1, 3] = float("inf")
    kernel, table = written(name, x, steps, "cuda")
    monkeypatch.setattr(kv_quant, "_can_use_triton", lambda *tensors: False)
    plain, _ = written(name, x, steps, "cuda")
    assert torch.equal(kernel.scales.nan_to_num(-1), plain.scales.nan_to_num(-1))
    for block in table[:2]:
        assert torch.equal(kernel.dequantised(block), plain.dequantised(block))


@pytest.mark.parametrize("name", NAMES)
def test_an_outlier_costs_its_own_head_only(name: str, device: str) -> None:
    x = torch.randn(16, HEADS, DIM, generator=torch.Generator().manual_seed(0))
    clean, _ = read(*written(name, x, [16], device), 16)
    x[3, 0, 7] = 1e5
    dirty, _ = read(*written(name, x, [5, 11], device), 16)
    assert torch.equal(dirty[:, 1:], clean[:, 1:])
    assert not torch.equal(dirty[:8, 0], clean[:8, 0])
    assert torch.equal(dirty[8:], clean[8:])  # nor another block


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_poisons_its_head_until_the_block_is_reused(
    name: str, value: float, device: str
) -> None:
    x = torch.randn(16, HEADS, DIM, generator=torch.Generator().manual_seed(0))
    x[9, 1, 0] = value
    cache, table = written(name, x, [9, 1, 6], device)
    keys = torch.stack([cache.dequantised(b)[1, 0] for b in table]).flatten(0, 1).cpu()
    assert keys[8:, 1].isnan().all()
    assert keys[:, 0].isfinite().all() and keys[:8].isfinite().all()
    batch = metadata([8], [8], [[table[1]]], 8, device)
    k = torch.ones(8, HEADS, DIM, device=device)
    views = cache.pages[:, 1, 0], cache.pages[:, 1, 1]
    write_kv_quantised(*views, cache.scales[:, 1, 0], cache.scales[:, 1, 1], k, k, batch)
    assert torch.equal(cache.dequantised(table[1])[1, 0].cpu(), torch.ones(8, HEADS, DIM))


@pytest.mark.parametrize("name", NAMES)
def test_a_new_owner_resets_the_scale(name: str, device: str) -> None:
    cache, table = written(name, torch.full((8, HEADS, DIM), 1e6), [8], device)
    batch = metadata([1], [1], [[table[0]]], 8, device)
    k = torch.full((1, HEADS, DIM), 0.5, device=device)
    views = cache.pages[:, 1, 0], cache.pages[:, 1, 1]
    write_kv_quantised(*views, cache.scales[:, 1, 0], cache.scales[:, 1, 1], k, k, batch)
    assert torch.equal(cache.dequantised(table[0])[1, 0, 0], k[0])


@pytest.mark.parametrize("name", NAMES)
def test_padding_is_not_written(name: str, device: str) -> None:
    cache, table = written(name, wild((8, HEADS, DIM), 0), [8], device)
    before = cache.content.clone()
    for lens in ([1, 1], [2, 2]):
        batch = metadata(lens, [5, 5], [[table[0]], [table[0]]], 8, device)
        batch.slot_mapping.fill_(-1)
        k = torch.full((sum(lens), HEADS, DIM), 9.0, device=device)
        views = cache.pages[:, 1, 0], cache.pages[:, 1, 1]
        write_kv_quantised(*views, cache.scales[:, 1, 0], cache.scales[:, 1, 1], k, k, batch)
    assert torch.equal(cache.content, before)


@pytest.mark.parametrize("name", NAMES)
def test_moving_blocks_moves_their_scales(name: str, device: str) -> None:
    cache, table = written(name, wild((24, HEADS, DIM), 2), [24], device)
    source, free = table[0], next(b for b in range(cache.num_blocks) if b not in table)
    expected = cache.dequantised(source).clone()
    cache.copy_blocks([(source, free)])
    assert torch.equal(cache.dequantised(free), expected) and expected.any()
    host = make_kv_cache(TINY, 5, 8, dtype=name)
    assert isinstance(host, QuantisedKVCache)
    swap_blocks(cache, host, [(source, 4), (table[1], 0)])
    assert torch.equal(host.dequantised(4), expected.cpu())
    packed = cache.read_blocks([source])
    assert packed.shape == (1, cache.block_bytes) and packed.dtype == torch.uint8
    host.write_blocks([2], packed)
    assert torch.equal(host.dequantised(2), expected.cpu())
    with pytest.raises(ValueError, match="pools differ"):
        swap_blocks(cache, PagedKVCache(TINY, 5, 8), [(0, 0)])


@pytest.mark.parametrize("name", NAMES)
def test_damage_shows(name: str, device: str) -> None:
    for how in ("scramble", "zero"):
        cache, table = written(name, wild((24, HEADS, DIM), 2), [24], device)
        before = [cache.dequantised(b) for b in table]
        cache.corrupt_block(table[1], how)  # type: ignore[arg-type]
        after = [cache.dequantised(b) for b in table]
        assert torch.equal(after[0], before[0]) and torch.equal(after[2], before[2])
        assert relative_error(after[1], before[1]) > 0.5
    with pytest.raises(ValueError, match="scramble or zero"):
        cache.corrupt_block(0, "burn")  # type: ignore[arg-type]


def test_capacity_is_counted_from_allocations() -> None:
    for name in NAMES:
        cache = make_kv_cache(SMOLLM2_135M, 4, 16, dtype=name)
        plain = make_kv_cache(SMOLLM2_135M, 4, 16, dtype=torch.bfloat16)
        real = cache.content.untyped_storage().nbytes()
        gain = plain.pages.untyped_storage().nbytes() / real
        assert real == cache.nbytes and 1.99 < gain < 2
        budget = 100 * 2**20
        fits = num_blocks_for_memory(budget, SMOLLM2_135M, 16, DTYPES[name])
        assert fits == budget // cache.block_bytes


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a torch dtype or one of fp8_e4m3, int8"):
        resolve_kv_dtype("int4")
    with pytest.raises(ValueError, match="cannot hold"):
        make_kv_cache(TINY, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="make_kv_cache"):
        PagedKVCache(TINY, 2, dtype=torch.int8)
    with pytest.raises(ValueError, match="not quantised"):
        QuantisedKVCache(TINY, 2, dtype=torch.float32)
    with pytest.raises(ValueError, match="must be block_major"):
        make_kv_cache(TINY, 2, dtype="int8", layout="layer_major")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("query_lens", [[1, 1, 1], [7, 1, 40]])
def test_attention_reads_what_is_stored(
    name: str, backend: str, query_lens: list[int], device: str
) -> None:
    """Equal to attention over a float cache that holds the decoded values."""
    context_lens, size = [40, 9, 90], 8
    tables, num_blocks = scrambled_tables(context_lens, size)
    cache = make_kv_cache(TINY, num_blocks, size, dtype=name, device=device)
    plain = make_kv_cache(TINY, num_blocks, size, device=device)
    assert isinstance(cache, QuantisedKVCache)
    for block in range(num_blocks):
        cache.store(block, wild(tuple(plain.pages.shape[1:]), block).to(device))
        plain.pages[block] = cache.dequantised(block)
    batch = metadata(query_lens, context_lens, tables, size, device)
    q = torch.randn(sum(query_lens), TINY.num_attention_heads, DIM).to(device)

    def attend(pages: Tensor, *scales: Tensor) -> Tensor:
        fresh = dataclasses.replace(batch, scratch={})
        return paged_attention(q, pages[:, 1, 0], pages[:, 1, 1], fresh, 0.25, backend, *scales)

    quantised = attend(cache.pages, cache.scales[:, 1, 0], cache.scales[:, 1, 1])
    assert relative_error(quantised, attend(plain.pages)) < 1e-5


# ---- in the engine -------------------------------------------------------------------------

GREEDY = SamplingParams(max_tokens=20, ignore_eos=True)
PROMPTS = [[3, 5, 7, 11, 13], list(range(2, 40)), [9, 9, 9], list(range(100, 117))]


def serve(model: Any, **config: Any) -> list[list[int]]:
    engine = Engine(model, EngineConfig(**{"block_size": 8, "num_blocks": 64} | config))
    outputs = engine.generate(PROMPTS, GREEDY)
    engine.check_invariants()
    assert not any(output.error for output in outputs)
    return [output.token_ids for output in outputs]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "way",
    [
        {"attention_backend": "reference"},
        {"max_num_batched_tokens": 64},
        {"num_blocks": 14, "preemption": "swap", "num_host_blocks": 40},
    ],
    ids=["reference", "chunks", "swap"],
)
def test_engine_gives_the_same_tokens_another_way(
    tiny: Any, name: str, way: dict[str, Any]
) -> None:
    """Swapping moves stored bytes, so it changes nothing; other ways round differently at most."""
    expected = serve(tiny, kv_dtype=name)
    got = serve(tiny, kv_dtype=name, **way)
    same = [a == b for a, b in zip(got, expected, strict=True)]
    assert all(same) if "preemption" in way else sum(same) >= 3


@pytest.mark.parametrize("name", NAMES)
def test_cached_and_promoted_blocks_keep_their_scales(tiny: Any, name: str) -> None:
    """Prefixes come back from the pool or, pushed out of it, from the host; same tokens."""
    prompts = [[seed, *range(seed, seed + 60)] for seed in (3, 70, 140, 210)]
    config = EngineConfig(
        block_size=8,
        num_blocks=24,
        kv_dtype=name,
        enable_prefix_caching=True,
        tiers=TierConfig(host_blocks=64),
    )
    engine = Engine(tiny, config)
    plain = Engine(tiny, dataclasses.replace(config, enable_prefix_caching=False, tiers=None))
    short = SamplingParams(max_tokens=4, ignore_eos=True)
    hits = 0
    for _ in range(2):
        for prompt in prompts:
            output = engine.generate([prompt], short)[0]
            assert output.token_ids == plain.generate([prompt], short)[0].token_ids
            hits += output.metrics.num_cached_tokens
    assert hits >= 4 * 48  # the second round computes little
    engine.check_invariants()


@pytest.mark.parametrize("name", NAMES)
def test_pool_is_sized_for_the_type(tiny: Any, name: str) -> None:
    engine = Engine(tiny, EngineConfig(max_num_seqs=1, max_model_len=64, kv_dtype=name))
    assert engine.cache.dtype == DTYPES[name] and engine.cache.num_blocks == 4


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_near_those_of_the_float_cache(smollm2: Any, name: str, device: str) -> None:
    """And not equal: the stored bytes are what attention reads."""
    tokens = smollm2.tokenizer.encode("The KV cache holds the keys and values of all tokens. " * 6)
    logits = {}
    for dtype in (torch.float32, name):
        cache = make_kv_cache(smollm2.config, 12, dtype=dtype, device=device)
        table = [list(range(12))]
        done = 0
        for count in (len(tokens) - 20, *[1] * 20):
            batch, positions = make_batch([count], [done + count], table, 16, device)
            ids = torch.tensor(tokens[done : done + count], device=device)
            out = smollm2.forward(ids, positions, cache.pages, batch, kv_scales=cache.scales)
            done += count
        logits[dtype] = out
    error = relative_error(logits[name], logits[torch.float32])
    assert 1e-5 < error < (0.1 if name == "int8" else 0.15)
    assert logits[name].argmax() == logits[torch.float32].argmax()
