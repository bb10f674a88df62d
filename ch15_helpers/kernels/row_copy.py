"""Copies numbered rows of bytes from one matrix to another, which may be a peer device's.

A GPU reads and writes a peer's memory by plain loads and stores, once peer access is on. So the
blocks of a request come over in one launch, from wherever they lie to wherever they belong: no
copy for each block, no buffer on either side, and no synchronisation. Bytes: each row crosses the
link once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ch15_helpers.kernels.dispatch import triton_installed

PROGRAMS = 128
"""Programs of one copy. Each has 32 KiB under way; a link's bandwidth times its latency is about a
MiB, so that this fills it and leaves most of a GPU's room for blocks of threads to others."""


def copy_rows(source: Tensor, target: Tensor, ids: Tensor, programs: int = PROGRAMS) -> None:
    """``target[ids[1, i]] = source[ids[0, i]]`` for every i.

    Args:
        source, target: uint8 [rows, row bytes], neighbouring bytes of a row adjacent. With CUDA
            either may lie on a peer of the current device, after :func:`open_peer`.
        ids: int32 [2, n] on the current device; the target's rows are distinct.
        programs: how many may run at once.

    Raises:
        ValueError: types or sizes differ.
    """
    if source.dtype != torch.uint8 or target.dtype != torch.uint8:
        raise ValueError(f"rows must be uint8, got {source.dtype} and {target.dtype}")
    if source.shape[1] != target.shape[1] or ids.shape[0] != 2:
        raise ValueError(
            f"rows of {source.shape[1]} and {target.shape[1]} bytes, ids {tuple(ids.shape)}; "
            "rows must be equally long and ids [2, n]"
        )
    if triton_installed() and ids.is_cuda:
        from ch15_helpers.kernels.row_copy_triton import copy_rows_triton

        copy_rows_triton(source, target, ids, programs=programs)
        return
    target.index_copy_(0, ids[1].long(), source.index_select(0, ids[0].long()))


def can_copy_between(local: torch.device, peer: torch.device) -> bool:
    """Whether a kernel on ``local`` may touch rows of ``peer``."""
    return (
        triton_installed()
        and local.type == peer.type == "cuda"
        and torch.cuda.can_device_access_peer(local, peer)
    )


def open_peer(local: torch.device, peer: torch.device) -> None:
    """Let kernels of either device reach the memory of the other; torch turns peer access on with
    its first copy in each direction."""
    here, there = torch.zeros(1, device=local), torch.zeros(1, device=peer)
    there.copy_(here)
    here.copy_(there)
    torch.cuda.synchronize(local)
    torch.cuda.synchronize(peer)
