"""Paged attention on a GPU: which kernel takes which sequences.

Short queries, above all decodes, go to :mod:`~ch15_helpers.kernels.paged_decode_triton`, which is
bound by memory. Prompts and chunks are bound by arithmetic: on Hopper they go to
:mod:`~ch15_helpers.kernels.paged_prefill_triton_hopper`, elsewhere, and where that one does not
apply, to :mod:`~ch15_helpers.kernels.paged_prefill_triton`. A step that holds both is split.
"""

from __future__ import annotations

import functools
import warnings
from types import ModuleType

import torch
import triton
from torch import Tensor

from ch15_helpers.kernels.batch import BatchMetadata
from ch15_helpers.kernels.batch_split import leading_decodes, split_chunks, split_decodes
from ch15_helpers.kernels.dispatch import is_hopper, num_processors
from ch15_helpers.kernels.paged_decode_triton import MAX_ROWS, paged_decode
from ch15_helpers.kernels.paged_prefill_triton import paged_prefill

GLUON_VERSION = "3.6"


def paged_attention_triton(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: BatchMetadata,
    scale: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Causal attention of a varlen batch over paged KV.

    Args:
        q: [num_tokens, num_heads, head_dim], float32, float16 or bfloat16.
        k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim] views with equal strides
            and a contiguous last axis; the step's own K and V are already written. ``q``'s type,
            or int8 or float8_e4m3fn with scales.
        batch: lengths and block tables; a sequence with ``context_lens`` 0 gets zeros.
        scale: factor on the scores, usually ``head_dim ** -0.5``.
        k_scale, v_scale: float32 [num_blocks, num_kv_heads] with equal strides, what the stored
            values of a quantised cache are multiplied by.

    Returns:
        [num_tokens, num_heads, head_dim] in ``q``'s type.
    """
    _check(k_cache, v_cache, k_scale, v_scale)
    kv = (k_cache, v_cache)
    scales = (k_scale, v_scale)
    out = torch.empty_like(q)
    group = q.shape[1] // k_cache.shape[2]
    if batch.decode_only or group * batch.max_query_len <= MAX_ROWS:
        return paged_decode(q, *kv, batch, scale, *scales, out)
    decodes = leading_decodes(batch)
    if decodes > 0:
        first, batch = split_decodes(batch, decodes)
        paged_decode(q[:decodes], *kv, first, scale, *scales, out[:decodes])
        q_rest, out_rest = q[decodes:], out[decodes:]
    else:
        q_rest, out_rest = q, out
    if _underfills(q_rest, k_cache, batch):
        pieces = split_chunks(batch, max(1, MAX_ROWS // group))
        paged_decode(q_rest, *kv, pieces, scale, *scales, out_rest)
        return out
    hopper = _hopper_kernel() if is_hopper(q.device) else None
    if hopper is not None and hopper.worth_gathering(q_rest, k_cache, batch):
        hopper.paged_prefill_hopper(q_rest, *kv, batch, scale, *scales, out_rest)
        return out
    paged_prefill(q_rest, *kv, batch, scale, *scales, out_rest)
    return out


@functools.cache
def _hopper_kernel() -> ModuleType | None:
    """The module of the Hopper kernel, where Triton's Gluon is the one that it was written for."""
    if not triton.__version__.startswith(GLUON_VERSION):
        warnings.warn(
            f"prompts take the portable attention kernel: the one for Hopper is written for Triton "
            f"{GLUON_VERSION}'s Gluon, which changes between versions, and this is Triton "
            f"{triton.__version__}",
            stacklevel=2,
        )
        return None
    from ch15_helpers.kernels import paged_prefill_triton_hopper

    return paged_prefill_triton_hopper


def _underfills(q: Tensor, k_cache: Tensor, batch: BatchMetadata) -> bool:
    """Whether a chunk is so short that its tiles would leave most of the device idle."""
    if len(batch.query_lens_host) != batch.num_seqs:
        return False
    num_kv_heads = k_cache.shape[2]
    rows = (q.shape[0] + 31 * batch.num_seqs) * q.shape[1] // num_kv_heads
    tiles = rows // 128 * num_kv_heads
    return 2 * tiles < num_processors(q.device) and batch.max_context_len >= 1024


def _check(
    k_cache: Tensor, v_cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None
) -> None:
    if k_cache.stride() != v_cache.stride():
        raise ValueError(
            f"k_cache and v_cache must have equal strides, got {k_cache.stride()} and "
            f"{v_cache.stride()}: take both from one paged cache."
        )
    if (k_scale is None) != (v_scale is None) or (
        k_scale is not None and v_scale is not None and k_scale.stride() != v_scale.stride()
    ):
        raise ValueError("k_scale and v_scale must both be given, with equal strides")
