"""Random work over all tiers against a dictionary; nothing wrong ever comes back, nothing leaks."""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import HashModel, expected_tokens

from ch15_helpers import Engine, EngineConfig, SamplingParams
from ch15_helpers.kv import tier_disk
from ch15_helpers.kv.cache import PagedKVCache
from ch15_helpers.kv.keys import BlockKey, KeyTable
from ch15_helpers.kv.tier_file import UnusableBlock
from ch15_helpers.kv.tier_peer import PeerProcess
from ch15_helpers.kv.tiers import TierConfig, TieredStore
from ch15_helpers.model.config import TINY

SIZE, BLOCKS = 2, 12
SHAPES: dict[str, dict[str, int]] = {
    "host": {"host_blocks": 7},
    "disk": {"disk_blocks": 9, "staging_blocks": 3},
    "host and disk": {"host_blocks": 5, "disk_blocks": 9},
    "host and peer": {"host_blocks": 3, "peer_blocks": 6},
    "all": {"host_blocks": 3, "peer_blocks": 4, "disk_blocks": 6},
}


@pytest.fixture(scope="module")
def peer() -> Iterator[PeerProcess]:
    process = PeerProcess()
    yield process
    process.close()


class Faults:
    """Makes reads, writes and copies fail now and then."""

    def __init__(self, rng: random.Random, share: float) -> None:
        self.rng, self.share, self.count = rng, share, 0
        self._write, self._read = tier_disk.write_block, tier_disk.read_block

    def strikes(self) -> bool:
        strikes = self.rng.random() < self.share
        self.count += strikes
        return strikes

    def write(self, *args: Any, **how: Any) -> None:
        if self.strikes():
            raise OSError(self.rng.choice([errno.ENOSPC, errno.EIO, errno.EACCES]), "injected")
        self._write(*args, **how)

    def read(self, path: Path, header: bytes, out: Any) -> None:
        if self.strikes():
            out[:] = 7  # half of it was read
            raise UnusableBlock("injected")
        if self.strikes():
            data = bytearray(path.read_bytes())
            data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)
            path.write_bytes(data[: self.rng.choice([len(data), len(data) - 3])])
        self._read(path, header, out)

    def copies(self, store: TieredStore) -> None:
        mover = store._mover
        for name in ("store", "load"):
            setattr(mover, name, self._failing(getattr(mover, name)))

    def _failing(self, copy: Any) -> Any:
        def wrapped(*args: Any, **how: Any) -> Any:
            if self.strikes():
                raise RuntimeError("injected")
            return copy(*args, **how)

        return wrapped


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("policy", ["lru", "lfu", "fifo", "cost_aware"])
@pytest.mark.parametrize("fault_share", [0.0, 0.1])
def test_random_work_equals_a_dictionary(
    shape: str,
    policy: str,
    fault_share: float,
    tmp_path: Path,
    peer: PeerProcess,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = random.Random(f"{shape} {policy} {fault_share}")
    faults = Faults(rng, fault_share)
    monkeypatch.setattr(tier_disk, "write_block", faults.write)
    monkeypatch.setattr(tier_disk, "read_block", faults.read)
    sizes = dict(SHAPES[shape])
    how: dict[str, Any] = {"policy": policy, "fsync": False, **sizes}
    if "disk_blocks" in sizes:
        how["disk_dir"] = str(tmp_path / "kv")
    if "peer_blocks" in sizes:
        how["peer_process"] = peer
    cache = PagedKVCache(TINY, BLOCKS, SIZE, layout=rng.choice(["block_major", "layer_major"]))
    table = KeyTable(SIZE)
    paths = [[rng.randrange(2) for _ in range(8)] for _ in range(5)]
    keys = sorted({k for p in paths for k in table.keys_of(p)}, key=lambda key: key.digest)
    content = {key: float(i + 1) for i, key in enumerate(keys)}  # the oracle: content by key
    came_back = 0

    def begin() -> TieredStore:
        background = rng.random() < 0.7
        store = TieredStore(cache, table, TierConfig(**how, background=background))
        if fault_share:
            faults.copies(store)
        return store

    store = begin()
    for _ in range(120):
        action = rng.choice(["demote"] * 4 + ["promote"] * 4 + ["drain", "check", "restart"])
        some = rng.sample(keys, rng.randint(1, 6))
        if action == "demote":
            for block, key in enumerate(some):
                cache.pages[block] = content[key]
            store.demote(list(enumerate(some)))
            cache.pages[: len(some)] = -1.0
        elif action == "promote":
            came_back += check_promotion(store, cache, some, content, fault_share == 0.0)
        elif action == "drain":
            store.drain()
        elif action == "restart" and rng.random() < 0.3:
            store.flush()
            store.check_invariants()
            store.close()
            store = begin()
        store.check_invariants()
    store.drain()
    store.check_invariants()
    assert not list(tmp_path.rglob("*.tmp"))
    assert all(used <= most for used, most in store.occupancy().values())
    store.close()
    assert came_back > 15 and (faults.count > 0) == (fault_share > 0)


def check_promotion(
    store: TieredStore,
    cache: PagedKVCache,
    some: list[BlockKey],
    content: dict[BlockKey, float],
    sound: bool,
) -> int:
    """Promote; ok blocks must hold their key's content. Returns how many are ok."""
    store.drain()
    known = [store.tier_of(key) is not None for key in some]
    transfer = store.promote([(key, BLOCKS - 1 - i) for i, key in enumerate(some)])
    transfer.wait()
    for (key, block), ok in zip(transfer.pairs, transfer.ok, strict=True):
        assert not ok or bool((cache.pages[block] == content[key]).all()), f"{key} is wrong"
    assert not sound or transfer.ok == known, "a block that was there did not come"
    assert all(
        ok == (tier is not None) for ok, tier in zip(transfer.ok, transfer.tiers, strict=True)
    )
    return sum(transfer.ok)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_the_engine_answers_the_same_whatever_fails(
    shape: str, seed: int, tmp_path: Path, peer: PeerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Conversations over a pool too small for them. HashModel's answer depends on every cached
    token, so one wrong block changes it."""
    rng = random.Random(seed)
    faults = Faults(rng, 0.08)
    monkeypatch.setattr(tier_disk, "write_block", faults.write)
    monkeypatch.setattr(tier_disk, "read_block", faults.read)
    how: dict[str, Any] = {"fsync": False, **SHAPES[shape]}
    if "disk_blocks" in how:
        how["disk_dir"] = str(tmp_path / "kv")
    if "peer_blocks" in how:
        how["peer_process"] = peer
    engine = Engine(
        HashModel(),  # type: ignore[arg-type]
        EngineConfig(
            block_size=4, num_blocks=14, watermark=0.0, enable_prefix_caching=True,
            tiers=TierConfig(**how, background=seed > 0),
        ),
    )  # fmt: skip
    assert engine.offload is not None
    store = engine.offload.store
    assert isinstance(store, TieredStore)
    faults.copies(store)
    talks = [[rng.randrange(90) for _ in range(rng.randint(6, 14))] for _ in range(5)]
    for _ in range(12):
        turn = rng.sample(range(len(talks)), 2)
        counts = [rng.randint(1, 4) for _ in turn]
        params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in counts]
        outputs = engine.generate([talks[i] for i in turn], params)
        for i, n, output in zip(turn, counts, outputs, strict=True):
            assert output.token_ids == expected_tokens(talks[i], n), f"talk {i} went wrong"
            talks[i] = (talks[i] + output.token_ids + [rng.randrange(90)])[:40]
        engine.check_invariants()
        store.check_invariants()
    # In the background a burst may find the few slots still waiting to be written.
    assert seed or store.stats.promoted.total() > 0
    engine.close()
    store.check_invariants()
    assert engine.scheduler.residency.prefix is not None
