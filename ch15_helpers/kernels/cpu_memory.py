"""Memory for weights in huge pages, where the system has them.

A step reads every weight once, so with pages of 4 KiB each 4 KiB begin with a walk through the page
tables. Measured for SmolLM2 at one token on two cores: a step takes 0.96 of the time with pages of
2 MiB. Linux gives them on request (``madvise``); elsewhere this is ordinary memory.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

_PAGE_BYTES = 2 << 20


def empty_in_huge_pages(numel: int, dtype: torch.dtype) -> Tensor:
    """A flat tensor of ``numel`` elements, uninitialised; memory is taken as it is written."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    size = numel * dtype.itemsize
    if advice is None or size < _PAGE_BYTES:
        return torch.empty(numel, dtype=dtype)
    memory = mmap.mmap(-1, size + _PAGE_BYTES)
    try:
        memory.madvise(advice)
    except OSError:  # a kernel without them: pages of the usual size
        return torch.empty(numel, dtype=dtype)
    flat = torch.frombuffer(memory, dtype=torch.uint8)
    start = -flat.data_ptr() % _PAGE_BYTES
    return flat[start : start + size].view(dtype)
