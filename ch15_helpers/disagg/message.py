"""The wire format: a batch of blocks as one run of bytes, each with a tag and a checksum.

A message of ``n`` blocks is ``n`` tags of 48 bytes and ``n`` rows. A tag holds sequence, logical
index, layers, heads, the digest of the row, and a guard over these five. What belongs where is
decided by tags that pass their guard, never by the order of arrival.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ch15_helpers.disagg.checksum import splitmix64
from ch15_helpers.disagg.pool import BlockRef, Part

TAG_WORDS = 6
TAG_BYTES = 8 * TAG_WORDS
Words = npt.NDArray[np.uint64]
Key = tuple[int, int]
"""(sequence, logical index)."""


def message_bytes(num_blocks: int, row_bytes: int) -> int:
    """Bytes of a message."""
    return num_blocks * (TAG_BYTES + row_bytes)


def split(buffer: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Tags uint8 [n, 48] and rows uint8 [n, row_bytes]: views into a message."""
    cut = num_blocks * TAG_BYTES
    return buffer[:cut].view(num_blocks, TAG_BYTES), buffer[cut:].view(num_blocks, -1)


def write_tags(tags: Tensor, refs: Sequence[BlockRef], part: Part, digests: Tensor) -> None:
    """Fill the tags of a message, on the device where it is."""
    words = np.empty((len(refs), TAG_WORDS), dtype=np.uint64)
    words[:, 0] = [ref.sequence for ref in refs]
    words[:, 1] = [ref.index for ref in refs]
    words[:, 2], words[:, 3] = packed_range(part.layers), packed_range(part.heads)
    words[:, 4] = digests.cpu().numpy().view(np.uint64)
    words[:, 5] = _guards(words)
    tags.copy_(torch.from_numpy(words.view(np.uint8)))


def write_void(tags: Tensor) -> None:
    """Tags of a message that brings nothing: its sender gave up, or the fabric lost it."""
    tags.zero_()


class Tags:
    """The tags of a message that arrived.

    Attributes:
        keys: of each row, or None where the tag fails its guard or names another part.
        promised: the digest that each row must have, int64.
        void: every tag is zero: the message brings nothing.
    """

    def __init__(self, tags: Tensor, part: Part) -> None:
        """Examine uint8 ``tags`` [n, 48] on any device."""
        words: Words = tags.cpu().contiguous().numpy().view(np.uint64)
        self._genuine = words[:, 5] == _guards(words)
        self._genuine &= words[:, 2] == packed_range(part.layers)
        self._genuine &= words[:, 3] == packed_range(part.heads)
        self.promised = words[:, 4].view(np.int64)
        self.void = not words.any()
        pairs = zip(words[:, 0].tolist(), words[:, 1].tolist(), self._genuine, strict=True)
        self.keys: list[Key | None] = [(seq, index) if good else None for seq, index, good in pairs]

    def exchanged(self, digest: int) -> bool:
        """Whether some genuine tag promises this digest."""
        return bool((self.promised[self._genuine] == digest).any())


def packed_range(bounds: tuple[int, int]) -> np.uint64:
    """A range of layers or heads as it stands in a tag."""
    return np.uint64(bounds[0] << 32 | bounds[1])


def _guards(words: Words) -> Words:
    """Hash of the first five words of each tag; an all-zero tag does not pass."""
    state: Words = np.full(len(words), 0xC4B15, dtype=np.uint64)
    for column in range(TAG_WORDS - 1):
        state = splitmix64(state ^ words[:, column])
    return state
