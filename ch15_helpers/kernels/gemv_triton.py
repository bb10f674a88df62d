# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""One token's product with a weight, at the speed at which the weight can be read.

A matrix product splits its work into tiles of many rows and columns; with a single row it has too
few of them to keep a GPU's memory busy. Here a program takes one or two output features, and reads
their weights whole. It begins to read before the kernel that makes ``x`` has ended (programmatic
dependent launch, CUDA 12): the weights do not depend on it.

Bytes: the weight once. Operations: two for each of its elements.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

from ch15_helpers.kernels.dispatch import launches_early


@triton.jit
def _tile(w_ptr, rows, columns, K: tl.constexpr):
    at = rows.to(tl.int64)[:, None] * K + columns[None, :]
    # Each weight is read once a step: it is not to push anything out of the cache.
    return tl.load(
        w_ptr + at, mask=(columns < K)[None, :], other=0.0, eviction_policy="evict_first"
    )


@triton.jit
def _gemv_kernel(
    x_ptr, w_ptr, out_ptr, features, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GATED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    w = _tile(w_ptr, rows, columns, K)
    w_up = w
    if GATED:
        w_up = _tile(w_ptr, rows + features, columns, K)
    if EARLY:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    acc_up = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in range(0, K, BLOCK_K):
        at = start + columns
        if start > 0:
            w = _tile(w_ptr, rows, at, K)
            if GATED:
                w_up = _tile(w_ptr, rows + features, at, K)
        x = tl.load(x_ptr + at, mask=at < K, other=0.0).to(tl.float32)[None, :]
        acc += w.to(tl.float32) * x
        if GATED:
            acc_up += w_up.to(tl.float32) * x
    out = tl.sum(acc, 1).to(out_ptr.dtype.element_ty)
    if GATED:
        # Rounded where the separate operations round.
        gate = out.to(tl.float32)
        up = tl.sum(acc_up, 1).to(out_ptr.dtype.element_ty)
        out = (gate * tl.sigmoid(gate)).to(out_ptr.dtype.element_ty) * up
    tl.store(out_ptr + rows, out)


def can_gemv(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel takes this product: one row of 16-bit numbers, and rows of 16 bytes."""
    return (
        x.is_cuda
        and x.shape[0] == 1
        and x.dtype == weight.dtype
        and x.dtype in (torch.bfloat16, torch.float16)
        and weight.is_contiguous()
        and weight.shape[0] % 4 == 0
        and weight.shape[1] % 8 == 0
    )


def gemv_triton(x: Tensor, weight: Tensor, gated: bool = False) -> Tensor:
    """``x @ weight.T``, or with ``gated`` the SwiGLU of it, of one row.

    Args:
        x: [1, in_features], see :func:`can_gemv`.
        weight: [out_features, in_features]; with ``gated`` gate rows first, then as many up rows.

    Returns:
        [1, out_features], or half as many.
    """
    features, width = weight.shape[0] // (2 if gated else 1), weight.shape[1]
    out = torch.empty(1, features, device=x.device, dtype=x.dtype)
    early = launches_early(x.device)
    block_n = 1 if gated else 2
    _gemv_kernel[(features // block_n,)](
        x, weight, out, features, K=width, BLOCK_N=block_n,
        BLOCK_K=min(1024, triton.next_power_of_2(width)), GATED=gated, EARLY=early, num_warps=4,
        **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return out
