"""When an operation may take its Triton version."""

from __future__ import annotations

import functools
import importlib.util
import warnings

import torch
from torch import Tensor

_TOO_WIDE = (torch.float64, torch.complex64, torch.complex128)


@functools.cache
def triton_installed() -> bool:
    """Whether Triton can be imported (it comes with CUDA builds of torch)."""
    return importlib.util.find_spec("triton") is not None


def use_triton(*tensors: Tensor) -> bool:
    """Whether all tensors are on a CUDA device with contiguous last axes, and Triton is there.

    The kernels add in float32: wider types are left to torch, with a warning.
    """
    if not (all(t.is_cuda and t.stride(-1) == 1 for t in tensors) and triton_installed()):
        return False
    wide = next((t.dtype for t in tensors if t.dtype in _TOO_WIDE), None)
    if wide is not None:
        warnings.warn(
            f"torch computes this, not a Triton kernel: they take no {wide}", stacklevel=3
        )
    return wide is None


@functools.cache
def num_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 2 elsewhere, for Triton's interpreter."""
    if device.type != "cuda":
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether the device is a Hopper GPU (compute capability 9.0), for kernels written for it."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


@functools.cache
def launches_early(device: torch.device) -> bool:
    """Whether a kernel may be launched before the one before it has ended (Hopper and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
