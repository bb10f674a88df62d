"""The arithmetic of the cache against real allocations, published figures and the scheduler."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ch15_helpers.bench.roofline import prefill_work
from ch15_helpers.errors import CapacityError
from ch15_helpers.kv.blocks import BlockManager, OutOfBlocks
from ch15_helpers.kv.cache import num_blocks_for_memory
from ch15_helpers.kv.quantised import make_kv_cache
from ch15_helpers.kv.reuse import ReuseCost, mooncake_break_even_GBps
from ch15_helpers.kv.sizing import (
    BFLOAT16,
    FORMATS,
    FP8_E4M3,
    INT8,
    NOMINAL_LINKS,
    PUBLISHED_SHAPES,
    KVShape,
    Link,
    block_bytes,
    bytes_per_token,
    exposed_handoff_s,
    kv_bytes,
    move_s,
    num_pieces,
    plan_memory,
    values_bytes_per_token,
)
from ch15_helpers.model.config import LLAMA3_8B, PRESETS, QWEN3_30B_A3B, SMOLLM2_135M

TYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "fp8_e4m3": "fp8_e4m3",
    "int8": "int8",
}


@settings(max_examples=60, deadline=None)
@given(
    preset=st.sampled_from(["TINY", "TINY_MOE", "SMOLLM2_135M"]),
    layers=st.integers(1, 5),
    kv_heads=st.sampled_from([1, 2, 3, 8]),
    head_dim=st.sampled_from([2, 6, 64, 80, 128]),
    block_size=st.integers(1, 33),
    name=st.sampled_from(list(TYPES)),
)
def test_bytes_equal_real_allocations(
    preset: str, layers: int, kv_heads: int, head_dim: int, block_size: int, name: str
) -> None:
    config = dataclasses.replace(
        PRESETS[preset],
        num_hidden_layers=layers,
        num_key_value_heads=kv_heads,
        num_attention_heads=2 * kv_heads,
        head_dim=head_dim,
    )
    cache = make_kv_cache(config, 3, block_size, dtype=TYPES[name])
    size = block_bytes(KVShape.from_config("x", config), FORMATS[name], block_size)
    assert size == cache.block_bytes
    assert 3 * size == cache.nbytes == cache.content.untyped_storage().nbytes()
    held = cache.pages.nbytes + (0 if cache.scales is None else cache.scales.nbytes)
    assert held <= cache.nbytes < held + 3 * math.lcm(16, kv_heads * head_dim)


def test_published_figures() -> None:
    """Llama 3.1 (Meta), and table 1 of "Insights into DeepSeek-V3" (ISCA 2025), in bfloat16."""
    published = {
        "Llama-3.1-8B": 128 * 1024,
        "Llama-3.1-70B": 320 * 1024,
        "DeepSeek-V3": 70_272,
        "Qwen2.5-72B": 327_680,
        "Llama-3.1-405B": 516_096,
    }
    for name, expected in published.items():
        assert values_bytes_per_token(PUBLISHED_SHAPES[name], BFLOAT16) == expected
        assert bytes_per_token(PUBLISHED_SHAPES[name], BFLOAT16) == expected


def test_latent_attention_against_a_tensor() -> None:
    latent = torch.empty(61, 16, 512 + 64, dtype=torch.bfloat16)
    assert block_bytes(PUBLISHED_SHAPES["DeepSeek-V3"], BFLOAT16, 16) == latent.nbytes
    assert PUBLISHED_SHAPES["DeepSeek-V3"].attention == "MLA"


def test_kinds_of_attention() -> None:
    kinds = {name: PUBLISHED_SHAPES[name].attention for name in ("Llama-2-7B", "Falcon-7B")}
    assert kinds == {"Llama-2-7B": "MHA", "Falcon-7B": "MQA"}
    assert KVShape.from_config("x", SMOLLM2_135M).attention == "GQA"


def test_one_byte_formats_halve_bfloat16_but_for_the_scales() -> None:
    shape = PUBLISHED_SHAPES["Llama-3.1-8B"]
    for form in (FP8_E4M3, INT8):
        extra = block_bytes(shape, form) - block_bytes(shape, BFLOAT16) // 2
        assert extra == 4 * 2 * 32 * 8  # float32, K and V, layers, heads; no padding needed here
    assert values_bytes_per_token(shape, INT8) == 65_536


@pytest.mark.parametrize("name", ["bfloat16", "int8"])
def test_plan_agrees_with_the_pool_and_the_block_manager(name: str) -> None:
    shape, form = KVShape.from_config("Llama", LLAMA3_8B), FORMATS[name]
    dtype = torch.bfloat16 if name == "bfloat16" else torch.int8
    plan = plan_memory(24 * 2**30, 16 * 2**30, 2**30, shape, form, 1000, 16, utilization=0.9)
    pool = int(24 * 2**30 * 0.9) - 17 * 2**30
    assert plan.num_blocks == num_blocks_for_memory(pool, LLAMA3_8B, 16, dtype)
    manager = BlockManager(plan.num_blocks, 16)
    for request in range(plan.num_requests):
        manager.ensure(request, 1000, 1000)
    with pytest.raises(OutOfBlocks):
        manager.ensure("one more", 1000, 1000)
    held = plan.num_requests * kv_bytes(shape, form, 1000)
    assert plan.pool == held + plan.unused
    assert plan.rounding == held - plan.num_requests * 1000 * block_bytes(shape, form) // 16


def test_no_room_is_an_error_that_says_why() -> None:
    shape = PUBLISHED_SHAPES["Llama-3.1-8B"]
    with pytest.raises(CapacityError, match="leave no room for a block of 2,097,152"):
        plan_memory(16 * 10**9, 16 * 10**9, 0, shape, BFLOAT16, 1024)
    with pytest.raises(ValueError, match="utilization"):
        plan_memory(10**12, 0, 0, shape, BFLOAT16, 1024, utilization=1.1)
    with pytest.raises(ValueError, match="block_size"):
        block_bytes(shape, BFLOAT16, 0)


def test_moving_rounds_to_blocks_and_counts_pieces() -> None:
    shape = PUBLISHED_SHAPES["Llama-3.1-8B"]
    link = Link("test", GBps=2.0, latency_s=1e-3)
    assert num_pieces(shape, 33, 16, "block_major") == 3
    assert num_pieces(shape, 33, 16, "layer_major") == 3 * 64
    assert num_pieces(PUBLISHED_SHAPES["DeepSeek-V3"], 33, 16, "layer_major") == 3 * 61
    seconds = 3 * 2 * 2**20 / 2e9
    assert move_s(shape, BFLOAT16, 33, link) == pytest.approx(seconds + 3e-3)
    assert move_s(shape, BFLOAT16, 33, link, layout="layer_major") == pytest.approx(seconds + 0.192)
    with pytest.raises(ValueError, match="GBps > 0"):
        Link("broken", 0.0)


def test_nominal_links_say_that_they_are() -> None:
    assert all(link.kind == "nominal" and link.source for link in NOMINAL_LINKS.values())
    lanes = {"PCIe 5.0 x16": 32 * 16, "PCIe 4.0 x16": 16 * 16, "NVMe 4.0 x4": 16 * 4}
    for name, gigatransfers in lanes.items():
        assert NOMINAL_LINKS[name].GBps == pytest.approx(gigatransfers / 8 * 128 / 130, rel=1e-3)


def test_exposed_handoff() -> None:
    assert exposed_handoff_s(0.8, 8.0, 8) == pytest.approx(0.1)  # hidden but for the last layer
    assert exposed_handoff_s(16.0, 8.0, 8) == pytest.approx(16 - 7)  # the link is the bottleneck
    assert exposed_handoff_s(3.0, 0.0, 4) == pytest.approx(3.0)
    layers, compute, transfer = 5, [0.3] * 5, 0.2
    sent = 0.0
    for layer in range(layers):  # written out: a layer is sent once computed and the link is free
        sent = max(sent, sum(compute[: layer + 1])) + transfer
    assert exposed_handoff_s(5 * transfer, sum(compute), 5) == pytest.approx(sent - sum(compute))


@pytest.mark.parametrize("config", [SMOLLM2_135M, LLAMA3_8B, QWEN3_30B_A3B])
def test_operations_are_those_of_the_roofline(config: object) -> None:
    cost = ReuseCost.of(config, BFLOAT16)  # type: ignore[arg-type]
    for tokens in (1, 100, 4096):
        whole = prefill_work(config, [tokens], 2).flops  # type: ignore[arg-type]
        head = 2 * config.vocab_size * config.hidden_size  # type: ignore[attr-defined]
        assert cost.recompute_flops(tokens) == pytest.approx(whole - head, rel=1e-12)


def test_mooncake_figures() -> None:
    """LLaMA3-70B, 8192 tokens: the paper says 6 GB/s on 8×A800 and 19 GB/s on 8×H800."""
    needed = [mooncake_break_even_GBps(8192, 8192, 8, 2, 8 * tflops) for tflops in (312, 989)]
    assert [round(value) for value in needed] == [6, 19]


def test_exact_counts_agree_with_mooncake_where_both_apply() -> None:
    """With their coefficients set to this model's: half the square, and its weights for b."""
    cost, tokens = ReuseCost.of(LLAMA3_8B, BFLOAT16), 4096
    layers, d = LLAMA3_8B.num_hidden_layers, LLAMA3_8B.hidden_size
    b = cost.flops_per_token / layers / d**2
    theirs = mooncake_break_even_GBps(tokens, d, 4, 2, 700, a=2.0, b=b)
    assert cost.break_even_GBps(tokens, 700) == pytest.approx(theirs, rel=1e-4)


@settings(deadline=None)
@given(
    tflops=st.floats(0.05, 2000),
    gigabytes=st.floats(0.01, 500),
    latency_us=st.floats(0, 1e6),
    pieces=st.sampled_from([0.0, 1 / 16, 4.0, 60.0]),
)
def test_break_even_length_is_where_the_decision_turns(
    tflops: float, gigabytes: float, latency_us: float, pieces: float
) -> None:
    cost = ReuseCost.of(LLAMA3_8B, BFLOAT16)
    link = Link("test", gigabytes, latency_us * 1e-6)
    at = cost.break_even_tokens(tflops, link, pieces)
    if at > 1e9:
        return
    beyond = math.ceil(at * 1.01) + 17
    assert cost.should_fetch(beyond, tflops, link, pieces)
    below = math.floor(at * 0.99) - 17
    if below >= 1:
        assert not cost.should_fetch(below, tflops, link, pieces)


def test_break_even_bandwidth_falls_with_the_context() -> None:
    cost = ReuseCost.of(LLAMA3_8B, BFLOAT16)
    needed = [cost.break_even_GBps(tokens, 700) for tokens in (128, 4096, 131072)]
    assert needed == sorted(needed, reverse=True)
    for tokens, bandwidth in zip((128, 4096), needed, strict=False):
        assert cost.should_fetch(tokens, 700, Link("just above", bandwidth * 1.001))
        assert not cost.should_fetch(tokens, 700, Link("just below", bandwidth * 0.999))
