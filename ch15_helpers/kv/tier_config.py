"""What a TieredStore consists of, and what it counts. No torch: the scheduler imports it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from ch15_helpers.kv.tier_peer import PeerProcess

LoadPath = Literal["auto", "direct", "staged"]


@dataclass(frozen=True)
class TierConfig:
    """Which tiers stand below the device pool, and how large each is, in blocks.

    Attributes:
        host_blocks: RAM, pinned where the cache is on CUDA.
        disk_dir, disk_blocks: a directory of this store's own, and the most files in it.
        peer_device, peer_blocks: memory of *another* CUDA device, e.g. ``cuda:1``, reached by P2P.
        peer_process: memory that another process owns (``PeerProcess``); ``peer_blocks`` is its
            size then. Memory of a GPU is read and written over the device link, and stands above
            the host; RAM stands below it and is reached over gloo, which is not that link.
        policy: eviction of every tier, a name for ``make_eviction_policy``.
        background: move in a worker thread (disk, peer process, and all of it on a CPU). Without
            it every call returns when its copies are made: slower, and the same in each run.
        staging_blocks: buffers between the device and the tiers; also the host slots that exist
            when ``host_blocks`` is 0 but a disk or a peer process is there.
        clean_fraction: share of the host tier whose blocks are written to the next tier ahead of
            need, coldest first, so that taking a slot never waits for a write.
        fsync: have every file on the device before it gets its name. A file that is torn all the
            same fails its checksum; without fsync only fewer blocks survive a power cut.
        load_path: ``direct`` copies block by block to where it belongs, ``staged`` copies runs
            into a buffer and scatters them with a kernel; ``auto`` takes direct for whole blocks
            of at least 1 MiB.

    Raises:
        ValueError: a size makes no sense or a tier is given in part.
    """

    host_blocks: int = 0
    disk_dir: str | None = None
    disk_blocks: int = 0
    peer_device: str | None = None
    peer_blocks: int = 0
    peer_process: PeerProcess | None = None
    policy: str = "lru"
    background: bool = True
    staging_blocks: int = 32
    clean_fraction: float = 0.25
    fsync: bool = True
    load_path: LoadPath = "auto"

    def __post_init__(self) -> None:
        for name in ("host_blocks", "disk_blocks", "peer_blocks"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.staging_blocks < 1:
            raise ValueError(f"staging_blocks must be at least 1, got {self.staging_blocks}")
        if not 0 <= self.clean_fraction <= 1:
            raise ValueError(f"clean_fraction must be in [0, 1], got {self.clean_fraction}")
        if (self.disk_dir is not None) != (self.disk_blocks > 0):
            raise ValueError("a disk tier needs both disk_dir and disk_blocks")
        if self.peer_device is not None and self.peer_process is not None:
            raise ValueError("give peer_device or peer_process, not both")
        has_peer = self.peer_device is not None or self.peer_process is not None
        if has_peer != (self.peer_blocks > 0):
            raise ValueError("a peer tier needs peer_blocks and peer_device or peer_process")
        if self.load_path not in ("auto", "direct", "staged"):
            raise ValueError(f"load_path must be auto, direct or staged, got {self.load_path!r}")

    @property
    def num_blocks(self) -> int:
        """Blocks of all tiers together."""
        return self.host_blocks + self.disk_blocks + self.peer_blocks


@dataclass
class TierStats:
    """Counts since the store was made. Keys are tier names: peer, host, peer process, disk.

    Attributes:
        promoted: blocks that came back, by the tier that had them.
        missed: blocks that were asked for and were in no tier, or could not be used.
        demoted: blocks that left the device pool for a tier.
        written: blocks that went down one more tier in the background.
        dropped: blocks that were given up before they were in a lower tier.
        faults: what went wrong, by reason; each one is a miss and nothing else.
        promoted_bytes, demoted_bytes: the same in bytes.
    """

    promoted: Counter[str] = field(default_factory=Counter)
    missed: int = 0
    demoted: int = 0
    written: Counter[str] = field(default_factory=Counter)
    dropped: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    promoted_bytes: int = 0
    demoted_bytes: int = 0
