"""The disk tier: one file per block, bounded, readable again after a restart or a crash."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from ch15_helpers.errors import TierError
from ch15_helpers.kv.keys import BlockKey
from ch15_helpers.kv.policies import make_eviction_policy
from ch15_helpers.kv.tier_file import (
    Row,
    UnusableBlock,
    is_complete,
    make_header,
    read_block,
    write_block,
)

logger = logging.getLogger(__name__)
_SUFFIX = ".kv"


class DiskTier:
    """Blocks as files named by digest, in a directory that one store at a time owns.

    One thread writes and another may read meanwhile: a file that goes while it is read is still
    whole for the reader.

    Attributes:
        faults: why files could not be written or used, by reason.
    """

    name = "disk"

    def __init__(
        self,
        directory: str | Path,
        num_blocks: int,
        *,
        geometry: str,
        fingerprint: str = "",
        policy: str = "lru",
        fsync: bool = True,
        faults: Counter[str] | None = None,
    ) -> None:
        """Take the directory over and list what is usable in it.

        Half-written files of a crash are removed, and so is what exceeds ``num_blocks``, oldest
        first. Files that do not have our names are left alone.

        Args:
            geometry, fingerprint: of the cache and of the model; a file with others is a miss.

        Raises:
            TierError: the directory cannot be made, written to, or is in use by another store.
        """
        self.num_blocks = num_blocks
        self.faults: Counter[str] = Counter() if faults is None else faults
        self._directory = Path(directory)
        self._geometry, self._fingerprint, self._fsync = geometry, fingerprint, fsync
        self._policy = make_eviction_policy(policy)
        self._known: set[bytes] = set()
        self._guard = threading.Lock()
        self._lock = self._take_over()
        self._list()

    def __len__(self) -> int:
        return len(self._known)

    def contains(self, key: BlockKey) -> bool:
        """Whether there is a file of this name. No I/O; what is in it is checked by ``get``."""
        return key.digest in self._known

    def hand_down(
        self, count: int, unless: Callable[[BlockKey], bool]
    ) -> tuple[list[BlockKey], list[Row]]:
        """The last tier hands nothing down; it makes room as it writes."""
        return [], []

    def put_many(self, keys: Sequence[BlockKey], rows: Sequence[Row]) -> list[bool]:
        """Write blocks; False for those that could not be written."""
        return [self._put(key, row) for key, row in zip(keys, rows, strict=True)]

    def get_many(self, keys: Sequence[BlockKey], out: Sequence[Row]) -> list[bool]:
        """Read blocks into rows; False, and an undefined row, for those that are no use."""
        return [self._get(key, row) for key, row in zip(keys, out, strict=True)]

    def close(self) -> None:
        """Let another store have the directory. The files stay."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def check_invariants(self) -> None:
        """Raise AssertionError when the index is larger than allowed or disagrees with itself."""
        with self._guard:
            assert len(self._known) <= self.num_blocks, "more files than allowed"
            assert len(self._policy) == len(self._known), "policy and index disagree"

    # ---- inside ----------------------------------------------------------------------------

    def _put(self, key: BlockKey, row: Row) -> bool:
        digest = key.digest
        header = make_header(self._fingerprint, self._geometry, key.prefix_tokens())
        for attempt in range(2):
            while len(self._known) >= self.num_blocks and digest not in self._known:
                self._evict()
            try:
                write_block(self._path(digest), header, row, fsync=self._fsync)
            except OSError as error:
                full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                self.faults["disk full" if full else "write error"] += 1
                if attempt == 0 and full and self._known:
                    self._evict()  # one of ours makes room for one of the same size
                    continue
                logger.warning("a KV block was not written to %s: %s", self._directory, error)
                return False
            self._learn(digest, float(key.depth + 1))
            return True
        return False

    def _get(self, key: BlockKey, row: Row) -> bool:
        digest = key.digest
        if digest not in self._known:
            return False
        header = make_header(self._fingerprint, self._geometry, key.prefix_tokens())
        try:
            read_block(self._path(digest), header, row)
        except UnusableBlock as problem:
            self.faults[problem.reason] += 1
            if not (problem.foreign and problem.reason == "other prefix"):
                self._remove(digest)
            return False
        with self._guard:
            if digest in self._known:
                self._policy.touch(digest)
        return True

    def _evict(self) -> None:
        with self._guard:
            digest = self._policy.victim()
        assert isinstance(digest, bytes)
        self._remove(digest)

    def _remove(self, digest: bytes) -> None:
        with self._guard:
            if digest not in self._known:
                return
            self._known.remove(digest)
            self._policy.remove(digest)
        try:
            self._path(digest).unlink(missing_ok=True)
        except OSError as error:
            self.faults["unlink error"] += 1
            logger.warning("%s could not be removed: %s", self._path(digest), error)

    def _learn(self, digest: bytes, cost_s: float) -> None:
        with self._guard:
            if digest in self._known:
                self._policy.touch(digest)
            else:
                self._known.add(digest)
                self._policy.insert(digest, cost_s=cost_s)

    def _path(self, digest: bytes) -> Path:
        return self._directory / f"{digest.hex()}{_SUFFIX}"

    def _take_over(self) -> int:
        """Make the directory and hold a lock on it, which ends with the process."""
        lock = -1
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            lock = os.open(self._directory / "lock", os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise TierError(
                f"disk_dir {str(self._directory)!r} is in use by another store; "
                "close that one or give each its own directory"
            ) from None
        except OSError as error:
            raise TierError(
                f"disk_dir {str(self._directory)!r} cannot be used: {error.strerror}; "
                "give a directory that this process may write to"
            ) from None
        return lock

    def _list(self) -> None:
        for temporary in self._directory.glob("*.tmp"):
            temporary.unlink(missing_ok=True)
        dated: list[tuple[float, str, bytes]] = []
        for path in self._directory.glob(f"*{_SUFFIX}"):
            try:
                digest = bytes.fromhex(path.stem)
            except ValueError:
                continue
            if len(digest) != 16:
                continue
            if is_complete(path):
                dated.append((path.stat().st_mtime, path.name, digest))
            else:
                self.faults["truncated"] += 1
                path.unlink(missing_ok=True)
        for _, _, digest in sorted(dated):
            self._learn(digest, 1.0)
        while len(self._known) > self.num_blocks:
            self._evict()
