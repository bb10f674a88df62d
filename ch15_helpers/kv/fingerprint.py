"""A name for a model's weights, for blocks that outlive the process that computed them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def weights_fingerprint(
    source: str, dtype: torch.dtype, weights: Iterable[tuple[str, Tensor]]
) -> str:
    """Hex digest of names, shapes and content; a fine-tuned copy under the same name differs.

    Content enters through sums over all of a tensor's bytes as integers, of even and of odd words
    apart, so every bit counts and the order of additions does not. One pass over the weights.
    """
    digest = hashlib.blake2b(f"{source} {dtype}".encode(), digest_size=16)
    for name, weight in weights:
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        words = weight.detach().contiguous().view(torch.uint8).view(-1)
        words = words[: len(words) // 4 * 4].view(torch.int32)
        sums = [words[start::2].sum(dtype=torch.int64) for start in range(2)]
        digest.update(repr([int(total) for total in sums]).encode())
    return digest.hexdigest()
