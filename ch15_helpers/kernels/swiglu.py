"""The gated activation of the feed-forward block. Shazeer, "GLU Variants", 2020."""

from __future__ import annotations

import torch
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up``, where gate and up are the two halves of the last dimension.

    Args:
        gate_up: [..., 2 * intermediate], gate first.

    Returns:
        [..., intermediate], a new tensor of the same dtype.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up)
