"""Root-mean-square normalisation, alone or with the residual addition before it.

Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
"""

from __future__ import annotations

import functools
from typing import overload

import torch
from torch import Tensor

from ch15_helpers.kernels.cpu_library import cpu_library, threads_for
from ch15_helpers.kernels.dispatch import use_triton

_FUNCTIONS = {torch.float32: "ch15_rms_norm", torch.bfloat16: "ch15_rms_norm_bfloat16"}


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor: ...
@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """``x / sqrt(mean(x ** 2) + eps) * weight`` over the last dimension.

    The mean is taken in float32 whatever the dtype, and the normalised value is rounded to the
    input dtype before the weight multiplies it: the order that the models were trained with.

    Args:
        x: [..., hidden].
        weight: [hidden].
        eps: added to the mean square.
        residual: [..., hidden]; when given, ``x + residual`` is normalised.

    Returns:
        The normalised tensor; with ``residual``, the pair (normalised, ``x + residual``).
    """
    if x.dim() <= 3 and use_triton(x):
        from ch15_helpers.kernels.rms_norm_triton import rms_norm_triton

        out, total = rms_norm_triton(x, weight, eps, residual)
        return out if residual is None else (out, total)
    if _can_compile(x, weight, residual):
        return _compiled(x, weight, eps, residual)
    if residual is None:
        return _normalise(x, weight, eps)
    total = x + residual
    return _normalise(total, weight, eps), total


def _can_compile(x: Tensor, weight: Tensor, residual: Tensor | None) -> bool:
    """Whether ``cpu_pointwise.cpp`` takes these: matrices on the CPU, rows of 16s."""
    if x.dim() != 2 or x.dtype not in _FUNCTIONS or x.device.type != "cpu" or x.shape[1] % 16:
        return False
    same = residual is None or (residual.shape == x.shape and residual.dtype == x.dtype)
    fits = weight.shape == x.shape[1:] and weight.dtype == x.dtype and weight.is_contiguous()
    return same and fits and cpu_library() is not None


def _compiled(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None
) -> Tensor | tuple[Tensor, Tensor]:
    x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    total, more = x, 0
    if residual is not None:
        residual, total = residual.contiguous(), torch.empty_like(out)
        more = residual.data_ptr()
    library = cpu_library()
    assert library is not None
    getattr(library, _FUNCTIONS[x.dtype])(
        x.data_ptr(), more, weight.data_ptr(), out.data_ptr(), total.data_ptr(), *x.shape, eps,
        threads_for(x.numel()),
    )  # fmt: skip
    return out if residual is None else (out, total)


def _normalise(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    # A norm, then one multiply-add, instead of square, mean and sum: on a CPU whose cache has just
    # seen a weight go by, every operation costs the time it takes to fetch its code again.
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    scale = torch.addcmul(_scalar(eps, x.device), norm, norm, value=1 / x.shape[-1]).rsqrt_()
    if x.dtype == torch.float32:
        return (x * scale).mul_(weight)
    return (x * scale).to(x.dtype).mul_(weight)


@functools.cache
def _scalar(value: float, device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device=device)
