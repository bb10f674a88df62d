"""Keys and values in one byte each: encoding, decoding, and the write into pages.

One scale belongs to the keys (or values) of one head in one block of one layer, so an outlier in
one head costs the other heads nothing. Scales are powers of two, as in the microscaling formats
(OCP MX v1.0, 2023). The reason is appending. A block fills token by token, and a later token may
need a larger scale than the ones already stored, which are then encoded again. With powers of two
that is an exact change of exponent for FP8 (short of its smallest numbers), and for INT8 the errors
of repeated encoding form a geometric series: together less than one step of the final scale.

Error of a value ``x`` against its decoded form, with the block's scale ``s``, written at once:
``s / 2`` for INT8; ``max(|x| / 16, s * 2**-10)`` for FP8 E4M3. Appended: ``s`` for INT8;
``max(|x| / 16, s * 2**-10) + s * 2**-9`` for FP8. ``s`` is below twice the largest magnitude of
the block and head over 127 (INT8) or 448 (FP8).

How a block was filled decides its last bits. So tokens from a quantised cache may depend on how a
prompt was split into chunks, or on whether a preempted request was computed again, where two of
them are nearly as likely; moving and sharing blocks changes nothing.

A NaN or infinity cannot be stored in INT8 and must not become an innocent number: it turns the
block's scale for that head into NaN. What reads the block gets NaN, the engine refuses the logits,
and the first token of the block's next owner resets the scale.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from ch15_helpers.kernels.batch import BatchMetadata
from ch15_helpers.kernels.dispatch import triton_installed, use_triton

QUANTISED_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"fp8_e4m3": torch.float8_e4m3fn, "int8": torch.int8}
)
"""Names that ``EngineConfig.kv_dtype`` takes, and how their values are stored."""

# The largest stored magnitude of each type, the exponent of its power of two, its mantissa bits.
_LIMITS: Mapping[torch.dtype, tuple[float, int, int]] = MappingProxyType(
    {torch.int8: (127.0, 6, 0x7E0000), torch.float8_e4m3fn: (448.0, 8, 0x600000)}
)
_MANTISSA = 0x7FFFFF


def resolve_kv_dtype(name: str | torch.dtype) -> torch.dtype:
    """The element type of a cache: a torch dtype as it is, or a name of QUANTISED_DTYPES.

    Raises:
        ValueError: an unknown name, or a torch dtype that no cache can hold.
    """
    if isinstance(name, torch.dtype):
        if not (is_quantised(name) or name in (torch.float32, torch.float16, torch.bfloat16)):
            raise ValueError(
                f"a KV cache cannot hold {name}; expected float32, bfloat16, float16, or one of "
                f"{', '.join(QUANTISED_DTYPES)}"
            )
        return name
    if name not in QUANTISED_DTYPES:
        raise ValueError(
            f"unknown KV cache type {name!r}; expected a torch dtype or one of "
            f"{', '.join(QUANTISED_DTYPES)}"
        )
    return QUANTISED_DTYPES[name]


def is_quantised(dtype: torch.dtype) -> bool:
    """Whether a cache of this element type has scales."""
    return dtype in QUANTISED_DTYPES.values()


def largest_value(dtype: torch.dtype) -> float:
    """Largest magnitude that a stored value has before it is multiplied by its scale."""
    return _LIMITS[dtype][0]


def padded_scale_bytes(num_layers: int, num_kv_heads: int, head_dim: int) -> int:
    """Bytes that the scales of one block take: one float32 for K and V of each layer and head.

    Rounded up so that blocks stay apart by whole rows of ``num_kv_heads * head_dim`` values (a CPU
    gathers rows) and by whole 16 bytes (a GPU loads vectors).
    """
    unit = math.lcm(16, num_kv_heads * head_dim)
    return -(-4 * 2 * num_layers * num_kv_heads // unit) * unit


def scale_for(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """Smallest power of two that brings magnitudes up to ``largest`` into the type's range.

    Args:
        largest: float32, not negative.

    Returns:
        float32, same shape: 0 where ``largest`` is 0, NaN where it is not finite.
    """
    _, exponent, mantissa = _LIMITS[dtype]
    # Exact, without a division: a mantissa above the limit's carries into the exponent.
    field = ((largest.view(torch.int32) + (_MANTISSA - mantissa)) >> 23) - exponent
    field = field.clamp(min=1).masked_fill(largest == 0, 0)
    scale = (field << 23).view(torch.float32)
    return scale.masked_fill(~largest.isfinite(), float("nan"))


def encode(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Scaled values to storage, uint8: rounded to nearest, clamped, never a stored NaN."""
    limit = largest_value(dtype)
    values = values.nan_to_num(0.0).clamp(-limit, limit)
    stored = values.round().to(dtype) if dtype == torch.int8 else values.to(dtype)
    return stored.view(torch.uint8)


def decode(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """Stored uint8 or one-byte values to float32, still without their scale."""
    stored = stored.view(dtype) if stored.dtype == torch.uint8 else stored
    if dtype == torch.int8 or stored.device.type != "cpu":
        return stored.float()
    # torch 2.13 converts FP8 one by one on a CPU; looking 256 values up is six times as fast.
    index = stored.view(torch.uint8).int()
    return _fp8_table().index_select(0, index.flatten()).view(index.shape)


@functools.cache
def _fp8_table() -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def quantise(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Encode whole blocks at once.

    Args:
        values: float [..., block_size, num_kv_heads, head_dim].

    Returns:
        Stored values of ``dtype``, the same shape, and float32 scales [..., num_kv_heads].
    """
    values = values.float()
    scale = scale_for(values.abs().amax(dim=(-3, -1)), dtype)
    stored = encode(values * _inverse(scale)[..., None, :, None], dtype)
    return stored.view(dtype), scale


def dequantise(stored: Tensor, scale: Tensor) -> Tensor:
    """float32 values of blocks [..., block_size, kv_heads, head_dim], scales [..., kv_heads]."""
    return decode(stored, stored.dtype) * scale[..., None, :, None]


def write_kv_quantised(
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    k: Tensor,
    v: Tensor,
    batch: BatchMetadata,
) -> None:
    """Encode one step's K and V into the pages of one layer, in place, and update their scales.

    A block that this step starts (its first slot is written) forgets its former scale. In a block
    that is continued the scale only grows, and the values that it holds are encoded again.

    Args:
        k_cache, v_cache: int8 or float8_e4m3fn [num_blocks, block_size, num_kv_heads, head_dim].
        k_scale, v_scale: float32 [num_blocks, num_kv_heads], any strides.
        k, v: float [num_tokens, num_kv_heads, head_dim].
        batch: its slot mapping says where; -1 is not written. The tokens that one step writes
            into one block must be neighbours, as those of one sequence are.
    """
    if _can_use_triton(k_cache, v_cache, k_scale, v_scale, k, v):
        from ch15_helpers.kernels.kv_quant_triton import write_kv_quantised_triton

        limit = _LIMITS[k_cache.dtype]
        write_kv_quantised_triton(
            k_cache, v_cache, k_scale, v_scale, k, v, batch.slot_mapping, limit
        )
        return
    key = ("write_kv_quantised", k_cache.shape[1])
    if key not in batch.scratch:
        batch.scratch[key] = _make_plan(batch, k_cache.shape[1])
    plan: _Plan | None = batch.scratch[key]
    if plan is None:
        return
    for cache, scale, values in ((k_cache, k_scale, k), (v_cache, v_scale, v)):
        _write(cache, scale, values, plan)


def _can_use_triton(
    k_cache: Tensor, v_cache: Tensor, k_scale: Tensor, v_scale: Tensor, k: Tensor, v: Tensor
) -> bool:
    same = k_cache.stride() == v_cache.stride() and k_scale.stride() == v_scale.stride()
    if not (same and use_triton(k_cache, v_cache, k, v)):
        return False
    return writes_in_one_launch(k_cache.dtype, k.device)


def writes_in_one_launch(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether writing takes no word from the host, so that any step can be captured.

    Triton converts to E4M3 on devices of capability 8.9 and later.
    """
    if device.type != "cuda" or not triton_installed():
        return False
    return dtype == torch.int8 or torch.cuda.get_device_capability(device) >= (8, 9)


@dataclass(frozen=True)
class _Plan:
    """What does not depend on the layer. N tokens are written into U different blocks.

    ``tokens`` int64 [N] are rows of the flat batch (None: all), ``offset`` [N] their slots in
    their blocks, ``blocks`` [U] the blocks, ``place`` [N] each token's row of ``blocks`` (None:
    one token each, in order), ``continued`` bool [U] whether the block has earlier tokens. ``some``
    is a bool on the device, false when nothing at all is to be written; None: known to be true.
    """

    tokens: Tensor | None
    offset: Tensor
    blocks: Tensor
    place: Tensor | None
    continued: Tensor
    some: Tensor | None


def _make_plan(batch: BatchMetadata, block_size: int) -> _Plan | None:
    slots = batch.slot_mapping
    if slots.device.type != "cpu" and batch.decode_only:
        # Fixed shapes and no wait, so that it can be captured: padding repeats the first real row.
        valid = slots >= 0
        first = valid.to(torch.uint8).argmax()
        tokens = torch.where(valid, torch.arange(len(slots), device=slots.device), first)
        slots = slots.index_select(0, tokens).clamp(min=0)
        offset = slots % block_size
        return _Plan(tokens, offset, slots // block_size, None, offset > 0, valid.any())
    valid = slots >= 0
    kept = None if bool(valid.all()) else valid.nonzero().flatten()
    slots = slots if kept is None else slots.index_select(0, kept)
    if len(slots) == 0:
        return None
    offset = slots % block_size
    if batch.decode_only:
        return _Plan(kept, offset, slots // block_size, None, offset > 0, None)
    blocks, place = torch.unique(slots // block_size, return_inverse=True)
    first_offset = torch.full_like(blocks, block_size)
    first_offset.scatter_reduce_(0, place, offset, "amin")
    return _Plan(kept, offset, blocks, place, first_offset > 0, None)


def _write(cache: Tensor, scale: Tensor, values: Tensor, plan: _Plan) -> None:
    dtype, stored = cache.dtype, cache.view(torch.uint8)
    values = values.float() if plan.tokens is None else values.index_select(0, plan.tokens).float()
    needed = scale_for(values.abs().amax(-1), dtype)
    held = scale.index_select(0, plan.blocks).masked_fill(~plan.continued[:, None], 0.0)
    if plan.place is None:
        grown = torch.maximum(held, needed)
    else:
        index = plan.place[:, None].expand_as(needed)
        grown = held.scatter_reduce(0, index, needed, "amax")
    _encode_again(stored, held, grown, dtype, plan)
    inverse, blocks = _inverse(grown), plan.blocks
    if plan.place is not None:
        inverse, blocks = inverse.index_select(0, plan.place), blocks.index_select(0, plan.place)
    encoded = encode(values * inverse[:, :, None], dtype)
    if plan.some is not None:
        encoded = torch.where(plan.some, encoded, stored[blocks, plan.offset])
        grown = torch.where(plan.some, grown, scale.index_select(0, plan.blocks))
    stored.index_put_((blocks, plan.offset), encoded)
    scale.index_copy_(0, plan.blocks, grown)


def _encode_again(
    stored: Tensor, held: Tensor, grown: Tensor, dtype: torch.dtype, plan: _Plan
) -> None:
    """Bring the earlier tokens of continued blocks from scale ``held`` to scale ``grown``."""
    ratio = held * _inverse(grown)
    if stored.device.type == "cpu":
        # Usually no scale grows, and then no block need be read.
        changed = ((ratio != 1) & (held != 0)).any(1).nonzero().flatten()
        if len(changed) == 0:
            return
        blocks, ratio = plan.blocks.index_select(0, changed), ratio.index_select(0, changed)
    else:
        blocks = plan.blocks
    before = stored.index_select(0, blocks)
    again = encode(decode(before, dtype) * ratio[:, None, :, None], dtype)
    if plan.some is not None:
        again = torch.where(plan.some, again, before)
    stored.index_copy_(0, blocks, again)


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale, 0 where the scale is 0."""
    return torch.where(scale == 0, 0.0, 1.0 / scale)
