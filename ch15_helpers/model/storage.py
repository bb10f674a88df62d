"""How weight matrices lie in memory on each kind of device."""

from __future__ import annotations

import torch
from torch import Tensor


def empty_weight(
    out_features: int, in_features: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """An uninitialised [out_features, in_features] weight, in the order its device reads best.

    On CUDA rows are contiguous. On the CPU columns are: MKL multiplies a handful of rows by a
    matrix stored [in, out] up to twice as fast as by one stored [out, in], and batches of
    decodes are just that. The shape that callers see is the same.
    """
    if device.type == "cpu":
        return torch.empty(in_features, out_features, dtype=dtype).t()
    return torch.empty(out_features, in_features, device=device, dtype=dtype)
