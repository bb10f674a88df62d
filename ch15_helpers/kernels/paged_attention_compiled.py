"""Paged attention by our own C++ on the CPU: it reads the pages where they are.

:mod:`~ch15_helpers.kernels.paged_attention_sdpa` copies each sequence's pages together, in every
layer of every step, before torch may attend; here nothing is copied but one tile of 32 keys at a
time. Bytes: keys and values of the context once for each KV head. Operations: 4 for each query
head, token of context and channel. ``cpu_attention.cpp`` has the arithmetic.

A query's result depends on its own sequence alone, bit for bit: not on the other sequences, on how
its prompt was cut into chunks, on the page size or the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ch15_helpers.kernels.batch import BatchMetadata
from ch15_helpers.kernels.cpu_library import cpu_library, threads_for

_MAX_GROUP = 96
_FUNCTIONS = {
    torch.float32: "ch15_attention_float32",
    torch.bfloat16: "ch15_attention_bfloat16",
}


def compiled_unsupported_reason(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, quantised: bool = False
) -> str | None:
    """Why the compiled kernel cannot take these tensors, or None when it can."""
    if q.device.type != "cpu":
        return f"the tensors are on {q.device.type}, the kernel runs on the CPU"
    if q.dtype not in _FUNCTIONS:
        return f"the queries are {q.dtype}, the kernel needs float32 or bfloat16"
    if quantised or not q.dtype == k_cache.dtype == v_cache.dtype:
        return f"the cache is {k_cache.dtype}, the kernel needs the queries' {q.dtype}"
    if k_cache.stride(-1) != 1 or k_cache.stride() != v_cache.stride():
        return "keys and values are not laid out alike, with contiguous rows"
    if q.shape[1] // k_cache.shape[2] > _MAX_GROUP:
        return f"more than {_MAX_GROUP} query heads share a KV head"
    return None if cpu_library() is not None else "there is no compiled library"


def paged_attention_compiled(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: BatchMetadata, scale: float
) -> Tensor:
    """See :func:`ch15_helpers.kernels.paged_attention.paged_attention`; pages are not quantised.

    Raises:
        ValueError: the tensors are not the kernel's, or their shapes do not go together.
        IndexError: a block table or a length points outside the cache.
    """
    key = ("compiled", q.shape, k_cache.shape, k_cache.stride(), q.dtype)
    plan = batch.scratch.get(key)
    if plan is None:
        plan = batch.scratch[key] = _prepare(q, k_cache, v_cache, batch)
    function, tables, sizes, work, _ = plan
    if q.stride(2) != 1 or q.stride(1) != q.shape[2]:
        q = q.contiguous()
    out = torch.zeros(q.shape, dtype=q.dtype)
    function(
        q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), out.data_ptr(), *tables, *sizes,
        q.stride(0), *k_cache.stride()[:3], scale, threads_for(work),
    )  # fmt: skip
    return out


def _prepare(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: BatchMetadata
) -> tuple[Callable[..., None], tuple[int, ...], tuple[int, ...], int, tuple[Tensor, ...]]:
    """What the kernel is called with in every layer of a step, checked once."""
    reason = compiled_unsupported_reason(q, k_cache, v_cache)
    if reason is not None:
        raise ValueError(f"compiled attention does not apply: {reason}; use backend 'auto'")
    heads, dim = q.shape[1:]
    num_blocks, page, kv_heads, _ = k_cache.shape
    if k_cache.shape != v_cache.shape or k_cache.shape[3] != dim or heads % kv_heads:
        raise ValueError(
            f"queries {tuple(q.shape)} do not fit keys {tuple(k_cache.shape)} and values "
            f"{tuple(v_cache.shape)}"
        )
    kept = checked_tables(batch, len(q), num_blocks, page)
    function = getattr(cpu_library(), _FUNCTIONS[q.dtype])
    sizes = (batch.num_seqs, kept[0].shape[1], heads, kv_heads, dim, page)
    work = len(q) * batch.max_context_len * heads * dim
    return function, tuple(t.data_ptr() for t in kept), sizes, work, kept


def checked_tables(
    batch: BatchMetadata, num_tokens: int, num_blocks: int, page: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Block tables, query starts and context lengths as the kernel reads them: int32, in one run.

    Raises:
        IndexError: one of them points outside the batch or the cache, where the kernel would read
            whatever is there.
    """
    tables, starts, lens = (
        t.to(torch.int32).contiguous()
        for t in (batch.block_tables, batch.query_starts, batch.context_lens)
    )
    context = int(lens.max()) if len(lens) else 0
    if context > tables.shape[1] * page or len(starts) != len(lens) + 1:
        raise IndexError(f"{context} tokens need more than {tables.shape[1]} blocks of {page}")
    if tables.numel() and not 0 <= int(tables.min()) <= int(tables.max()) < num_blocks:
        raise IndexError(f"a block table names a block that is not one of {num_blocks}")
    if int(starts[-1]) > num_tokens or bool((starts.diff() < 0).any()):
        raise IndexError(f"the sequences' queries are not rows of {num_tokens}")
    return tables, starts, lens
