"""The gated activation of the feed-forward block. Shazeer, "GLU Variants", 2020."""

from __future__ import annotations

import torch
from torch import Tensor

from ch15_helpers.kernels.dispatch import use_triton


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up``, where gate and up are the two halves of the last dimension.

    Args:
        gate_up: [..., 2 * intermediate], gate first.

    Returns:
        [..., intermediate], a new tensor of the same dtype.
    """
    if gate_up.dim() == 2 and gate_up.is_contiguous() and use_triton(gate_up):
        from ch15_helpers.kernels.swiglu_triton import swiglu_triton

        return swiglu_triton(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up)
