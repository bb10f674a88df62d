"""Matrix product with a weight, quick for the handful of rows that a batch of decodes has."""

from __future__ import annotations

import torch
from torch import Tensor

from ch15_helpers.kernels.dispatch import triton_installed
from ch15_helpers.kernels.hopper_gemm import hopper_linear
from ch15_helpers.kernels.linear_cpu import can_gate, compiled_linear, linear_cpu
from ch15_helpers.kernels.swiglu import swiglu


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``.

    Args:
        x: [num_tokens, in_features].
        weight: [out_features, in_features], rows contiguous; on the CPU also in another layout,
            from :func:`.linear_cpu.pack_weight`.
        bias: [out_features] or None.

    Returns:
        [num_tokens, out_features].
    """
    if x.device.type == "cpu":
        return linear_cpu(x, weight, bias)
    if bias is None and x.is_cuda and _can_gemv(x, weight):
        from ch15_helpers.kernels.gemv_triton import gemv_triton

        return gemv_triton(x, weight)
    product = hopper_linear(x, weight) if bias is None and x.is_cuda else None
    return torch.nn.functional.linear(x, weight, bias) if product is None else product


def gated_linear(x: Tensor, weight: Tensor) -> Tensor:
    """``swiglu(x @ weight.T)``: gate rows of the weight first, then up rows.

    Returns:
        [num_tokens, out_features / 2].
    """
    if x.is_cuda and _can_gemv(x, weight):
        from ch15_helpers.kernels.gemv_triton import gemv_triton

        return gemv_triton(x, weight, gated=True)
    if can_gate(weight):
        return compiled_linear(x, weight, gated=True)
    product = hopper_linear(x, weight, gated=True) if x.is_cuda else None
    return swiglu(linear(x, weight)) if product is None else product


def _can_gemv(x: Tensor, weight: Tensor) -> bool:
    """Whether a single token's product goes to :mod:`~ch15_helpers.kernels.gemv_triton`."""
    if x.shape[0] != 1 or not triton_installed():
        return False
    from ch15_helpers.kernels.gemv_triton import can_gemv

    return can_gemv(x, weight)
