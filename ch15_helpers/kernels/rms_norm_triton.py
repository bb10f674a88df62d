# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""RMSNorm with the residual addition in one pass over the row.

Bytes: two reads and two writes of [num_tokens, hidden] with a residual, one of each without; the
plain version in ``rms_norm.py`` moves five times as much and launches six kernels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

from ch15_helpers.kernels.dispatch import launches_early

_EARLY_ROWS = 128  # no more programs than processors


@triton.jit
def _rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, total_ptr, stride_outer, stride_inner, inner,
    hidden, eps, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < hidden
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0)
    if EARLY:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    source = (row // inner) * stride_outer + (row % inner) * stride_inner + column
    x = tl.load(x_ptr + source, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        x = x + tl.load(residual_ptr + row * hidden + column, mask=mask, other=0.0)
        tl.store(total_ptr + row * hidden + column, x, mask=mask)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide) / hidden + eps)
    # Rounded before the weight multiplies it, as the models were trained.
    out = (wide * scale).to(out_ptr.dtype.element_ty) * weight
    tl.store(out_ptr + row * hidden + column, out, mask=mask)


def rms_norm_triton(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`ch15_helpers.kernels.rms_norm.rms_norm`; returns (normalised, x + residual).

    ``x`` has two dimensions, or three of which the last is normalised (per-head norms); the last
    is contiguous. ``residual`` is contiguous and needs two.
    """
    hidden = x.shape[-1]
    inner = x.shape[1] if x.dim() == 3 else 1
    rows = x.numel() // hidden
    out = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    total = torch.empty_like(out) if residual is not None else out
    block = triton.next_power_of_2(hidden)
    # A few tokens' norm is all latency, and what follows may copy its weight while it runs. (On
    # one H200, 128 rows and the product with SwiGLU after it: 66.9 and 64.4 µs together.)
    early = rows <= _EARLY_ROWS and launches_early(x.device)
    _rms_norm_kernel[(rows,)](
        x, x if residual is None else residual, weight, out, total,
        x.stride(0), x.stride(1) if x.dim() == 3 else 0, inner, hidden, eps,
        HAS_RESIDUAL=residual is not None, BLOCK=block, EARLY=early,
        num_warps=min(8, max(1, block // 512)), **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return out, total
