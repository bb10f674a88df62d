"""Layouts of a weight on the CPU, and the matrix product for each of them.

``rows`` is the checkpoint's own [out, in]. ``panels`` cuts the output features into panels and
stores each of them [in, width], the order in which a CPU multiplies: no library has to repack it,
at any number of tokens (Goto and van de Geijn, "Anatomy of High-Performance Matrix
Multiplication", 2008). A step of SmolLM2 on one AVX-512 thread takes 0.8 of the time of ``rows``
at 16 and 32 tokens, 0.9 at 4 and 8, but 1.06 at one. ``compiled`` has panels, too, and our own
C++ to multiply them (:mod:`~ch15_helpers.kernels.cpu_library`). ``grid`` is what a quantised
checkpoint's float32 weight is without loss: whole steps of 4 or 8 bits with a scale and an offset
for each 32 inputs, which the processor's matrix tiles multiply (``cpu_grid.cpp``). ``onednn`` is
oneDNN's own order, for bfloat16; its products are the same bits as those of ``rows``, which oneDNN
would repack in every call. ``tiles`` is for bfloat16, too: the order of the matrix tiles that our
own C++ uses (``cpu_bfloat16.cpp``), so that a whole layer is one call.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ch15_helpers.kernels.cpu_library import cpu_library, threads_for

LAYOUTS = ("rows", "panels", "onednn", "compiled", "grid", "tiles")
# Inputs and outputs of one tile of the layout ``grid``, and the bits that its steps may have.
_BLOCK, _PANEL, _BITS = 32, 16, (4, 8)

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
        library = cpu_library()
        ours = ("compiled",) if library is not None else ()
        return ("rows", *panels, *ours, *(("grid",) if _has_tiles() else ()))
    if dtype == torch.bfloat16:
        onednn = ("onednn",) if onednn_has_bfloat16() else ()
        return ("rows", *onednn, *(("tiles",) if _has_tiles() else ()))
    return ("rows",)


def _has_tiles() -> bool:
    library = cpu_library()
    return library is not None and bool(library.ch15_has_tiles())


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
        axis of 1, to tell them apart; ``grid``: uint8 [out_features / 16, in_features / 32, bytes
        of a tile], or ``compiled`` where the weight is on no grid; ``tiles``: bfloat16
        [out_features / 16, in_features / 32, 16, 16, 2]; ``onednn``: an opaque tensor of
        the weight's shape, of which only :func:`linear_cpu` and :func:`unpack_weight` make sense.
    """
    if weight.dim() != 2 or layout not in layouts_of(weight.dtype):
        return weight
    if layout == "onednn":
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        return packed
    if layout == "grid":
        packed_grid = _pack_grid(weight)
        return _pack_compiled(weight) if packed_grid is None else packed_grid
    if layout == "compiled":
        return _pack_compiled(weight)
    if layout == "tiles":
        return _pack_tiles(weight)
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
    if weight.dtype == torch.uint8:
        return _unpack_grid(weight)
    if weight.dim() == 5:
        return weight.permute(0, 3, 1, 2, 4).reshape(compiled_shape(weight))
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
    if is_compiled(weight):
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


def _pack_tiles(weight: Tensor) -> Tensor:
    outputs, depth = weight.shape
    if outputs % _PANEL or depth % _BLOCK:
        return weight
    tiles = weight.view(outputs // _PANEL, _PANEL, depth // _BLOCK, _BLOCK // 2, 2)
    return tiles.permute(0, 2, 3, 1, 4).contiguous()


def _pack_grid(weight: Tensor) -> Tensor | None:
    """The weight in the fewest bits that hold it exactly, None where it is on no grid."""
    library, (outputs, depth) = cpu_library(), weight.shape
    if library is None or outputs % _PANEL or depth % _BLOCK or not weight.numel():
        return None
    weight = weight.contiguous()
    for bits in _BITS:
        size = outputs // _PANEL, depth // _BLOCK, library.ch15_grid_bytes(bits)
        packed = torch.empty(size, dtype=torch.uint8)
        threads = threads_for(weight.numel())
        if library.ch15_grid_pack(
            weight.data_ptr(), outputs, depth, packed.data_ptr(), bits, threads
        ):
            return packed
    return None


def _unpack_grid(weight: Tensor) -> Tensor:
    library, out = cpu_library(), torch.empty(compiled_shape(weight))
    assert library is not None, "pack_weight needed it, too"
    library.ch15_grid_unpack(weight.data_ptr(), *out.shape, out.data_ptr(), grid_bits(weight))
    return out


def is_compiled(weight: Tensor) -> bool:
    """Whether :func:`compiled_linear` takes it: it is ``compiled``, on a ``grid``, in ``tiles``."""
    return weight.dim() >= 4 or weight.dtype == torch.uint8


def grid_bits(weight: Tensor) -> int:
    """Bits of a step of a weight of the layout ``grid``, 0 for one of ``compiled``."""
    if weight.dtype != torch.uint8:
        return 0
    numbers = 2 * _PANEL * torch.float32.itemsize
    return (weight.shape[2] - numbers) * 8 // (_BLOCK * _PANEL)


def compiled_shape(weight: Tensor) -> tuple[int, int]:
    """(out_features, in_features) of a weight that :func:`is_compiled`."""
    if weight.dtype == torch.uint8 or weight.dim() == 5:
        return weight.shape[0] * _PANEL, weight.shape[1] * _BLOCK
    return weight.shape[0] * weight.shape[2], weight.shape[1]


def compiled_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, gated: bool = False
) -> Tensor:
    """``x @ weight.T + bias`` with a weight that :func:`is_compiled`, by our C++.

    A row of the result depends on its own row of ``x`` alone, bit for bit: not on how many there
    are, nor on the number of threads.

    Args:
        x: [num_tokens, in_features], bfloat16 for a weight in ``tiles``, else float32.
        weight: from :func:`pack_weight`.
        bias: [out_features] or None.
        gated: return ``silu(gate) * up`` of the two halves of the output features; each must be
            whole panels (:func:`can_gate`).
    """
    outputs, depth = compiled_shape(weight)
    dtype = torch.bfloat16 if weight.dim() == 5 else torch.float32
    if x.dtype != dtype or x.dim() != 2 or x.shape[1] != depth:
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)}; this weight needs "
            f"{str(dtype).removeprefix('torch.')} [tokens, {depth}]"
        )
    library = cpu_library()
    assert library is not None, "pack_weight needed it, too"
    x = x.contiguous()
    rows, kept = x.shape[0], outputs // 2 if gated else outputs
    out = torch.empty(rows, kept, dtype=dtype)
    threads = threads_for(rows * depth * outputs)
    call = x.data_ptr(), rows, depth, weight.data_ptr()
    if bits := grid_bits(weight):
        panels = kept // _PANEL
        library.ch15_grid_linear(*call, panels, out.data_ptr(), bits, gated, threads)
    elif weight.dim() == 5:
        library.ch15_linear_bfloat16(*call, kept // _PANEL, out.data_ptr(), gated, threads)
    else:
        multiply = library.ch15_gated_linear if gated else library.ch15_linear
        multiply(*call, kept // weight.shape[2], out.data_ptr(), threads)
    return out if bias is None else out.add_(bias)


def can_gate(weight: Tensor) -> bool:
    """Whether :func:`compiled_linear` takes this weight with ``gated``."""
    return is_compiled(weight) and weight.shape[0] % 2 == 0
