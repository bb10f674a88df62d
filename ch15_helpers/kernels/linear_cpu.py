"""Layouts of a weight on the CPU, and the matrix product for each of them.

``rows`` is the checkpoint's own [out, in]. ``panels`` cuts the output features into panels and
stores each of them [in, width], the order in which a CPU multiplies: no library has to repack it,
at any number of tokens (Goto and van de Geijn, "Anatomy of High-Performance Matrix
Multiplication", 2008). A step of SmolLM2 on one AVX-512 thread takes 0.8 of the time of ``rows``
at 16 and 32 tokens, 0.9 at 4 and 8, but 1.06 at one. ``compiled`` has panels, too, and our own
C++ to multiply them (:mod:`~ch15_helpers.kernels.cpu_library`). ``onednn`` is oneDNN's own order,
for bfloat16; its products are the same bits as those of ``rows``, which oneDNN would repack in
every call.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ch15_helpers.kernels.cpu_library import cpu_library, threads_for

LAYOUTS = ("rows", "panels", "onednn", "compiled")

# MKL multiplies up to three rows without copying the weight. For more it first packs the whole
# weight into its own order, which costs as much as reading it twice; a batch of short products
# over slices of 48 output features does not. Measured on one AVX-512 thread, SmolLM2's 120
# matrices (ms, whole against sliced): 4 rows 57, 40; 8 rows 74, 44; 14 rows 103, 53; 16 rows 74,
# 70; 48 rows 97, 93. With AVX2 the two are equal.
_MIN_ROWS, _MAX_ROWS = 4, 48
_WIDTHS = (48, 32, 64, 24, 16)
_has_mkl: Callable[[], bool] = torch.backends.mkl.is_available
_has_onednn: Callable[[], bool] = torch.backends.mkldnn.is_available
# The overload itself: looking it up by its arguments would cost as much as a small operation.
_onednn_product = getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), "default", None)


def layouts_of(dtype: torch.dtype) -> tuple[str, ...]:
    """The layouts that this machine's torch has for a dtype, ``rows`` first."""
    if dtype == torch.float32:
        panels = ("panels",) if _has_mkl() else ()
        return ("rows", *panels, *(("compiled",) if cpu_library() is not None else ()))
    if dtype == torch.bfloat16 and onednn_has_bfloat16():
        return ("rows", "onednn")
    return ("rows",)


def onednn_has_bfloat16() -> bool:
    """Whether oneDNN is there and multiplies bfloat16 on this processor.

    It does from AVX-512 on; it is quick with AVX512-BF16 or AMX, which a measurement shows.
    """
    return bool(
        _has_onednn()
        and _onednn_product is not None
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def pack_weight(weight: Tensor, layout: str) -> Tensor:
    """A weight in another layout, or the weight itself where the layout does not apply to it.

    Args:
        weight: [out_features, in_features].
        layout: one of :data:`LAYOUTS`.

    Returns:
        ``panels``: [out_features / width, in_features, width]; ``compiled``: the same with a last
        axis of 1, to tell them apart; ``onednn``: an opaque tensor of the weight's shape, of
        which only :func:`linear_cpu` and :func:`unpack_weight` make sense.
    """
    if weight.dim() != 2 or layout not in layouts_of(weight.dtype):
        return weight
    if layout == "onednn":
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        return packed
    if layout == "compiled":
        return _pack_compiled(weight)
    width = slice_width(weight) if layout == "panels" else 0
    if not width:
        return weight
    return weight.view(-1, width, weight.shape[1]).transpose(1, 2).contiguous()


def unpack_weight(weight: Tensor, dim: int = 2) -> Tensor:
    """[out_features, in_features]: a weight of ``rows`` as it is, a packed one as a copy.

    Args:
        weight: what :func:`pack_weight` returned.
        dim: dimensions that it had before (a stack of experts has three, and is never packed).
    """
    if weight.is_mkldnn:
        return weight.to_dense()
    if weight.dim() == 4:
        return weight[..., 0].transpose(1, 2).reshape(-1, weight.shape[1])
    if dim == 2 and weight.dim() == 3:
        return weight.transpose(1, 2).reshape(-1, weight.shape[1])
    return weight


def linear_cpu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` for a weight in any layout; see :func:`.linear.linear`."""
    if weight.is_mkldnn:
        assert _onednn_product is not None, "pack_weight needed it, too"
        product: Tensor = _onednn_product(x, weight, bias, "none", [], "")
        return product
    if weight.dim() == 4:
        return compiled_linear(x, weight, bias)
    if weight.dim() == 3:
        return _batched(x, weight, bias)
    if _MIN_ROWS <= x.shape[0] <= _MAX_ROWS:
        width = slice_width(weight)
        if width:
            return _batched(x, weight.view(-1, width, weight.shape[1]).transpose(1, 2), bias)
    return torch.nn.functional.linear(x, weight, bias)


def slice_width(weight: Tensor) -> int:
    """Output features of one slice or panel, 0 where slicing does not apply."""
    if weight.dtype != torch.float32 or not _has_mkl():
        return 0
    out_features = weight.shape[0]
    return next((width for width in _WIDTHS if out_features % width == 0), 0)


def _batched(x: Tensor, panels: Tensor, bias: Tensor | None) -> Tensor:
    """One short product for each panel [in, width], all from the same rows."""
    count, _, width = panels.shape
    product = torch.bmm(x.expand(count, -1, -1), panels)
    out = product.transpose(0, 1).reshape(x.shape[0], count * width)
    return out if bias is None else out.add_(bias)


def _pack_compiled(weight: Tensor) -> Tensor:
    library = cpu_library()
    width = library.ch15_width() if library is not None else 0
    if not width or weight.shape[0] % width:
        return weight
    return weight.view(-1, width, weight.shape[1]).transpose(1, 2).contiguous().unsqueeze(-1)


def compiled_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, gated: bool = False
) -> Tensor:
    """``x @ weight.T + bias`` with a weight of the ``compiled`` layout, by ``cpu_linear.cpp``.

    A row of the result depends on its own row of ``x`` alone, bit for bit: not on how many there
    are, nor on the number of threads.

    Args:
        x: float32 [num_tokens, in_features].
        weight: from :func:`pack_weight`.
        bias: [out_features] or None.
        gated: return ``silu(gate) * up`` of the two halves of the output features; each must be
            whole panels (:func:`can_gate`).
    """
    panels, depth, width, _ = weight.shape
    if x.dtype != torch.float32 or x.dim() != 2 or x.shape[1] != depth:
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)}; this weight needs float32 [tokens, {depth}]"
        )
    library = cpu_library()
    assert library is not None, "pack_weight needed it, too"
    x = x.contiguous()
    rows, kept = x.shape[0], panels // 2 if gated else panels
    out = torch.empty(rows, kept * width)
    multiply = library.ch15_gated_linear if gated else library.ch15_linear
    threads = threads_for(rows * depth * panels * width)
    multiply(x.data_ptr(), rows, depth, weight.data_ptr(), kept, out.data_ptr(), threads)
    return out if bias is None else out.add_(bias)


def can_gate(weight: Tensor) -> bool:
    """Whether :func:`compiled_linear` takes this weight with ``gated``."""
    return weight.dim() == 4 and weight.shape[0] % 2 == 0
