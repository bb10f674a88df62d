"""What one copy of a token looks like on the wire, and putting it there.

A copy is one row of bytes: the hidden state (in the model's type, or in FP8 with a scale for each
128 numbers), then the slots that it visits at its destination, then their weights. Everything
travels in one message for each destination. FP8 dispatch is DeepSeek-V3's (2024); scales are
powers of two, so that decoding is exact in bfloat16 and a row that is encoded again, on its way
through a node, keeps its bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ch15_helpers.kernels.dispatch import use_triton
from ch15_helpers.kernels.moe_fp8 import FP8
from ch15_helpers.moe.device_copies import DeviceCopies

_ALIGN = 32  # bytes of the hidden state and of the row: 16 bfloat16, as bulk copies want them
_LARGEST = 448.0  # torch.finfo(FP8).max


@dataclass(frozen=True)
class WireFormat:
    """Layout of a row.

    Attributes:
        hidden: numbers of a hidden state. dtype: their type on the wire.
        entries: slots of a copy at most.
        block: numbers that share one scale, in FP8.
    """

    hidden: int
    dtype: torch.dtype
    entries: int
    block: int = 128

    @property
    def num_scales(self) -> int:
        return -(-self.hidden // self.block) if self.dtype == FP8 else 0

    @property
    def payload_bytes(self) -> int:
        return _padded(self.hidden * self.dtype.itemsize)

    @property
    def row_bytes(self) -> int:
        """Bytes of one copy: with hidden 2048, top 8: bfloat16 4160, FP8 2176."""
        return _padded(self.payload_bytes + 4 * self.num_scales + 8 * self.entries)

    def encode(self, x: Tensor, tokens: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        """Rows of bytes, uint8 [R, row_bytes]; a token is rounded once, however many its copies.

        Args:
            x: [num_tokens, hidden]. tokens: int64 [R], the token of each row.
            slots: int [R, entries], -1 for none. weights: [R, entries].
        """
        wire = torch.empty(len(tokens), self.row_bytes, dtype=torch.uint8, device=x.device)
        payload, scales, ids, factors = self._parts(wire)
        if self.dtype == FP8:
            values, powers = quantise_rows(x, self.block)
            payload.copy_(values.view(torch.uint8).index_select(0, tokens))
            scales.copy_(powers.index_select(0, tokens))
        else:
            payload.copy_(x.index_select(0, tokens))
        ids.copy_(slots)
        factors.copy_(weights)
        return wire

    def pack(self, x: Tensor, copies: DeviceCopies, num_rows: int) -> Tensor:
        """:meth:`encode` of the first ``num_rows`` copies in one launch, on a GPU."""
        from ch15_helpers.kernels.wire_rows_triton import pack_rows_triton

        wire = torch.empty(num_rows, self.row_bytes, dtype=torch.uint8, device=x.device)
        slots, weights = copies.slots, copies.weights
        parts, order, size = self._typed_parts(wire), copies.order, copies.size
        pack_rows_triton(x, parts, slots, weights, order, size, self.block)
        return wire

    def decode(self, wire: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states [R, hidden] in ``dtype``, slots and weights float32 [R, entries].

        Slots are int64, or int32 on a GPU.
        """
        if self.dtype.itemsize <= 4 and use_triton(wire):
            from ch15_helpers.kernels.wire_rows_triton import unpack_rows_triton

            return unpack_rows_triton(self._typed_parts(wire), self.block, dtype)
        payload, scales, ids, factors = self._parts(wire)
        if self.dtype == FP8:
            rows = dequantise_rows(payload.contiguous().view(FP8), scales, self.block, dtype)
        else:
            rows = payload.to(dtype)
        return rows, ids.long(), factors.contiguous()

    def _typed_parts(self, wire: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        payload, *words = self._parts(wire)
        return payload.view(self.dtype), words[0], words[1], words[2]

    def _parts(self, wire: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Views of hidden state (bytes in FP8), scales, slots and weights."""
        size = self.hidden * self.dtype.itemsize
        first = self.payload_bytes
        second = first + 4 * self.num_scales
        third = second + 4 * self.entries
        payload = wire[:, :size]
        return (
            payload if self.dtype == FP8 else payload.view(self.dtype),
            wire[:, first:second].view(torch.float32),
            wire[:, second:third].view(torch.int32),
            wire[:, third : third + 4 * self.entries].view(torch.float32),
        )


def quantise_rows(rows: Tensor, block: int = 128) -> tuple[Tensor, Tensor]:
    """E4M3 values [R, H] and float32 scales [R, ceil(H / block)], which are powers of two.

    A number is about value times scale, within 1/16 of itself (1/512 of its scale near zero).
    A NaN or an infinity makes its block NaN, which ends with its row.
    """
    num_rows, hidden = rows.shape
    wide = torch.nn.functional.pad(rows.float(), (0, -hidden % block))
    blocks = wide.view(num_rows, wide.shape[1] // block, block)
    largest = blocks.abs().amax(-1)
    mantissa, exponent = torch.frexp(largest / _LARGEST)
    exponent = (exponent - (mantissa == 0.5).int()).clamp(-120, 120)
    # E4M3 has no infinity, and casting one may give the largest number instead of a NaN.
    one = torch.where(largest.isfinite(), 1.0, torch.nan)
    scales = torch.ldexp(one, exponent)
    values = (blocks / scales[:, :, None]).view(wide.shape)[:, :hidden]
    return values.to(FP8), scales


def dequantise_rows(values: Tensor, scales: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """[R, H] in ``dtype`` of what :func:`quantise_rows` returned."""
    num_rows, hidden = values.shape
    wide = torch.nn.functional.pad(values.float(), (0, -hidden % block))
    blocks = wide.view(num_rows, wide.shape[1] // block, block) * scales[:, :, None]
    return blocks.view(wide.shape)[:, :hidden].to(dtype)


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGN) * _ALIGN
