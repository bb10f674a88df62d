"""Rotary position embeddings, in the half-split order that Hugging Face checkpoints use.

Su et al., "RoFormer", 2021; the long-context scaling is Llama 3.1's.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from ch15_helpers.kernels.dispatch import use_triton


class RopeScaling(Protocol):
    """The four numbers of Llama 3.1's frequency scaling."""

    @property
    def factor(self) -> float: ...
    @property
    def low_freq_factor(self) -> float: ...
    @property
    def high_freq_factor(self) -> float: ...
    @property
    def original_max_position_embeddings(self) -> int: ...


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> Tensor:
    """Rotation per position of each pair of channels, in radians: float32 [head_dim / 2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (theta**exponents)
    if scaling is None:
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    original = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = (original / wavelengths - low) / (high - low)
    blended = (1 - blend) * frequencies / scaling.factor + blend * frequencies
    scaled = torch.where(wavelengths > original / low, frequencies / scaling.factor, frequencies)
    between = (wavelengths <= original / low) & (wavelengths >= original / high)
    return torch.where(between, blended, scaled)


def build_cos_sin_cache(
    head_dim: int,
    max_positions: int,
    theta: float,
    scaling: RopeScaling | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Cosines and sines of every position: float32 [max_positions, head_dim], cos then sin.

    It stays in float32 for every model dtype: in bfloat16 the angle of a late position would be
    off by more than a token. It is computed on the CPU, so that all devices rotate alike.
    """
    frequencies = inverse_frequencies(head_dim, theta, scaling)
    angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(device)


def rope_rows(cos_sin_cache: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """One step's rows of the cache, laid out for the portable rotation.

    They are the same in every layer; gathering them once saves six small operations in each.

    Returns:
        cosines and signed sines, both float32 [num_tokens, 1, head_dim].
    """
    cos, sin = cos_sin_cache.index_select(0, positions).unsqueeze(1).chunk(2, dim=-1)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def apply_rope(
    q: Tensor,
    k: Tensor,
    cos_sin_cache: Tensor,
    positions: Tensor,
    rows: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotates queries and keys by their positions; channel ``i`` pairs with ``i + head_dim / 2``.

    Args:
        q: [num_tokens, num_heads, head_dim].
        k: [num_tokens, num_kv_heads, head_dim].
        cos_sin_cache: float32 [max_positions, head_dim] from :func:`build_cos_sin_cache`.
        positions: int64 [num_tokens].
        rows: :func:`rope_rows` of the two, where the caller has it; Triton does without.

    Returns:
        The rotated q and k, new tensors of the same shapes and dtypes.
    """
    if use_triton(q, k):
        from ch15_helpers.kernels.rope_triton import apply_rope_triton

        return apply_rope_triton(q, k, cos_sin_cache, positions)
    cos_full, sin_signed = rope_rows(cos_sin_cache, positions) if rows is None else rows
    both = _adjacent(q, k)
    if both is not None:
        rotated = _rotate(both, cos_full, sin_signed)
        return rotated[:, : q.shape[1]], rotated[:, q.shape[1] :]
    return _rotate(q, cos_full, sin_signed), _rotate(k, cos_full, sin_signed)


def _rotate(x: Tensor, cos_full: Tensor, sin_signed: Tensor) -> Tensor:
    wide = x.float()
    swapped = wide.roll(wide.shape[-1] // 2, -1)
    return torch.addcmul(wide * cos_full, swapped, sin_signed).to(x.dtype)


def _adjacent(q: Tensor, k: Tensor) -> Tensor | None:
    """One view over q and k when both are slices of one fused projection, else None.

    Rotating them together halves the number of operations, which is what a decode step of one
    token spends its time on here.
    """
    follows = k.storage_offset() == q.storage_offset() + q.shape[1] * q.shape[2]
    packed = q.stride(1) == q.shape[2] and q.stride(2) == 1 and q.stride() == k.stride()
    same = q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    if not (follows and packed and same):
        return None
    shape = (q.shape[0], q.shape[1] + k.shape[1], q.shape[2])
    return q.as_strided(shape, q.stride(), q.storage_offset())
