"""When an operation may take its Triton version."""

from __future__ import annotations

import functools
import importlib.util

from torch import Tensor


@functools.cache
def triton_installed() -> bool:
    """Whether Triton can be imported (it comes with CUDA builds of torch)."""
    return importlib.util.find_spec("triton") is not None


def use_triton(*tensors: Tensor) -> bool:
    """Whether all tensors are on a CUDA device with contiguous last axes, and Triton is there."""
    return all(t.is_cuda and t.stride(-1) == 1 for t in tensors) and triton_installed()
