"""Memory of another process as a tier: real movement between processes, over gloo.

On a machine with one device this stands where NVLink to a peer's HBM would stand. It is not that
link and its times are not that link's times; it shows the same protocol, the same misses when the
peer dies, and the same tokens. Each row has a checksum, which the client keeps.
"""

from __future__ import annotations

import logging
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch

from ch15_helpers.errors import TierError
from ch15_helpers.kv.keys import BlockKey
from ch15_helpers.kv.peer_main import MOST
from ch15_helpers.kv.peer_process import PeerLost, PeerProcess
from ch15_helpers.kv.tier_file import Row
from ch15_helpers.kv.tier_index import Entry, SlotIndex

__all__ = ["PeerLost", "PeerProcess", "PeerProcessTier"]

logger = logging.getLogger(__name__)


class PeerProcessTier:
    """A bounded tier in a peer process. One thread puts, another may get."""

    name = "peer process"

    def __init__(
        self,
        peer: PeerProcess,
        num_blocks: int,
        row_bytes: int,
        *,
        policy: str = "lru",
        faults: Counter[str] | None = None,
    ) -> None:
        """Have the peer make its memory.

        Raises:
            TierError: the peer does not answer.
        """
        self.num_blocks = num_blocks
        self.faults: Counter[str] = Counter() if faults is None else faults
        self._peer, self._row_bytes = peer, row_bytes
        self._policy = policy
        self._index = SlotIndex(num_blocks, policy, row_bytes)
        self._crc: dict[BlockKey, int] = {}
        self._guard = threading.Lock()
        try:
            peer.open(num_blocks, row_bytes)
        except PeerLost as error:
            raise TierError(f"the peer process is gone: {error}; start another one") from error

    def __len__(self) -> int:
        return len(self._index)

    def contains(self, key: BlockKey) -> bool:
        """Whether the peer was given this block, and lives as far as we know."""
        return key in self._crc

    def hand_down(
        self, count: int, unless: Callable[[BlockKey], bool]
    ) -> tuple[list[BlockKey], list[Row]]:
        """Give up the coldest blocks until ``count`` fit; fetches those that are nowhere else."""
        with self._guard:
            index = self._index
            going: list[Entry] = []
            while self._index.num_free + len(going) < min(count, self.num_blocks):
                entry = self._index.coldest()
                if entry is None:
                    break
                self._index.pin(entry)
                going.append(entry)
        keys = [entry.key for entry in going if not unless(entry.key)]
        rows = list(np.empty((len(keys), self._row_bytes), dtype=np.uint8))
        kept = [i for i, ok in enumerate(self.get_many(keys, rows)) if ok]
        with self._guard:
            for entry in going if self._index is index else []:
                index.unpin(entry)
                self._drop(entry)
        return [keys[i] for i in kept], [rows[i] for i in kept]

    def put_many(self, keys: Sequence[BlockKey], rows: Sequence[Row]) -> list[bool]:
        """Send blocks, many in a message."""
        return [
            ok
            for at in range(0, len(keys), MOST)
            for ok in self._put(keys[at : at + MOST], rows[at : at + MOST])
        ]

    def get_many(self, keys: Sequence[BlockKey], out: Sequence[Row]) -> list[bool]:
        """Fetch blocks, many in a message, and check them."""
        return [
            ok
            for at in range(0, len(keys), MOST)
            for ok in self._get(keys[at : at + MOST], out[at : at + MOST])
        ]

    def close(self) -> None:
        """Forget what the peer has. The process belongs to whoever started it."""
        with self._guard:
            self._index = SlotIndex(self.num_blocks, self._policy, self._row_bytes)
            self._crc = {}

    def check_invariants(self) -> None:
        """Raise AssertionError when the index is inconsistent."""
        with self._guard:
            self._index.check_invariants()
            assert all(key in self._index for key in self._crc), "a checksum of nothing"
            arriving = [entry for entry in self._index if entry.key not in self._crc]
            assert all(entry.pins for entry in arriving), "a block without its checksum"

    # ---- inside ----------------------------------------------------------------------------

    def _put(self, keys: Sequence[BlockKey], rows: Sequence[Row]) -> list[bool]:
        with self._guard:
            index = self._index
            entries = [None if self._peer.lost else self._take(key) for key in keys]
        sent = [(e, row) for e, row in zip(entries, rows, strict=True) if e is not None]
        if sent:
            data = torch.from_numpy(np.stack([row for _, row in sent]))
            try:
                self._peer.put([entry.slot for entry, _ in sent], data)
            except PeerLost as error:
                self._lose(error)
                return [False] * len(keys)
        with self._guard:
            if self._index is not index:  # lost meanwhile
                return [False] * len(keys)
            for entry, row in sent:
                self._crc[entry.key] = zlib.crc32(row.data)
                self._index.unpin(entry)
        return [entry is not None for entry in entries]

    def _take(self, key: BlockKey) -> Entry | None:
        """A pinned entry to write to."""
        entry = self._index.get(key)
        if entry is None:
            if not self._index.room():
                victim = self._index.coldest()
                if victim is None:
                    return None
                self._drop(victim)
            entry = self._index.add(key, float(key.depth + 1))
        if entry is not None:
            self._index.pin(entry)
        return entry

    def _get(self, keys: Sequence[BlockKey], out: Sequence[Row]) -> list[bool]:
        ok = [False] * len(keys)
        with self._guard:
            index = self._index
            found: list[tuple[int, Entry]] = []
            for i, key in enumerate(keys):
                entry = index.get(key) if key in self._crc else None
                if entry is not None:
                    index.pin(entry)
                    found.append((i, entry))
        if not found:
            return ok
        try:
            rows = self._peer.get([entry.slot for _, entry in found], self._row_bytes).numpy()
        except PeerLost as error:
            self._lose(error)
            return ok
        with self._guard:
            if self._index is not index:
                return ok
            for (i, entry), row in zip(found, rows, strict=True):
                index.unpin(entry)
                if zlib.crc32(row.data) == self._crc.get(entry.key):
                    np.copyto(out[i], row)
                    self._index.touch(entry)
                    ok[i] = True
                else:
                    self.faults["checksum"] += 1
                    self._drop(entry)
        return ok

    def _drop(self, entry: Entry) -> None:
        self._index.drop(entry)
        self._crc.pop(entry.key, None)

    def _lose(self, error: PeerLost) -> None:
        self.faults["peer lost"] += 1
        logger.warning("the peer process is lost, its blocks are misses from now on: %s", error)
        self.close()
