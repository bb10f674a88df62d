"""A checksum of KV blocks that costs about as much as reading them, on CPU and GPU alike.

The digest of a row of 64-bit words is ``sum(weight[i] * word[i])`` modulo 2**64 with odd weights
(multilinear hashing: Carter and Wegman, 1979). An odd weight has an inverse, so any change to a
single word changes the digest, always. It guards against faults, not against an attacker.

A product for each word costs several times as much as reading it. So the words are added first, as
in Fletcher's sums (IEEE Trans. Commun. 1982): lines of 1016 words, 16 at a time, one below the
other, become one line, and only that one is multiplied. The 16 words that share a weight are a
multiple of 8128 bytes apart. That is 64 times a prime, so a run of bytes that lands elsewhere gets
other weights wherever heads, tokens, layers and pages have round sizes. What is not noticed: two
changes that cancel, +d and -d, at exactly such a distance; for two random flipped bits one chance
in two million.

Elsewhere words that trade places change the digest unless the product of the differences of words
and weights is a multiple of 2**64: about one chance in 2**60 for words that differ in their lowest
bits.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
LINE_WORDS = 8 * 127
FOLD = 16
_LEAST_LINES = 4


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
        lines = num_words // LINE_WORDS
        self._lines = lines if lines >= _LEAST_LINES else 0
        self._rest = _odd_weights(0, num_words - self._lines * LINE_WORDS, device)
        # The weight of a word is the product of one of its column and one of its group of lines:
        # few enough for the first-level cache.
        self._columns = _odd_weights(1, LINE_WORDS, device)
        self._groups = _odd_weights(2, -(-self._lines // FOLD), device)

    def __call__(self, rows: Tensor) -> Tensor:
        """Digests, int64 [n] on the rows' device, of uint8 ``rows`` [n, 8 * num_words].

        Deterministic: integer sums do not depend on their order.
        """
        words = rows.view(torch.int64)
        if words.shape[1] != self.num_words:
            raise ValueError(f"rows have {words.shape[1]} words, expected {self.num_words}")
        cut = self._lines * LINE_WORDS
        digests = _times(words[:, cut:], self._rest)
        if self._lines:
            folded = self._folded(words).view(-1, LINE_WORDS)
            digests += _times(_times(folded, self._columns).view(len(rows), -1), self._groups)
        return digests

    def _folded(self, words: Tensor) -> Tensor:
        """The lines of each row, 16 to one: int64 [n, groups, LINE_WORDS]."""
        whole = self._lines // FOLD
        cut, end = whole * FOLD * LINE_WORDS, self._lines * LINE_WORDS
        folded = words.new_empty(len(words), len(self._groups), LINE_WORDS)
        _add(words[:, :cut].unflatten(1, (whole, FOLD, LINE_WORDS)), folded[:, :whole])
        if cut < end:
            left = words[:, cut:end].unflatten(1, (1, -1, LINE_WORDS))
            _add(left, folded[:, whole:])
        return folded


def _add(lines: Tensor, sums: Tensor) -> None:
    """Sum over the third axis in wrapping int64. NumPy's is a third faster than torch's."""
    if lines.is_cpu:
        np.add.reduce(lines.numpy(), axis=2, out=sums.numpy())
    else:
        torch.sum(lines, dim=2, out=sums)


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
