"""RMSNorm, rotary positions, SwiGLU and the cache write against float64 or element by element."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modelzoo import relative_error

from ch15_helpers.kernels.kv_write import write_kv
from ch15_helpers.kernels.rms_norm import rms_norm
from ch15_helpers.kernels.rope import apply_rope, build_cos_sin_cache, inverse_frequencies
from ch15_helpers.kernels.rope_kv_write import rope_and_write_kv
from ch15_helpers.kernels.swiglu import swiglu
from ch15_helpers.model.config import Llama3RopeScaling

SHAPES = [(1, 576), (7, 48), (33, 128), (3, 5, 16)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
)
def test_rms_norm(
    shape: tuple[int, ...], dtype: torch.dtype, tolerance: float, device: str
) -> None:
    torch.manual_seed(0)
    x = (torch.randn(shape) * 3).to(dtype).to(device)
    residual = torch.randn(shape).to(dtype).to(device)
    weight = torch.randn(shape[-1]).to(dtype).to(device)

    def expected(value: torch.Tensor) -> torch.Tensor:
        wide = value.double()
        scale = 1 / torch.sqrt((wide * wide).sum(-1, keepdim=True) / shape[-1] + 0.1)
        return wide * scale * weight.double()

    assert relative_error(rms_norm(x, weight, 0.1), expected(x)) < tolerance
    normalised, total = rms_norm(x, weight, 0.1, residual)
    assert torch.equal(total, x + residual)
    assert relative_error(normalised, expected(total)) < tolerance
    assert normalised.dtype == dtype


@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu(shape: tuple[int, ...], device: str) -> None:
    torch.manual_seed(0)
    gate_up = (torch.randn(shape) * 4).to(device)
    half = shape[-1] // 2
    gate, up = gate_up[..., :half].double(), gate_up[..., half:].double()
    assert relative_error(swiglu(gate_up), gate / (1 + torch.exp(-gate)) * up) < 1e-6


@pytest.mark.parametrize("head_dim", [16, 64, 96, 128])
@pytest.mark.parametrize("fused", [True, False])
def test_rope_rotates_each_pair(head_dim: int, fused: bool, device: str) -> None:
    """Channel i and i + d/2 turn by position * theta ** (-2i / d), computed with math.cos."""
    torch.manual_seed(0)
    cache = build_cos_sin_cache(head_dim, 4096, 10000.0, device=device)
    positions = torch.tensor([0, 1, 17, 4095], device=device)
    qkv = torch.randn(4, 9, head_dim, device=device)
    q, k = qkv[:, :6], qkv[:, 6:8]
    if not fused:
        q, k = q.clone(), k.clone()
    out_q, out_k = apply_rope(q, k, cache, positions)
    for source, out in ((q, out_q), (k, out_k)):
        assert out.shape == source.shape
        expected = torch.empty(source.shape, dtype=torch.float64)
        for token, position in enumerate(positions.tolist()):
            for i in range(head_dim // 2):
                angle = position * 10000.0 ** (-2 * i / head_dim)
                a = source[token, :, i].double().cpu()
                b = source[token, :, i + head_dim // 2].double().cpu()
                expected[token, :, i] = a * math.cos(angle) - b * math.sin(angle)
                expected[token, :, i + head_dim // 2] = b * math.cos(angle) + a * math.sin(angle)
        # Angles in float32 are good to 4095 * 2 ** -24 radians.
        assert relative_error(out, expected) < 4e-4
        assert relative_error(out[:3], expected[:3]) < 3e-6


def test_rope_scores_depend_on_distance_only() -> None:
    torch.manual_seed(0)
    cache = build_cos_sin_cache(64, 2048, 10000.0)
    q, k = torch.randn(1, 1, 64), torch.randn(1, 1, 64)

    def score(query_position: int, key_position: int) -> float:
        turned_q, _ = apply_rope(q, k, cache, torch.tensor([query_position]))
        _, turned_k = apply_rope(q, k, cache, torch.tensor([key_position]))
        return float((turned_q * turned_k).sum())

    assert score(105, 100) == pytest.approx(score(5, 0), abs=1e-3)
    assert abs(score(105, 100) - score(106, 100)) > 0.1


def test_llama3_scaling_matches_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(
        hidden_size=4096, num_attention_heads=32, head_dim=128, rope_parameters=parameters
    )
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    ours = inverse_frequencies(128, 500000.0, Llama3RopeScaling(8.0, 1.0, 4.0, 8192))
    assert torch.allclose(ours, expected, rtol=1e-6, atol=0)
    plain = inverse_frequencies(128, 500000.0)
    assert torch.equal(ours[:20], plain[:20])
    assert torch.allclose(ours[-10:], plain[-10:] / 8)


@settings(max_examples=40, deadline=None)
@given(
    num_tokens=st.integers(1, 20),
    block_size=st.sampled_from([4, 8, 16]),
    padding=st.integers(0, 3),
    layer_major=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_write_kv_writes_these_slots_and_no_others(
    num_tokens: int, block_size: int, padding: int, layer_major: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 2, 6, block_size, 2, 8) if layer_major else (6, 2, 2, block_size, 2, 8)
    memory = torch.randn(shape, generator=generator)
    pages = memory.permute(2, 0, 1, 3, 4, 5) if layer_major else memory
    before = pages.clone()
    slots = torch.randperm(6 * block_size, generator=generator)[:num_tokens]
    slots = torch.cat((slots, torch.full((padding,), -1)))
    kv = torch.randn(2, len(slots), 2, 8, generator=generator)
    write_kv(pages[:, 1, 0], pages[:, 1, 1], kv[0], kv[1], slots)
    expected = before.clone()
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[slot // block_size, 1, :, slot % block_size] = kv[:, row]
    assert torch.equal(pages, expected)
    assert not torch.equal(pages, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("slots", [[5, -1, 20, -1], [-1, -1, 3, 9], [-1, -1]])
def test_write_kv_without_a_host_sync(slots: list[int]) -> None:
    pages = torch.randn(4, 2, 2, 8, 2, 16, device="cuda")
    expected = pages.clone()
    kv = torch.randn(2, len(slots), 2, 16, device="cuda")
    mapping = torch.tensor(slots, device="cuda")
    for row, slot in enumerate(slots):
        if slot >= 0:
            expected[slot // 8, 1, :, slot % 8] = kv[:, row]
    torch.cuda.set_sync_debug_mode("error")
    try:
        write_kv(pages[:, 1, 0], pages[:, 1, 1], kv[0], kv[1], mapping)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(pages, expected)


def test_rotating_and_writing_together_is_one_after_the_other(device: str) -> None:
    torch.manual_seed(0)
    pages = torch.randn(2, 6, 16, 2, 32, device=device)
    together = pages.clone()
    qkv = torch.randn(5, 8, 32, device=device)
    q, k, v = qkv.split((4, 2, 2), 1)
    table = build_cos_sin_cache(32, 500, 1e4, device=device)
    positions = torch.tensor([0, 3, 17, 99, 400], device=device)
    slots = torch.tensor([3, -1, 47, 16, -1], device=device)
    rotated_q, rotated_k = apply_rope(q, k, table, positions)
    write_kv(pages[0], pages[1], rotated_k, v, slots)
    out = rope_and_write_kv(q, k, v, together[0], together[1], table, positions, slots)
    # The CPU's own kernel rounds once where torch rounds twice.
    assert relative_error(out, rotated_q) < 1e-6
    assert relative_error(together, pages) < 1e-6
    assert torch.equal(together[1], pages[1]), "values go as they are"
