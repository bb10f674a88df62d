"""The matrix product, whole and sliced, against float64."""

from __future__ import annotations

import pytest
import torch
from modelzoo import relative_error

from ch15_helpers.kernels.linear import linear


@pytest.mark.parametrize("rows", [1, 3, 4, 7, 16, 48, 49])
@pytest.mark.parametrize("features", [(96, 576), (576, 49), (80, 48), (50, 30), (128, 64)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(rows: int, features: tuple[int, int], bias: bool, device: str) -> None:
    """Sliced and whole sizes on both sides of the limits; 50 outputs cannot be sliced."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, features[1], generator=generator)
    weight = torch.randn(features, generator=generator)
    offset = torch.randn(features[0], generator=generator) if bias else None
    expected = x.double() @ weight.double().T
    if offset is not None:
        expected += offset.double()
    out = linear(x.to(device), weight.to(device), None if offset is None else offset.to(device))
    assert out.is_contiguous()
    assert relative_error(out, expected) < 2e-6


def test_sliced_weight_is_not_copied() -> None:
    """The weight may be a slice of a fused one; writing to it shows in the next product."""
    fused = torch.randn(960, 576)
    x = torch.randn(8, 576)
    before = linear(x, fused[576:768])
    fused[576:768] *= 2
    assert torch.allclose(linear(x, fused[576:768]), 2 * before)


def test_bfloat16_and_empty_batches() -> None:
    x, weight = torch.randn(8, 64).bfloat16(), torch.randn(96, 64).bfloat16()
    expected = x.double() @ weight.double().T
    assert relative_error(linear(x, weight), expected) < 1e-2
    assert linear(x[:0], weight).shape == (0, 96)
