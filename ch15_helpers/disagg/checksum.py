"""A checksum of KV blocks that costs about as much as reading them, on CPU and GPU alike.

The digest of a row of 64-bit words is ``sum(weight[i] * word[i])`` modulo 2**64 with odd weights
(multilinear hashing: Carter and Wegman, 1979). An odd weight has an inverse, so any change to a
single word changes the digest, always. It guards against faults, not against an attacker.

A product for each word costs several times as much as reading it. So the words are added first, as
in Fletcher's sums (IEEE Trans. Commun. 1982): lines of 1016 words, 16 at a time, one below the
other, become one line, and only that one is multiplied. The 16 words that share a weight are a
multiple of 8128 bytes apart. That is 64 times a prime, so a run of bytes that lands elsewhere gets
other weights wherever heads, tokens, layers and pages have round sizes. What is not noticed: two
changes that cancel, +d and -d, at exactly such a distance: for two random flipped bits less than
one chance in 100,000.

Elsewhere words that trade places change the digest unless the product of the differences of words
and weights is a multiple of 2**64: about one chance in 2**60 for words that differ in their lowest
bits.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ch15_helpers.kernels.cpu_library import cpu_library

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
LINE_WORDS = 8 * 127
FOLD = 16
_LEAST_LINES = 4
Words = npt.NDArray[np.int64]


def splitmix64(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64 of each uint64 (Steele et al., OOPSLA 2014), as in ``serving.sampling``."""
    mixed = values + _GOLDEN
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


class Checksum:
    """Digests of rows of one length.

    Attributes:
        num_words: 64-bit words in a row. num_lines: lines of these.
        weights: int64 of columns, of groups of 16 lines, and of the words after the last line.
    """

    def __init__(self, num_words: int, device: torch.device | str = "cpu") -> None:
        self.num_words = num_words
        lines = num_words // LINE_WORDS
        lines = lines if lines >= _LEAST_LINES else 0
        self.num_lines = lines
        whole, left = divmod(lines, FOLD)
        middle, self._cut = whole * FOLD * LINE_WORDS, lines * LINE_WORDS
        folds = ((0, middle, FOLD), (middle, self._cut, left))
        self._folds = [fold for fold in folds if fold[0] < fold[1]]
        # The weight of a word is the product of one of its column and one of its group of lines:
        # few enough for the first-level cache.
        counts = LINE_WORDS, whole + (left > 0), num_words - self._cut
        self._arrays = [_odd_weights(family, count) for family, count in enumerate(counts)]
        self.weights = [torch.from_numpy(each).to(device) for each in self._arrays]
        self._pointers = [each.ctypes.data for each in self._arrays]

    def __call__(self, rows: Tensor) -> Tensor:
        """Digests, int64 [n] on the rows' device, of uint8 ``rows`` [n, 8 * num_words].

        Deterministic: integer sums do not depend on their order.
        """
        words = rows.view(torch.int64)
        if words.shape[1] != self.num_words:
            raise ValueError(f"rows have {words.shape[1]} words, expected {self.num_words}")
        if words.is_cpu:
            digests = torch.empty(len(words), dtype=torch.int64)
            self.into(rows, digests)
            return digests
        return self.portable(words)

    def into(self, rows: Tensor, digests: Tensor) -> None:
        """As a call, for rows [n, 8 * num_words] of a CPU; writes int64 ``digests`` [n]."""
        library = cpu_library()
        if library is None or rows.stride(1) != 1:
            # NumPy's integer product takes half the time of torch's.
            digests.copy_(torch.from_numpy(self._on_cpu(rows.view(torch.int64).numpy())))
            return
        library.ch15_digest(
            rows.data_ptr(), len(rows), rows.stride(0), self.num_words, self.num_lines,
            *self._pointers, digests.data_ptr(),
        )  # fmt: skip

    def portable(self, words: Tensor) -> Tensor:
        """The same of int64 ``words`` [n, num_words], on any device."""
        folded = [
            words[:, first:last].view(len(words), -1, depth, LINE_WORDS).sum(2)
            for first, last, depth in self._folds
        ]
        columns, groups, rest = self.weights
        digests = (words[:, self._cut :] * rest).sum(1)
        if folded:
            digests += ((torch.cat(folded, 1) * columns).sum(2) * groups).sum(1)
        return digests

    def _on_cpu(self, words: Words) -> Words:
        columns, groups, rest = self._arrays
        count = len(words)
        digests: Words = words[:, self._cut :] @ rest
        if self._folds:
            folded = np.empty((count, len(groups), LINE_WORDS), np.int64)
            done = 0
            for first, last, depth in self._folds:
                lines = words[:, first:last].reshape(count, -1, depth, LINE_WORDS)
                np.add.reduce(lines, axis=2, out=folded[:, done : done + lines.shape[1]])
                done += lines.shape[1]
            digests += (folded @ columns) @ groups
        return digests


def _odd_weights(family: int, count: int) -> Words:
    numbers = np.arange(count, dtype=np.uint64) + np.uint64(family << 32)
    return (splitmix64(numbers) | np.uint64(1)).view(np.int64)
