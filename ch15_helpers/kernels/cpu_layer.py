"""A decoder layer of a paged step as one call of ``cpu_layer.cpp``.

It computes what :func:`.rms_norm`, :func:`.linear`, :func:`.rope_and_write_kv`,
:func:`.paged_attention` and :func:`.gated_linear` compute one after the other, bit for bit, for
weights of the ``compiled`` layout. What it saves is Python: at one token and 30 layers of SmolLM2 a
step went from 25 ms to 21 on two cores.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from ch15_helpers.kernels.batch import BatchMetadata
from ch15_helpers.kernels.cpu_library import cpu_library, threads_for
from ch15_helpers.kernels.linear_cpu import can_gate, compiled_shape, grid_bits, is_compiled
from ch15_helpers.kernels.paged_attention_compiled import (
    checked_tables,
    compiled_unsupported_reason,
)


class LayerWeights(NamedTuple):
    """A layer's norms [hidden] and its weights, as :func:`.pack_weight` left them."""

    input_norm: Tensor
    qkv_proj: Tensor
    o_proj: Tensor
    post_norm: Tensor
    gate_up_proj: Tensor
    down_proj: Tensor

    @property
    def compiled(self) -> bool:
        """Whether all are what the kernels take: of one dtype, packed, norms of 16s."""
        weights, norm = (*self[1:3], *self[4:]), self.input_norm
        packed = all(is_compiled(w) for w in weights) and len(norm) % 16 == 0
        in_tiles = [w.dim() == 5 for w in weights]
        return packed and (
            all(in_tiles) if norm.dtype == torch.bfloat16 else norm.dtype == torch.float32
        )


class _Step(ctypes.Structure):
    """``Step`` of ``cpu_layer.cpp``."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("cos", "sin", "slots", "tables", "starts", "lens", "scratch")
        ),
        *(
            (name, ctypes.c_int64)
            for name in (
                "rows", "hidden", "inner", "heads", "kv_heads", "dim", "seqs", "table_stride",
                "page", "block_stride", "slot_stride", "head_stride", "threads",
            )
        ),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
    )  # fmt: skip


class CompiledStep:
    """What one step's layers share, checked once; then each is :meth:`run_layer`.

    Args:
        pages: float32 or bfloat16 [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim].
        batch: the step's.
        rows: :func:`.rope_rows` of the step.
        heads: query heads.
        eps, scale: of the norms, on the scores.

    Raises:
        IndexError: a table, a length or a slot points outside the pages.
    """

    def __init__(
        self,
        pages: Tensor,
        batch: BatchMetadata,
        rows: tuple[Tensor, Tensor],
        heads: int,
        eps: float,
        scale: float,
    ) -> None:
        slots = batch.slot_mapping.contiguous()
        num_blocks, _, _, page, kv_heads, dim = pages.shape
        if len(slots) and int(slots.max()) >= num_blocks * page:
            raise IndexError(f"a slot lies outside {num_blocks} blocks of {page} tokens")
        tables = checked_tables(batch, len(slots), num_blocks, page)
        cos, sin = (row.contiguous() for row in rows)
        self._pages, self._kept = pages, (slots, *tables, cos, sin)
        self._itemsize, self._scratch = pages.element_size(), torch.empty(0, dtype=pages.dtype)
        self._step = _Step(
            *(t.data_ptr() for t in (cos, sin, slots, *tables)), 0, len(slots), 0, 0, heads,
            kv_heads, dim, len(tables[2]), tables[0].shape[1], page, pages.stride(0),
            *pages.stride()[3:5], 1, eps, scale,
        )  # fmt: skip

    def run_layer(
        self, index: int, layer: LayerWeights, hidden: Tensor, residual: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Runs one layer: K and V go into its pages, ``hidden`` and ``residual`` change in place.

        Args:
            index: of the layer.
            layer: its norms and weights.
            hidden, residual: [N, hidden], of the pages' dtype; see :class:`.DecoderLayer`.
        """
        step, weights = self._step, (*layer[1:3], *layer[4:])
        qkv, o, gate_up, down = (compiled_shape(weight) for weight in weights)
        step.hidden, step.inner = hidden.shape[1], down[1]
        step.threads = threads_for(gate_up[0] * gate_up[1] * step.rows)
        q_size = step.heads * step.dim
        shapes = (
            hidden.shape == residual.shape == (step.rows, qkv[1]),
            hidden.dtype == residual.dtype == layer.input_norm.dtype == self._pages.dtype,
            qkv[0] == q_size + 2 * step.kv_heads * step.dim,
            o == (step.hidden, q_size),
            gate_up == (2 * step.inner, step.hidden),
            down[0] == step.hidden and can_gate(layer.gate_up_proj),
        )
        if not all(shapes) or not (hidden.is_contiguous() and residual.is_contiguous()):
            raise ValueError(f"layer {index} does not fit states of {tuple(hidden.shape)}")
        size = step.hidden + qkv[0] + step.inner
        size = step.rows * (size + 2 * step.heads * step.dim)
        pages = self._pages
        if self._scratch.numel() < size:
            self._scratch = torch.empty(size, dtype=pages.dtype)
            step.scratch = self._scratch.data_ptr()
        keys = pages.data_ptr() + index * pages.stride(1) * self._itemsize
        library, words = cpu_library(), [layer.input_norm.data_ptr(), layer.post_norm.data_ptr()]
        for weight in weights:
            words += weight.data_ptr(), grid_bits(weight)
        assert library is not None
        run = library.ch15_layer if self._itemsize == 4 else library.ch15_layer_bfloat16
        run(
            (ctypes.c_int64 * len(words))(*words), ctypes.byref(step), keys,
            keys + pages.stride(2) * self._itemsize, hidden.data_ptr(), residual.data_ptr(),
        )  # fmt: skip
        return hidden, residual


def compiled_step(
    pages: Tensor,
    batch: BatchMetadata,
    backend: str,
    heads: int,
    eps: float,
    scale: float,
    rows: tuple[Tensor, Tensor],
) -> CompiledStep | None:
    """A :class:`CompiledStep`, or None where the kernel does not take the pages or the backend."""
    if backend not in ("auto", "compiled") or pages.shape[5] % 2:
        return None
    q = pages.new_empty(0, heads, pages.shape[5])
    k_cache, v_cache = pages.select(1, 0).unbind(1)
    if compiled_unsupported_reason(q, k_cache, v_cache) is not None:
        return None
    return CompiledStep(pages, batch, rows, heads, eps, scale)
