"""Weights on a grid or in tiles: kept without loss, multiplied as exactly as their dtype allows."""

from __future__ import annotations

import pytest
import torch
from modelzoo import make_batch, relative_error, scrambled_tables
from test_cpu_library import check_rows_are_independent
from torch import Tensor

from ch15_helpers import load_model
from ch15_helpers.kernels.cpu_library import cpu_library
from ch15_helpers.kernels.linear import gated_linear, linear
from ch15_helpers.kernels.linear_cpu import (
    can_gate,
    compiled_linear,
    compiled_shape,
    grid_bits,
    layouts_of,
    pack_weight,
    unpack_weight,
)
from ch15_helpers.kernels.rms_norm import rms_norm
from ch15_helpers.kernels.rope import apply_rope, build_cos_sin_cache
from ch15_helpers.kernels.rope_kv_write import rope_and_write_kv
from ch15_helpers.kernels.swiglu import swiglu

pytestmark = pytest.mark.skipif(
    "grid" not in layouts_of(torch.float32), reason="no matrix tiles (AMX) or no C++ compiler"
)


def _grid_weight(kind: str, outputs: int, depth: int, seed: int = 0) -> Tensor:
    """What ggml's Q4_0, Q4_1 or Q8_0 hold, as float32: halves for scale and minimum."""
    generator = torch.Generator().manual_seed(seed)
    blocks = outputs, depth // 32, 1
    scale = (torch.rand(blocks, generator=generator) * 0.1 + 1e-3).half().float()
    if kind == "q4_1":
        minimum = (torch.randn(blocks, generator=generator) * 0.3).half().float()
        steps = torch.randint(0, 16, (*blocks[:2], 32), generator=generator).float()
        steps[..., 3], steps[..., 9] = 0, 15  # its quantiser reaches both ends
        return (steps * scale + minimum).view(outputs, depth)
    low, high = (-8, 7) if kind == "q4_0" else (-127, 127)
    steps = torch.randint(low, high + 1, (*blocks[:2], 32), generator=generator).float()
    steps[..., 5] = low
    return (steps * scale).view(outputs, depth)


@pytest.mark.parametrize(("kind", "bits"), [("q4_0", 4), ("q4_1", 4), ("q8_0", 8)])
@pytest.mark.parametrize("shape", [(16, 32), (96, 64), (192, 576), (32, 1536)])
def test_exact_weights_and_products_against_float64(
    kind: str, bits: int, shape: tuple[int, int]
) -> None:
    weight = _grid_weight(kind, *shape)
    packed = pack_weight(weight, "grid")
    assert packed.dtype == torch.uint8 and grid_bits(packed) == bits
    assert compiled_shape(packed) == shape and packed.nbytes < weight.nbytes / 3
    assert torch.equal(unpack_weight(packed), weight)
    bias = torch.randn(shape[0])
    for rows in (0, 1, 2, 5, 8, 9, 16, 17, 61):
        x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(rows))
        expected = x.double() @ weight.double().T
        out = linear(x, packed)
        assert out.shape == (rows, shape[0])
        if not rows:
            continue
        assert relative_error(out, expected) < 1e-6
        assert relative_error(linear(x, packed, bias), expected + bias.double()) < 1e-6
        assert can_gate(packed) == (shape[0] > 16)
        if can_gate(packed):
            gated = gated_linear(x / 100, packed)
            assert relative_error(gated, swiglu(expected / 100)) < 3e-6


def test_more_rows_than_a_cache_holds() -> None:
    weight = _grid_weight("q4_1", 64, 1536)
    x = torch.randn(403, 1536, generator=torch.Generator().manual_seed(1)) / 100
    packed = pack_weight(weight, "grid")
    expected = x.double() @ weight.double().T
    assert relative_error(compiled_linear(x, packed), expected) < 1e-6
    assert relative_error(compiled_linear(x, packed, gated=True), swiglu(expected)) < 3e-6


def test_a_row_depends_on_itself_alone() -> None:
    x = torch.randn(300, 576)
    packed = pack_weight(_grid_weight("q4_1", 128, 576), "grid")
    check_rows_are_independent(x, packed, (1, 3, 8, 16, 33))
    with pytest.raises(ValueError, match="needs float32"):
        compiled_linear(x[:, 1:], packed)


@pytest.mark.parametrize("place", [(0, 0), (37, 95), (63, 64)])
def test_one_number_off_the_grid_keeps_the_floats(place: tuple[int, int]) -> None:
    weight = _grid_weight("q4_1", 64, 96)
    weight[place] += 1e-5
    packed = pack_weight(weight, "grid")
    assert packed.dim() == 4, "in panels of floats, as the layout `compiled` has them"
    assert torch.equal(unpack_weight(packed), weight)
    for shape in ((64, 40), (40, 64)):
        assert pack_weight(torch.zeros(shape), "grid").dtype == torch.float32


def test_blocks_of_one_number_and_of_zeros() -> None:
    weight = torch.cat((torch.zeros(16, 64), torch.full((16, 64), -0.37)))
    packed = pack_weight(weight, "grid")
    assert grid_bits(packed) == 4 and torch.equal(unpack_weight(packed), weight)
    x = torch.randn(3, 64)
    assert relative_error(linear(x, packed), x.double() @ weight.double().T) < 1e-6


def test_smollm2_is_held_without_loss_in_a_quarter_of_the_bytes() -> None:
    plain = load_model("smollm2", "cpu", cpu_layout="rows")
    model = load_model("smollm2", "cpu", cpu_layout="grid")
    packed = [model.lm_head]
    for layer in model.layers:
        weights = layer.compiled_weights()
        assert weights is not None
        packed += [weights.qkv_proj, weights.o_proj, weights.gate_up_proj, weights.down_proj]
    assert {weight.dtype for weight in packed} == {torch.uint8}
    assert sum(weight.nbytes for weight in packed) < 0.22 * plain.weight_bytes
    for (name, ours), (_, theirs) in zip(model.named_weights(), plain.named_weights(), strict=True):
        assert torch.equal(ours, theirs), name
    assert cpu_library() is not None
    ids = torch.arange(40)[None] * 7
    assert relative_error(model.forward_dense(ids), plain.forward_dense(ids)) < 1e-4


@pytest.mark.parametrize("shape", [(16, 32), (48, 64), (576, 1536)])
def test_bfloat16_tiles_against_float64(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).bfloat16()
    packed = pack_weight(weight, "tiles")
    assert packed.dim() == 5 and torch.equal(unpack_weight(packed), weight)
    for rows in (0, 1, 2, 15, 16, 17, 32, 33, 49):
        x = torch.randn(rows, shape[1], generator=generator).bfloat16()
        expected = x.double() @ weight.double().T
        out = linear(x, packed)
        assert out.shape == (rows, shape[0]) and out.dtype == torch.bfloat16
        if not rows:
            continue
        assert relative_error(out, expected) < 4e-3
        assert torch.equal(linear(x[-1:], packed), out[-1:]), "a row depends on itself alone"
        if shape[0] % 32 == 0:
            gated = gated_linear(x / 64, packed)
            assert relative_error(gated, swiglu(expected / 64)) < 1e-2
            assert torch.equal(gated_linear(x[:1] / 64, packed), gated[:1])
    with pytest.raises(ValueError, match="needs bfloat16"):
        compiled_linear(torch.randn(2, shape[1]), packed)


def test_bfloat16_layers_in_one_call_and_one_by_one() -> None:
    """The step's one call for a layer rounds where the separate operations do."""
    model = load_model("random:TINY", "cpu", torch.bfloat16, cpu_layout="tiles")
    config = model.config
    tables, num_blocks = scrambled_tables([5, 9], 4)
    batch, positions = make_batch([5, 1], [5, 9], tables, 4)
    shape = num_blocks, config.num_hidden_layers, 2, 4, config.num_key_value_heads, config.head_dim
    states, pages = [], [torch.zeros(shape, dtype=torch.bfloat16) for _ in range(2)]
    for backend, cache in zip(("compiled", "sdpa"), pages, strict=True):
        states.append(
            model.forward_hidden(
                torch.arange(6), positions, cache, batch, attention_backend=backend
            )
        )
    assert model.layers[0].compiled_weights() is not None, "the first goes the one way"
    assert relative_error(states[0], states[1]) < 2e-2
    assert relative_error(pages[0], pages[1]) < 2e-2


@pytest.mark.parametrize("rows", [1, 7, 40])
def test_bfloat16_norm_and_rotation_against_torch(rows: int) -> None:
    x, residual = torch.randn(2, rows, 576).bfloat16()
    weight = torch.randn(576).bfloat16()
    out, total = rms_norm(x, weight, 1e-5, residual)
    assert torch.equal(total, x + residual)
    wide = total.double()
    scale = (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    assert relative_error(out, (wide * scale).bfloat16().double() * weight.double()) < 6e-3
    q, k, v = torch.randn(rows, 10, 20).bfloat16().split((6, 2, 2), dim=1)
    cache, positions = build_cos_sin_cache(20, 64, 1e4), torch.arange(rows)
    pages = torch.zeros(2, 6, 8, 2, 20, dtype=torch.bfloat16)
    rotated = rope_and_write_kv(q, k, v, *pages, cache, positions, torch.arange(rows))
    wide_q, wide_k = apply_rope(q.double(), k.double(), cache, positions)
    assert relative_error(rotated, wide_q) < 6e-3
    assert relative_error(pages[0].view(-1, 2, 20)[:rows], wide_k) < 6e-3
    assert torch.equal(pages[1].view(-1, 2, 20)[:rows], v)
