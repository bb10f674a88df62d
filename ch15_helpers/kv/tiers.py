"""Tiers of KV blocks below the device pool: peer device, host, peer process, disk.

A block that the prefix cache gives up is *demoted* into the highest tier, where it waits for the
next turn of its conversation; at admission it is *promoted* back, while others decode. What does
not fit cascades down in the background. A block stays in the tier that it was promoted from: the
content of a full block never changes, so its second demotion costs nothing.

Every failure is a miss. The engine recomputes what it does not get, so a full disk or a lost peer
costs time, never a token. (Mooncake, Qin et al., FAST 2025, and CachedAttention, Gao et al., ATC
2024, are built this way.)
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

from ch15_helpers.kv.backing import Backing
from ch15_helpers.kv.cache import PagedKVCache
from ch15_helpers.kv.keys import BlockKey, KeyTable
from ch15_helpers.kv.payload import BlockPayload
from ch15_helpers.kv.promoter import Found, Promoter
from ch15_helpers.kv.tier_build import backing_tiers, make_mover, memory_tiers
from ch15_helpers.kv.tier_config import TierConfig, TierStats
from ch15_helpers.kv.tier_index import Entry
from ch15_helpers.kv.tier_memory import MemoryTiers
from ch15_helpers.kv.transfer import Transfer
from ch15_helpers.kv.worker import Worker

__all__ = ["TierConfig", "TierStats", "TieredStore", "Transfer"]

_PIECES = (64, 256)  # where a promotion is cut: one piece is looked up while another is copied
_BATCH = 8  # blocks in one job of the worker, so that promotions do not wait for long


class TieredStore:
    """Keeps demoted KV blocks by key. Thread-safe; call ``demote`` and ``promote`` from the thread
    that launches the model's work, whose current stream is the compute stream.

    Attributes:
        stats: counts so far. payload: how a block's bytes are laid out.
    """

    def __init__(
        self,
        cache: PagedKVCache,
        keys: KeyTable,
        config: TierConfig,
        *,
        fingerprint: str = "",
        recompute_s: Callable[[BlockKey], float] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Allocate the tiers.

        Args:
            cache: the device pool.
            keys: the table that the prefix cache uses too.
            fingerprint: names the weights; blocks on disk of another model are misses.
            recompute_s: seconds that a block saves, for the cost-aware policy; by default in
                proportion to its place in the prefix.

        Raises:
            TierError: a tier cannot be built: a directory, or a peer that is no other device.
            ValueError: block sizes differ.
        """
        if keys.block_size != cache.block_size:
            raise ValueError(f"keys have {keys.block_size} tokens, blocks {cache.block_size}")
        self.config = config
        self.stats = stats = TierStats()
        self.payload = BlockPayload(cache)
        self._clock = clock
        self._lock = threading.RLock()
        self._mover = make_mover(self.payload, cache.device, config)
        tiers = backing_tiers(config, self.payload, fingerprint, stats)
        self._backing = Backing(tiers, stats.written)
        self._memory = MemoryTiers(
            memory_tiers(config, self.payload, self._mover, bool(tiers)),
            self._mover,
            stats,
            recompute_s or (lambda key: float(key.depth + 1)),
            has_backing=bool(tiers),
        )
        self._near = [t for t in self._memory.tiers if self._mover.is_near(t.rows)]
        self._promoter = Promoter(self._mover, self._memory, self._backing, stats, _BATCH)
        # Two threads: a promotion must not wait for a file that is being written.
        self._reader = Worker("ch15-kv-promote", background=config.background)
        self._writer = Worker("ch15-kv-demote", background=config.background)
        self._in_flight: list[tuple[Transfer, list[Found]]] = []
        self._finished: list[Transfer] = []
        self._num_writing = 0
        self._closed = False

    # ---- look-up ---------------------------------------------------------------------------

    def tier_of(self, key: BlockKey) -> str | None:
        """The highest tier that has this block, or None. No I/O."""
        with self._lock:
            found = self._memory.find(key)
            return found[0].name if found else self._backing.tier_of(key)

    def num_leading(self, keys: Sequence[BlockKey]) -> int:
        """How many leading keys are in some tier. No I/O, so a promotion may still fail."""
        with self._lock:
            if self._closed:
                return 0
            self._memory.see_losses()
            return next((i for i, key in enumerate(keys) if not self.tier_of(key)), len(keys))

    def occupancy(self) -> dict[str, tuple[int, int]]:
        """Tier name to (blocks in it, most blocks)."""
        with self._lock:
            sizes = {t.name: (len(t.index), t.index.num_slots) for t in self._memory.tiers}
            return sizes | self._backing.occupancy()

    # ---- demotion --------------------------------------------------------------------------

    def demote(self, pairs: Sequence[tuple[int, BlockKey]], keep: Sequence[BlockKey] = ()) -> None:
        """Keep the content of (device block, key) pairs that are about to be given up.

        ``keep`` names blocks that are about to be promoted: none of them makes room here.
        Work that is given to the compute stream after the return may overwrite the blocks. What a
        tier in memory has already costs nothing; what finds no slot is lost.
        """
        with self._lock:
            if self._closed or not self._memory.tiers:
                return
            self._reap()
            self._memory.see_losses()
            share = self.config.clean_fraction if self.config.host_blocks else 1.0
            ready = math.ceil(share * self._memory.tiers[-1].index.num_slots)
            size = self.config.staging_blocks
            if self._backing:  # no piece takes more slots than are kept ready
                size = min(size, max(1, ready))
            kept = [found for key in keep if (found := self._memory.find(key)) is not None]
            for tier, entry in kept:
                tier.index.touch(entry)
                tier.index.pin(entry)
            for start in range(0, len(pairs), size):
                self._clean(ready)  # promotions may have taken blocks out of those kept ready
                self._memory.store(pairs[start : start + size])
            for tier, entry in kept:
                tier.index.unpin(entry)
            self._clean(ready)

    def flush(self) -> None:
        """Write every block of the last memory tier down, so that a restart finds it; waits."""
        self.drain()
        with self._lock:
            if self._backing and not self._closed:
                self._clean(self._memory.tiers[-1].index.num_slots)
        self.drain()

    def _clean(self, wanted: int) -> None:
        """Have the coldest blocks written down, until ``wanted`` slots can be taken at no loss."""
        if not self._backing:
            return
        index = self._memory.tiers[-1].index
        batch: list[Entry] = []
        while index.num_ready + self._num_writing + len(batch) < wanted:
            entry = index.coldest()
            if entry is None:
                break
            if entry.saved or self._backing.tier_of(entry.key):
                entry.saved = True
                index.retire(entry)
            else:
                entry.chosen = True
                index.pin(entry)
                batch.append(entry)
        self._num_writing += len(batch)
        for start in range(0, len(batch), _BATCH):
            self._writer.submit(partial(self._write_down, batch[start : start + _BATCH]))

    def _write_down(self, entries: list[Entry]) -> None:
        """In the worker: put pinned entries into the tiers below."""
        memory = self._memory.tiers[-1]
        rows, refused = memory.rows.numpy(), len(entries)
        try:
            for entry in entries:
                if entry.ticket is not None:
                    entry.ticket.wait()
            keys = [entry.key for entry in entries]
            taken = self._backing.write(keys, [rows[entry.slot] for entry in entries])
            refused = taken.count(False)
        except RuntimeError as error:
            self._memory.fault("copy failed", error)
        finally:
            with self._lock:
                self._num_writing -= len(entries)
                self.stats.dropped += refused
                for entry in entries:
                    # What was refused is not tried again: it would be refused in each step.
                    entry.saved = True
                    memory.index.unpin(entry)
                    if entry.chosen:
                        memory.index.retire(entry)

    # ---- promotion -------------------------------------------------------------------------

    def promote(self, pairs: Sequence[tuple[BlockKey, int]]) -> Transfer:
        """Start to copy (key, device block) pairs back. The blocks must not be read until the
        transfer is done, and then only those that are ok."""
        transfer = Transfer(pairs, self._clock(), self._clock)
        below: list[int] = []
        held: list[Found] = []
        far: list[Found] = []
        with self._lock:
            if self._closed:
                transfer.issued()
                return transfer
            self._reap()
            self._memory.see_losses()
            fence = self._mover.fence()
            # A peer's first blocks are on their way while the others are looked up.
            for start, stop in pairwise((0, *_PIECES, len(pairs))):
                some = self._hold(transfer, start, min(stop, len(pairs)), below)
                held += some
                self._promoter.from_memory(transfer, [e for e in some if e[1] in self._near], fence)
                far += [e for e in some if e[1] not in self._near]
            for _, tier, entry in held:
                tier.index.touch(entry)
            self._in_flight.append((transfer, held))
        if far or below:
            self._reader.submit(partial(self._promoter.run, transfer, far, below, fence))
        else:
            transfer.issued()
        return transfer

    def _hold(self, transfer: Transfer, start: int, stop: int, below: list[int]) -> list[Found]:
        """Pin what is in memory of some pairs; what is in a lower tier is added to ``below``."""
        held: list[Found] = []
        for i in range(start, stop):
            key = transfer.pairs[i][0]
            found = self._memory.find(key)
            if found is not None:
                tier, entry = found
                tier.index.pin(entry)
                held.append((i, tier, entry))
            elif self._backing.tier_of(key):
                below.append(i)
        return held

    def poll(self) -> list[Transfer]:
        """Transfers that are done, each of them once."""
        with self._lock:
            self._reap()
            finished, self._finished = self._finished, []
            return finished

    # ---- life ------------------------------------------------------------------------------

    def drain(self) -> None:
        """Wait until all that was started is done: writes, reads and copies."""
        self._reader.drain()
        self._writer.drain()
        with self._lock:
            waiting = [transfer for transfer, _ in self._in_flight]
            tickets = [e.ticket for t in self._memory.tiers for e in t.index if e.ticket]
        for transfer in waiting:
            transfer.wait()
        for ticket in tickets:
            ticket.wait()
        with self._lock:
            self._reap()

    def close(self) -> None:
        """Finish what was started, then let go of files and peers; later calls find nothing.

        Blocks in memory are gone. Call ``flush`` first where a restart is to find them on disk.
        """
        self.drain()
        self._reader.close()
        self._writer.close()
        with self._lock:
            self._closed = True
            self._backing.close()

    def spoil_memory(self) -> None:
        """Erase what the memory tiers hold but keep the index, to prove that a same-tokens check
        bites. For checks only: nothing in the engine calls it."""
        self.drain()
        with self._lock:
            for tier in self._memory.tiers:
                tier.rows.zero_()

    def check_invariants(self) -> None:
        """Raise AssertionError when slots leak, or tiers disagree with themselves."""
        with self._lock:
            self._reap()
            self._memory.check_invariants()
            self._backing.check_invariants()
            pins = sum(len(held) for _, held in self._in_flight) + self._num_writing
            found = sum(entry.pins for tier in self._memory.tiers for entry in tier.index)
            assert found <= pins, f"{found} pins, {pins} readers"
            if not pins:
                for tier in self._memory.tiers:
                    index = tier.index
                    assert len(index) + index.num_free == index.num_slots, "a slot leaked"

    def _reap(self) -> None:
        """Let go of what finished transfers were reading."""
        going = [flight for flight in self._in_flight if flight[0].done]
        for flight in going:
            self._in_flight.remove(flight)
            self._finished.append(flight[0])
            self.stats.missed += flight[0].ok.count(False)
            for _, tier, entry in flight[1]:
                tier.index.unpin(entry)
