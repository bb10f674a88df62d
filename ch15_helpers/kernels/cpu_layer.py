"""The two halves of a decoder layer around its attention, each as one call of ``cpu_layer.cpp``.

They compute what :func:`.rms_norm`, :func:`.linear` and :func:`.gated_linear` compute, bit for bit,
for weights of the ``compiled`` layout. What they save is Python: at one token and 30 layers, those
calls one by one take about 3 ms of a step of 24.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ch15_helpers.kernels.cpu_library import cpu_library, threads_for


def can_fuse(norm: Tensor, *weights: Tensor) -> bool:
    """Whether the calls below take a layer's norm and weights: ``compiled``, norms of 16s."""
    return len(norm) % 16 == 0 and all(w.dim() == 4 and w.dtype == norm.dtype for w in weights)


def norm_linear(
    x: Tensor, residual: Tensor, norm: Tensor, eps: float, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The norm of ``x + residual`` times a weight, and the sum.

    Args:
        x, residual: float32 [N, hidden].
        norm: [hidden].
        eps: of the norm.
        weight: ``compiled``, [out_features / width, hidden, width, 1].

    Returns:
        [N, out_features] and [N, hidden].
    """
    rows, hidden = _checked(x, residual, norm, weight)
    library = cpu_library()
    assert library is not None
    out = torch.empty(rows, weight.shape[0] * weight.shape[2])
    total = torch.empty(rows, hidden)
    library.ch15_norm_linear(
        x.data_ptr(), residual.data_ptr(), norm.data_ptr(), eps, weight.data_ptr(),
        total.data_ptr(), out.data_ptr(), rows, hidden, weight.shape[0],
        threads_for(rows * weight.numel()),
    )  # fmt: skip
    return out, total


def feed_forward(
    mixed: Tensor,
    residual: Tensor,
    o_proj: Tensor,
    norm: Tensor,
    eps: float,
    gate_up: Tensor,
    down: Tensor,
) -> tuple[Tensor, Tensor]:
    """What follows attention: its output projection, the norm and the feed-forward block.

    Args:
        mixed: float32 [N, heads * head_dim], what attention returned.
        residual: [N, hidden].
        o_proj, gate_up, down: ``compiled`` weights, gates of ``gate_up`` first.
        norm: [hidden], of the sum of projection and residual.
        eps: of the norm.

    Returns:
        The block's output and that sum, both [N, hidden].
    """
    rows, hidden = _checked(residual, residual, norm, gate_up)
    inner = down.shape[1]
    if mixed.shape != (rows, o_proj.shape[1]) or not mixed.is_contiguous():
        raise ValueError(f"attention gave {tuple(mixed.shape)}, not {(rows, o_proj.shape[1])}")
    library = cpu_library()
    assert library is not None
    out, total = torch.empty(rows, hidden), torch.empty(rows, hidden)
    library.ch15_feed_forward(
        mixed.data_ptr(), residual.data_ptr(), o_proj.data_ptr(), norm.data_ptr(), eps,
        gate_up.data_ptr(), down.data_ptr(), total.data_ptr(), out.data_ptr(), rows,
        mixed.shape[1], hidden, inner, threads_for(rows * gate_up.numel()),
    )  # fmt: skip
    return out, total


def _checked(x: Tensor, residual: Tensor, norm: Tensor, weight: Tensor) -> tuple[int, int]:
    """Rows and row length; the library would read whatever it is pointed at."""
    rows, hidden = x.shape
    fits = residual.shape == x.shape and len(norm) == hidden == weight.shape[1]
    ready = x.is_contiguous() and residual.is_contiguous() and x.dtype == norm.dtype
    if not (fits and ready and x.dtype == residual.dtype == torch.float32):
        raise ValueError(
            f"rows {tuple(x.shape)} and {tuple(residual.shape)} of {x.dtype} do not fit a norm "
            f"of {len(norm)} and a weight of {weight.shape[1]} features, contiguous and float32"
        )
    return rows, hidden
