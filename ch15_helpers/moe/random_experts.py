"""Random experts for studies, and how far a result is from another."""

from __future__ import annotations

import torch
from torch import Tensor

from ch15_helpers.moe.experts import ExpertWeights, SharedExpert


def relative_error(out: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of ``expected``; 0 for no rows."""
    if not expected.numel():
        return 0.0
    difference = (out.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp(min=1e-30))


def random_experts(
    num_experts: int,
    hidden: int,
    inner: int,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> ExpertWeights:
    """Experts that keep the size of what they get; the same for equal generators."""

    def normal(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device, dtype=dtype)
        return values.mul_(shape[-1] ** -0.5)

    return ExpertWeights(normal(num_experts, 2 * inner, hidden), normal(num_experts, hidden, inner))


def random_shared(
    hidden: int, inner: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> SharedExpert | None:
    """A shared expert like those; None where ``inner`` is 0."""
    if not inner:
        return None
    one = random_experts(1, hidden, inner, dtype, device, generator)
    return SharedExpert(one.gate_up[0], one.down[0])
