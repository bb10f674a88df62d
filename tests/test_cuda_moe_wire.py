"""Copies that are chosen, packed and unpacked on a GPU against the torch versions. One GPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

from ch15_helpers.kernels.moe_fp8 import FP8
from ch15_helpers.moe.device_copies import make_device_copies, sum_device_copies
from ch15_helpers.moe.dispatch import make_copies
from ch15_helpers.moe.wire import WireFormat

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton"),
]
# (tokens, top k, destinations, slots of each, hidden)
SHAPES = [(1, 1, 2, 3, 16), (7, 3, 2, 5, 40), (70, 4, 3, 4, 136), (515, 8, 8, 16, 2056)]


def routed(tokens: int, top_k: int, slots: int) -> tuple[Tensor, Tensor]:
    """Distinct slots of each token, some of them nowhere, and weights; on the CPU."""
    generator = torch.Generator().manual_seed(tokens)
    order = torch.rand(tokens, slots, generator=generator).argsort(1)[:, :top_k]
    lost = torch.rand(tokens, top_k, generator=generator) < 0.1
    return order.masked_fill(lost, -1), torch.rand(tokens, top_k, generator=generator)


@pytest.mark.parametrize("dedup", [True, False], ids=["copies", "pairs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed_rows_are_those_of_the_torch_version(shape, dtype, dedup):
    tokens, top_k, homes, size, hidden = shape
    slots, weights = routed(tokens, top_k, homes * size)
    wide = torch.float32 if dtype == torch.float32 else torch.bfloat16
    x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(1)).to(wide)
    if tokens > 5:
        x[1, 0], x[2, 3], x[3] = float("inf"), float("nan"), 0.0
        x[4] *= 1e-3
    plain = make_copies(slots, weights, size, homes, dedup)
    copies = make_device_copies(slots.cuda(), weights.cuda(), size, homes, dedup)
    assert torch.equal(copies.counts.cpu(), plain.counts)
    rows = int(plain.counts.sum())
    wire = WireFormat(hidden, dtype, top_k if dedup else 1)
    chosen = (part[:rows] for part in (plain.tokens, plain.slots, plain.weights))
    expected = wire.decode(wire.encode(x, *chosen), wide)
    got = [part.cpu() for part in wire.decode(wire.pack(x.cuda(), copies, rows), wide)]
    assert torch.equal(got[0].nan_to_num(7.0), expected[0].nan_to_num(7.0))
    assert torch.equal(got[1].long(), expected[1])
    assert torch.equal(got[2][got[1] >= 0], expected[2][expected[1] >= 0])
    places = [part.long().sort(1).values for part in (copies.positions.cpu(), plain.positions)]
    assert torch.equal(*places)


@pytest.mark.parametrize("spare", [0, 3])
@pytest.mark.parametrize("shape", [(0, 3, 2, 5, 40), *SHAPES], ids=str)
def test_messages_of_a_fixed_size_hold_each_token_once(shape, spare):
    tokens, top_k, homes, size, hidden = shape
    slots, weights = routed(tokens, top_k, homes * size)
    fixed = max(1, tokens + spare)
    copies = make_device_copies(slots.cuda(), weights.cuda(), size, homes, True, fixed)
    wire = WireFormat(hidden, torch.float32, top_k)
    x = torch.randn(max(1, tokens), hidden)
    rows, ids, _ = wire.decode(wire.pack(x.cuda(), copies, homes * fixed), torch.float32)
    visits = ids.cpu().view(homes, fixed, top_k)
    for home in range(homes):
        local = torch.where(slots.div(size, rounding_mode="floor") == home, slots % size, -1)
        assert torch.equal(visits[home, :tokens].long(), local)
        assert (visits[home, tokens:] == -1).all()
    # As if each destination returned what it got, times the experts that it has of a token.
    factors = (ids >= 0).sum(1, keepdim=True).float()
    out = sum_device_copies(rows * factors, copies, torch.float32).cpu()
    expected = x[:tokens] * (slots >= 0).sum(1, keepdim=True)
    assert torch.allclose(out, expected, rtol=1e-6, atol=1e-6)
