"""From a TierConfig to the parts of a TieredStore."""

from __future__ import annotations

import torch

from ch15_helpers.errors import TierError
from ch15_helpers.kv.backing import BackingTier
from ch15_helpers.kv.mover import CpuMover, Mover
from ch15_helpers.kv.mover_cuda import CudaMover
from ch15_helpers.kv.payload import BlockPayload
from ch15_helpers.kv.peer_process import PeerLost, PeerProcess
from ch15_helpers.kv.tier_config import TierConfig, TierStats
from ch15_helpers.kv.tier_disk import DiskTier
from ch15_helpers.kv.tier_memory import MemoryTier
from ch15_helpers.kv.tier_peer import PeerProcessTier


def make_mover(payload: BlockPayload, device: torch.device, config: TierConfig) -> Mover:
    """The mover for a cache on ``device``. Raises TierError for an unusable peer."""
    name = peer_device(config)
    peer = None if name is None else other_device(name, device)
    if device.type != "cuda":
        return CpuMover(payload)
    return CudaMover(
        payload,
        device,
        staging_blocks=config.staging_blocks,
        load_path=config.load_path,
        peer=peer,
    )


def peer_device(config: TierConfig) -> str | None:
    """The GPU that lends memory, whether this process owns that memory or another one does."""
    if config.peer_process is not None:
        return config.peer_process.device
    return config.peer_device


def memory_tiers(
    config: TierConfig, payload: BlockPayload, mover: Mover, has_backing: bool
) -> list[MemoryTier]:
    """Peer device, then host; a few host slots also where only something below needs them."""
    tiers: list[MemoryTier] = []
    if config.peer_device is not None:
        size = (config.peer_blocks, payload.num_bytes)
        rows = torch.empty(size, dtype=torch.uint8, device=config.peer_device)
        tiers.append(MemoryTier("peer", rows, config.policy))
    elif config.peer_process is not None and config.peer_process.device is not None:
        process = config.peer_process
        rows = _borrowed(process, config.peer_blocks, payload)
        tiers.append(MemoryTier("peer", rows, config.policy, lambda: process.alive))
    host_blocks = config.host_blocks or (config.staging_blocks if has_backing else 0)
    if host_blocks:
        tiers.append(MemoryTier("host", mover.new_rows(host_blocks), config.policy))
    return tiers


def backing_tiers(
    config: TierConfig, payload: BlockPayload, fingerprint: str, stats: TierStats
) -> list[BackingTier]:
    """Peer process, then disk. Raises TierError for a directory that cannot be used."""
    tiers: list[BackingTier] = []
    if config.peer_process is not None and config.peer_process.device is None:
        tiers.append(
            PeerProcessTier(
                config.peer_process,
                config.peer_blocks,
                payload.num_bytes,
                policy=config.policy,
                faults=stats.faults,
            )
        )
    if config.disk_dir is not None:
        tiers.append(
            DiskTier(
                config.disk_dir,
                config.disk_blocks,
                geometry=payload.geometry,
                fingerprint=fingerprint,
                policy=config.policy,
                fsync=config.fsync,
                faults=stats.faults,
            )
        )
    return tiers


def _borrowed(process: PeerProcess, num_blocks: int, payload: BlockPayload) -> torch.Tensor:
    try:
        return process.lend(num_blocks, payload.num_bytes, payload.parts[0].device)
    except PeerLost as error:
        size = num_blocks * payload.num_bytes / 2**30
        raise TierError(
            f"the peer process did not lend {size:.2f} GiB of {process.device}: {error}; it is "
            "gone, or has not that much: start another one, or lend less"
        ) from error


def other_device(peer: str, local: torch.device) -> torch.device:
    """The peer device, if it is another CUDA device that ``local`` reaches by P2P.

    Raises:
        TierError: it is the same device, no CUDA device, absent, or without P2P.
    """
    device = torch.device(peer)
    if local.type != "cuda" or device.type != "cuda":
        raise TierError(
            f"peer_device {peer!r} needs a cache on CUDA and another CUDA device, the cache is on "
            f"{local}; without a second device use a PeerProcess, or no peer tier"
        )
    here = local.index if local.index is not None else torch.cuda.current_device()
    if device.index is None or device.index == here:
        raise TierError(
            f"peer_device {peer!r} is the device that holds the cache (cuda:{here}); its memory "
            "is no further tier: name another device, or leave the peer tier out"
        )
    if device.index >= torch.cuda.device_count():
        raise TierError(
            f"peer_device {peer!r} is not here: there are {torch.cuda.device_count()} CUDA devices"
        )
    if not torch.cuda.can_device_access_peer(here, device.index):
        raise TierError(
            f"cuda:{here} does not reach {peer} by P2P; copies would go through the host, which "
            "is what the host tier does: use host_blocks"
        )
    return device
