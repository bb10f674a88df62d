"""Experts in FP8 with one scale for each 128 x 128 block of a weight, as DeepSeek-V3 stores them.

Half the bytes of bfloat16, so a decode step that is bound by the experts it reads takes about half
as long. Only the weights are rounded: products run in the activations' type.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128
FP8 = torch.float8_e4m3fn
_LARGEST = 448.0  # torch.finfo(FP8).max


def quantise_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds a weight to E4M3, block by block.

    Args:
        weight: [..., N, K]. For gate and up in one weight pass ``view(E, 2, inner, hidden)``, so
            that no block holds rows of both.

    Returns:
        FP8 values [..., N, K] and float32 scales [..., ceil(N / 128), ceil(K / 128)]; the weight
        is about values times scale. A block of zeros has scale 1.
    """
    rows, columns = weight.shape[-2:]
    wide = torch.nn.functional.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    grid = wide.shape[-2] // BLOCK, wide.shape[-1] // BLOCK
    blocks = wide.view(*weight.shape[:-2], grid[0], BLOCK, grid[1], BLOCK)
    largest = blocks.abs().amax(dim=(-3, -1))
    scales = torch.where(largest > 0, largest / _LARGEST, 1.0)
    values = (blocks / scales[..., :, None, :, None]).view(wide.shape)
    return values[..., :rows, :columns].to(FP8).contiguous(), scales


def dequantise_blocks(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight again, [..., N, K] in ``dtype``, from what :func:`quantise_blocks` returned."""
    rows, columns = values.shape[-2:]
    wide = values.float()
    if rows % BLOCK or columns % BLOCK:
        factors = scales.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)
        return wide.mul_(factors[..., :rows, :columns]).to(dtype)
    blocks = wide.view(*values.shape[:-2], rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    blocks.mul_(scales[..., :, None, :, None])
    return wide.to(dtype)
