"""Attention over the paged KV cache: one signature, four backends.

Kwon et al., "Efficient Memory Management for Large Language Model Serving with
PagedAttention", SOSP 2023. ``reference`` is plain maths, one sequence at a time; ``sdpa`` gathers
pages and calls torch's fused attention; ``triton`` (CUDA) and ``compiled`` (CPU) read the pages
where they are.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ch15_helpers.kernels.batch import BatchMetadata
from ch15_helpers.kernels.cpu_library import cpu_library
from ch15_helpers.kernels.dispatch import triton_installed
from ch15_helpers.kernels.kv_quant import dequantise, is_quantised
from ch15_helpers.kernels.paged_attention_compiled import (
    compiled_unsupported_reason,
    paged_attention_compiled,
)
from ch15_helpers.kernels.paged_attention_sdpa import paged_attention_sdpa

BACKENDS = ("auto", "reference", "sdpa", "compiled", "triton")
_MAX_QUERIES = 8


def default_backend(device: torch.device | str) -> str:
    """The backend that ``auto`` means on a device: ``triton`` on CUDA, on the CPU ``compiled``.

    That is ``sdpa`` where the CPU's kernels cannot be compiled.
    """
    kind = torch.device(device).type
    if kind == "cpu" and cpu_library() is not None:
        return "compiled"
    return "triton" if kind == "cuda" else "sdpa"


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: BatchMetadata,
    scale: float,
    backend: str = "auto",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Causal attention of each query over its own sequence's pages.

    Query ``i`` of a sequence with ``n`` queries sits at position ``context_len - n + i`` and sees
    the positions up to its own. K and V of this step must already be in the cache.

    Args:
        q: [num_tokens, num_heads, head_dim], the flat batch.
        k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim], any strides.
        batch: where each sequence's queries and pages are.
        scale: multiplies the scores, usually ``head_dim ** -0.5``.
        backend: one of :data:`BACKENDS`; ``auto`` is :func:`default_backend`, and falls back to
            ``sdpa`` where that does not support the tensors, on a GPU with a warning.
        k_scale, v_scale: float32 [num_blocks, num_kv_heads], any strides, of an int8 or
            float8_e4m3fn cache: what its stored values are multiplied by.

    Returns:
        [num_tokens, num_heads, head_dim], the dtype of ``q``. Rows of padding sequences hold
        unspecified values.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}; expected one of {BACKENDS}")
    chosen = default_backend(q.device) if backend == "auto" else backend
    if chosen == "triton" and backend == "auto":
        reason = triton_unsupported_reason(q, k_cache)
        if reason is not None:
            warnings.warn(f"paged attention uses sdpa, not triton: {reason}", stacklevel=2)
            chosen = "sdpa"
    if chosen == "compiled":
        quantised = k_scale is not None
        if backend == "compiled" or _compiled_is_best(q, k_cache, v_cache, batch, quantised):
            return paged_attention_compiled(q, k_cache, v_cache, batch, scale)
        chosen = "sdpa"
    if chosen == "reference":
        return paged_attention_reference(q, k_cache, v_cache, batch, scale, k_scale, v_scale)
    if chosen == "sdpa":
        return paged_attention_sdpa(q, k_cache, v_cache, batch, scale, k_scale, v_scale)
    from ch15_helpers.kernels.paged_attention_triton import paged_attention_triton

    return paged_attention_triton(q, k_cache, v_cache, batch, scale, k_scale, v_scale)


def _compiled_is_best(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: BatchMetadata, quantised: bool
) -> bool:
    """Whether ``auto`` leaves this to the compiled kernel rather than to torch.

    It wins in float32, and in bfloat16 for decodes. On prompts in bfloat16 oneDNN has the matrix
    units (2000 tokens: 7.9 ms against 22.8).
    """
    if q.dtype == torch.bfloat16 and batch.max_query_len > _MAX_QUERIES:
        return False
    return compiled_unsupported_reason(q, k_cache, v_cache, quantised) is None


def triton_unsupported_reason(q: Tensor, k_cache: Tensor) -> str | None:
    """Why the Triton kernel cannot run on these tensors, or None when it can."""
    if q.device.type != "cuda":
        return f"the tensors are on {q.device.type}, the kernel needs CUDA"
    if q.shape[-1] > 256:
        return f"head_dim is {q.shape[-1]}, the kernel takes at most 256"
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the queries are {q.dtype}, the kernel needs float16, bfloat16 or float32"
    if k_cache.dtype != q.dtype and not is_quantised(k_cache.dtype):
        return f"the cache is {k_cache.dtype}, the kernel needs the queries' {q.dtype}"
    if k_cache.stride(-1) != 1:
        return "the cache's last axis is not contiguous"
    return None if triton_installed() else "triton is not installed"


def paged_attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: BatchMetadata,
    scale: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Scores, softmax and weighted sum written out in float32, one sequence at a time.

    Runs wherever torch runs. It reads the lengths on the host, so it cannot be captured in a
    CUDA graph.
    """
    block_size, kv_heads = k_cache.shape[1], k_cache.shape[2]
    group = q.shape[1] // kv_heads
    out = torch.empty_like(q)
    query_lens = batch.query_lens_host or tuple(batch.query_starts.diff().tolist())
    context_lens = batch.context_lens_host or tuple(batch.context_lens.tolist())
    start = 0
    for seq, (query_len, context_len) in enumerate(zip(query_lens, context_lens, strict=True)):
        if query_len == 0 or context_len == 0:
            start += query_len
            continue
        blocks = batch.block_tables[seq, : -(-context_len // block_size)].long()
        keys = _blocks(k_cache, blocks, k_scale).flatten(0, 1)[:context_len]
        values = _blocks(v_cache, blocks, v_scale).flatten(0, 1)[:context_len]
        queries = q[start : start + query_len].float().view(query_len, kv_heads, group, -1)
        scores = torch.einsum("qhgd,khd->hgqk", queries, keys) * scale
        positions = torch.arange(context_len, device=q.device)
        visible = positions <= positions[context_len - query_len :, None]
        weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
        mixed = torch.einsum("hgqk,khd->qhgd", weights, values)
        out[start : start + query_len] = mixed.flatten(1, 2).to(q.dtype)
        start += query_len
    return out


def _blocks(cache: Tensor, blocks: Tensor, scale: Tensor | None) -> Tensor:
    """float32 [n, block_size, num_kv_heads, head_dim] of some blocks, decoded where quantised."""
    if scale is None:
        return cache[blocks].float()
    stored = cache.view(torch.uint8)[blocks].view(cache.dtype)
    return dequantise(stored, scale[blocks])
