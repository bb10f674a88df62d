"""Roofline numbers, computed by hand for small models."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ch15_helpers.bench import roofline
from ch15_helpers.bench.roofline import Work
from ch15_helpers.ceilings import Ceilings
from ch15_helpers.errors import InvalidRequestError
from ch15_helpers.model.config import ModelConfig

DENSE = ModelConfig(
    architecture="llama",
    vocab_size=100,
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    tie_word_embeddings=True,
)
MOE = ModelConfig(
    architecture="mixtral",
    vocab_size=100,
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    tie_word_embeddings=False,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
)
# Per layer: q 8·8, k and v 8·4 each, o 8·8 = 192; feed-forward 3·8·16 = 384. Head 100·8.
ATTENTION, FEED_FORWARD, ROUTER, HEAD = 192, 384, 32, 800
KV_ELEMENTS = 2 * 2 * 1 * 4  # per token: layers, K and V, heads, head size


def test_decode_step_by_hand() -> None:
    work = roofline.decode_step_work(DENSE, [10, 6], dtype_bytes=2)
    weights = 2 * (ATTENTION + FEED_FORWARD) + HEAD
    assert work.bytes == weights * 2 + 16 * KV_ELEMENTS * 2
    matmuls = 2 * 2 * weights  # two tokens, a multiply-add is two operations
    attention = 4 * 16 * 8 * 2  # QK and PV: 16 pairs, 2 heads of 4, 2 layers
    assert work.flops == matmuls + attention


def test_prefill_by_hand() -> None:
    work = roofline.prefill_work(DENSE, [3], dtype_bytes=4)
    assert work.bytes == (2 * 576 + HEAD) * 4 + 3 * KV_ELEMENTS * 4
    pairs = 1 + 2 + 3
    assert work.flops == 2 * 3 * 2 * 576 + 4 * pairs * 8 * 2 + 2 * HEAD


def test_a_split_prefill_does_the_same_attention_and_reads_weights_twice() -> None:
    whole = roofline.step_work(DENSE, [8], [8], 2, num_sampled=0)
    first = roofline.step_work(DENSE, [5], [5], 2, num_sampled=0)
    second = roofline.step_work(DENSE, [3], [8], 2, num_sampled=0)
    assert first.flops + second.flops == whole.flops
    rereads = 5 * KV_ELEMENTS * 2  # the second chunk reads the first one's keys and values
    assert first.bytes + second.bytes == whole.bytes + 2 * 576 * 2 + rereads


def test_moe_reads_touched_experts_and_computes_chosen_ones() -> None:
    work = roofline.decode_step_work(MOE, [10], dtype_bytes=2, experts_touched=2)
    weights = 2 * (ATTENTION + 2 * FEED_FORWARD + ROUTER) + HEAD
    assert work.bytes == weights * 2 + 10 * KV_ELEMENTS * 2
    assert work.flops == 2 * weights + 4 * 10 * 8 * 2
    four = roofline.decode_step_work(MOE, [10], dtype_bytes=2, experts_touched=4)
    assert four.bytes - work.bytes == 2 * 2 * FEED_FORWARD * 2
    assert four.flops == work.flops


def test_expected_experts() -> None:
    assert roofline.expected_experts_touched(128, 8, 1) == pytest.approx(8)
    assert roofline.expected_experts_touched(4, 2, 2) == pytest.approx(3)
    assert roofline.expected_experts_touched(128, 8, 10_000) == pytest.approx(128)
    default = roofline.decode_step_work(MOE, [10, 10], 2)
    assert default == roofline.decode_step_work(MOE, [10, 10], 2, experts_touched=3.0)
    with pytest.raises(InvalidRequestError):
        roofline.expected_experts_touched(4, 5, 1)


def test_kv_cache_may_have_another_dtype() -> None:
    full = roofline.decode_step_work(DENSE, [10], 2)
    fp8 = roofline.decode_step_work(DENSE, [10], 2, kv_dtype_bytes=1)
    assert full.bytes - fp8.bytes == 10 * KV_ELEMENTS


def test_weights_read_agree_with_the_parameter_count() -> None:
    """Against the model's own count: all but norms (and an untied embedding) are read once."""
    work = roofline.step_work(DENSE, [1], [1], dtype_bytes=1)
    norms = 2 * 2 * 8 + 8
    assert work.bytes - KV_ELEMENTS == DENSE.num_parameters() - norms
    work = roofline.step_work(MOE, [1], [1], dtype_bytes=1)
    assert work.bytes - KV_ELEMENTS == MOE.num_parameters(active_only=True) - norms - HEAD


def test_the_larger_of_both_limits_counts() -> None:
    c = Ceilings(100.0, 100.0, {"float32": 2.0}, 5.0, None)  # 100 GB/s, 2 TFLOP/s: ridge at 20
    memory, compute = Work(10e9, 1e9), Work(40e9, 1e9)
    assert roofline.limit_s(memory, c, "float32") == pytest.approx(0.010)
    assert roofline.limit_s(compute, c, "float32") == pytest.approx(0.020)
    assert roofline.bound_by(memory, c, "float32") == "memory"
    assert roofline.bound_by(compute, c, "float32") == "compute"
    assert roofline.fraction_of_limit(0.040, compute, c, "float32") == pytest.approx(0.5)
    assert (memory + compute).intensity == 25
    with pytest.raises(InvalidRequestError):
        roofline.fraction_of_limit(0.0, memory, c, "float32")


def test_generation_limit_is_the_sum_of_its_steps() -> None:
    c = Ceilings(1.0, 1.0, {"float32": 1e-6}, 5.0, None)
    steps = [roofline.prefill_work(DENSE, [4, 2], 4)]
    steps += [roofline.decode_step_work(DENSE, [4 + i, 2 + i], 4) for i in (1, 2)]
    expected = sum(roofline.limit_s(w, c, "float32") for w in steps)
    assert roofline.generate_limit_s(DENSE, [4, 2], 3, c, "float32", 4) == pytest.approx(expected)


@pytest.mark.parametrize(("query", "context"), [([1], []), ([], []), ([3], [2]), ([0], [1])])
def test_senseless_lengths_are_refused(query: list[int], context: list[int]) -> None:
    with pytest.raises(InvalidRequestError, match="expected"):
        roofline.step_work(DENSE, query, context, 2)


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), min_size=1, max_size=8))
def test_batching_never_moves_more_bytes_than_running_alone(lens: list[tuple[int, int]]) -> None:
    query, context = [q for q, _ in lens], [q + c for q, c in lens]
    together = roofline.step_work(DENSE, query, context, 2)
    alone = [roofline.step_work(DENSE, [q], [c], 2) for q, c in zip(query, context, strict=True)]
    assert together.bytes <= sum(w.bytes for w in alone)
    assert together.flops == sum(w.flops for w in alone)
