"""A checksum of KV blocks that costs about as much as reading them, on CPU and GPU alike.

The digest of a row of 64-bit words is ``sum(weight[i] * word[i])`` modulo 2**64 with fixed odd
weights. An odd weight has an inverse, so any change to a single word changes the digest, always.
Words that trade places change it unless the product of the differences of words and weights is a
multiple of 2**64: about one chance in 2**60 for words that differ in their lowest bits. It guards
against faults, not against an attacker. (Multilinear hashing: Carter and Wegman, 1979.)

Words are seen as a matrix, and a weight is the product of one of its row and one of its column:
then the weights fit into the first-level cache and only the words are read from memory.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_LONGEST_ROW = 1024


def splitmix64(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64 of each uint64 (Steele et al., OOPSLA 2014), as in ``serving.sampling``."""
    mixed = values + _GOLDEN
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


class Checksum:
    """Digests of rows of one length.

    Attributes:
        num_words: 64-bit words in a row.
    """

    def __init__(self, num_words: int, device: torch.device | str = "cpu") -> None:
        self.num_words = num_words
        columns = next(c for c in range(_LONGEST_ROW, 0, -1) if num_words % c == 0)
        self._columns = _odd_weights(0, columns, device)
        self._rows = _odd_weights(1, num_words // columns, device)

    def __call__(self, rows: Tensor) -> Tensor:
        """Digests, int64 [n] on the rows' device, of uint8 ``rows`` [n, 8 * num_words].

        Deterministic: integer sums do not depend on their order.
        """
        words = rows.view(torch.int64)
        if words.shape[1] != self.num_words:
            raise ValueError(f"rows have {words.shape[1]} words, expected {self.num_words}")
        matrix = words.reshape(-1, len(self._columns))
        return _times(_times(matrix, self._columns).view(len(rows), -1), self._rows)


def _times(matrix: Tensor, weights: Tensor) -> Tensor:
    """Matrix times vector in wrapping int64.

    NumPy's product is vectorised and takes half the time of torch's; CUDA has none for integers.
    """
    if matrix.is_cpu:
        return torch.from_numpy(matrix.numpy() @ weights.numpy())
    return (matrix * weights).sum(1)


def _odd_weights(family: int, count: int, device: torch.device | str) -> Tensor:
    numbers = np.arange(count, dtype=np.uint64) + np.uint64(family << 32)
    return torch.from_numpy((splitmix64(numbers) | np.uint64(1)).view(np.int64)).to(device)
