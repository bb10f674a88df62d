"""Tiers of KV blocks: contents come back bit by bit, or they are a miss."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from ch15_helpers.errors import TierError
from ch15_helpers.kv import tier_disk
from ch15_helpers.kv import tiers as tiers_module
from ch15_helpers.kv.cache import Layout, PagedKVCache
from ch15_helpers.kv.fingerprint import weights_fingerprint
from ch15_helpers.kv.keys import BlockKey, KeyTable
from ch15_helpers.kv.mover import CpuMover
from ch15_helpers.kv.quantised import make_kv_cache
from ch15_helpers.kv.tier_peer import PeerProcess
from ch15_helpers.kv.tiers import TierConfig, TieredStore, Transfer
from ch15_helpers.model.config import TINY

SIZE, BLOCKS = 4, 24
Store = tuple[TieredStore, PagedKVCache, list[BlockKey], torch.Tensor]


@contextmanager
def tiers(
    layout: Layout = "block_major",
    dtype: torch.dtype | str = torch.float32,
    fingerprint: str = "",
    **config: Any,
) -> Iterator[Store]:
    """A store, its cache, the keys of one prompt of 12 blocks, and what blocks 0..11 hold."""
    cache = make_kv_cache(TINY, BLOCKS, SIZE, dtype=dtype, layout=layout)
    noise = torch.randint(0, 100, cache.pages.shape, generator=torch.Generator().manual_seed(0))
    cache.pages.copy_(noise.to(cache.pages.dtype))
    keys = KeyTable(SIZE)
    store = TieredStore(cache, keys, TierConfig(**config), fingerprint=fingerprint)
    try:
        yield store, cache, list(keys.keys_of(list(range(48)))), cache.pages[:12].clone()
    finally:
        store.drain()
        store.check_invariants()
        store.close()


@pytest.fixture(scope="module")
def peer() -> Iterator[PeerProcess]:
    process = PeerProcess()
    yield process
    process.close()


def demote(store: TieredStore, keys: list[BlockKey]) -> None:
    for block, key in enumerate(keys):
        store.demote([(block, key)])
        store.drain()


def promote(store: TieredStore, keys: list[BlockKey]) -> Transfer:
    """Into blocks 12 and up."""
    transfer = store.promote([(key, 12 + i) for i, key in enumerate(keys)])
    transfer.wait()
    return transfer


def assert_sound(cache: PagedKVCache, transfer: Transfer, was: torch.Tensor) -> None:
    """What is ok is what key i's block i held."""
    for (key, block), ok in zip(transfer.pairs, transfer.ok, strict=True):
        if ok:
            assert torch.equal(cache.pages[block], was[key.depth]), f"block {key.depth} is wrong"


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        (torch.float32, "block_major"),
        (torch.float32, "layer_major"),
        (torch.bfloat16, "layer_major"),
        ("int8", "block_major"),
    ],
)
def test_blocks_come_back_bit_by_bit(dtype: Any, layout: Layout, background: bool) -> None:
    with tiers(layout, dtype, host_blocks=12, background=background) as (store, cache, keys, was):
        store.demote(list(enumerate(keys)))
        cache.pages[:12].view(torch.uint8).fill_(0)  # at once: the copy must be made already
        assert store.num_leading(keys) == 12
        transfer = promote(store, keys)
        assert transfer.ok == [True] * 12 and set(transfer.tiers) == {"host"}
        assert transfer.num_bytes == 12 * cache.block_bytes
        assert_sound(cache, transfer, was)
        assert store.poll() == [transfer] and store.poll() == []


def test_the_scales_of_a_quantised_block_travel_with_it(tmp_path: Path) -> None:
    with tiers(dtype="int8", disk_dir=str(tmp_path), disk_blocks=12) as (store, cache, keys, _):
        assert cache.scales is not None
        cache.scales[:12].copy_(torch.arange(1.0, 13.0).view(12, 1, 1, 1))
        demote(store, keys)
        promote(store, keys)
        assert torch.equal(cache.scales[12:24], cache.scales[:12])


def test_a_block_that_is_in_memory_is_not_copied_again() -> None:
    with tiers(host_blocks=12) as (store, _, keys, _):
        demote(store, keys[:3])
        promote(store, keys[:3])
        demote(store, keys[:3])
        assert store.stats.demoted == 3


def test_what_does_not_fit_goes_down_and_the_coldest_goes_first(tmp_path: Path) -> None:
    disk = {"disk_dir": str(tmp_path), "disk_blocks": 20}
    with tiers(host_blocks=4, **disk) as (store, cache, keys, was):
        demote(store, keys)
        assert [store.tier_of(key) for key in keys] == ["disk"] * 8 + ["host"] * 4
        transfer = promote(store, keys)
        assert transfer.ok == [True] * 12 and store.stats.dropped == 0
        assert_sound(cache, transfer, was)


def test_without_a_lower_tier_the_coldest_is_given_up() -> None:
    with tiers(host_blocks=4) as (store, _, keys, _):
        demote(store, keys[:4])
        promote(store, keys[:1])  # a use
        demote(store, keys[:1] + keys[4:6])
        assert [store.tier_of(key) for key in keys[:4]] == ["host", None, None, "host"]
        assert store.num_leading(keys) == 1
        transfer = promote(store, keys[:4])
        assert transfer.ok == [True, False, False, True] and transfer.num_leading_ok == 1


def test_what_is_about_to_be_promoted_makes_no_room() -> None:
    with tiers(host_blocks=4) as (store, cache, keys, was):
        demote(store, keys[:4])
        store.demote([(i, keys[i]) for i in range(4, 12)], keep=keys[:3])
        transfer = promote(store, keys[:3])
        assert transfer.ok == [True] * 3
        assert_sound(cache, transfer, was)
        store.demote([(i, keys[i]) for i in range(4, 8)])
        transfer.wait()
        assert len([key for key in keys if store.tier_of(key)]) == 4, "room for later ones"


def test_layouts_share_files(tmp_path: Path) -> None:
    disk = {"disk_dir": str(tmp_path), "disk_blocks": 20}
    with tiers("layer_major", **disk) as (store, _, keys, was):
        demote(store, keys)
        store.flush()
    with tiers("block_major", **disk) as (store, cache, keys, _):
        transfer = promote(store, keys)
        assert transfer.ok == [True] * 12
        assert_sound(cache, transfer, was)


def test_a_restart_finds_what_was_flushed_and_cleans_up(tmp_path: Path) -> None:
    disk = {"disk_dir": str(tmp_path), "disk_blocks": 20}
    with tiers(host_blocks=8, **disk) as (store, _, keys, _):
        demote(store, keys)
        store.flush()
    (tmp_path / "notes.kv").write_text("not ours")
    (tmp_path / f"{'0' * 32}.tmp").write_text("a crash")
    torn = tmp_path / f"{'1' * 32}.kv"
    torn.write_bytes(next(tmp_path.glob("*.kv")).read_bytes()[:-1])
    with tiers(**{**disk, "disk_blocks": 5}) as (store, cache, keys, was):
        assert store.occupancy()["disk"] == (5, 5)
        assert not list(tmp_path.glob("*.tmp")) and not torn.exists()
        assert (tmp_path / "notes.kv").exists()
        found = [key for key in keys if store.tier_of(key)]
        transfer = promote(store, found)
        assert transfer.ok == [True] * 5
        assert_sound(cache, transfer, was)


def test_one_directory_has_one_store(tmp_path: Path) -> None:
    disk = {"disk_dir": str(tmp_path), "disk_blocks": 4}
    with tiers(**disk), pytest.raises(TierError, match="in use by another store"), tiers(**disk):
        pass
    with tiers(**disk):
        pass
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(TierError, match="cannot be used"),
        tiers(disk_dir=str(tmp_path / "file"), disk_blocks=4),
    ):
        pass


def damage(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, tuple[Any, str]] = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-7]), "truncated"),
    "empty": (lambda path: path.write_bytes(b""), "truncated"),
    "payload": (lambda path: damage(path, -3), "checksum"),
    "checksum": (lambda path: damage(path, 30), "checksum"),
    "magic": (lambda path: damage(path, 2), "not a block file"),
    "version": (lambda path: damage(path, 8), "not a block file"),
    "model": (lambda path: damage(path, 50), "other model"),
    "deleted": (lambda path: path.unlink(), "missing file"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_is_a_miss_and_goes(kind: str, tmp_path: Path) -> None:
    disk = {"disk_dir": str(tmp_path), "disk_blocks": 20, "fingerprint": "some model"}
    with tiers(**disk) as (store, _, keys, _):
        demote(store, keys)
        store.flush()
    with tiers(**disk) as (store, cache, keys, was):
        path = tmp_path / f"{keys[5].digest.hex()}.kv"
        spoil, reason = DAMAGES[kind]
        spoil(path)
        transfer = promote(store, keys)
        assert transfer.ok == [i != 5 for i in range(12)]
        assert store.stats.faults == {reason: 1} and not path.exists()
        assert_sound(cache, transfer, was)
        assert store.num_leading(keys) == 5
        demote(store, keys[5:6])
        assert promote(store, keys).ok == [True] * 12, "computed again, it is kept again"


def test_a_digest_never_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockKey, "digest", property(lambda key: b"the same, always"))
    with tiers(disk_dir=str(tmp_path), disk_blocks=20) as (store, cache, keys, was):
        store.demote([(0, keys[0])])
        store.flush()
    with tiers(disk_dir=str(tmp_path), disk_blocks=20) as (store, cache, keys, _):
        transfer = promote(store, keys[:2])
        assert transfer.ok == [True, False] and store.stats.faults == {"other prefix": 1}
        assert_sound(cache, transfer, was)
        assert promote(store, keys[:1]).ok == [True], "the sound file of another was removed"


def test_other_weights_are_another_model(tmp_path: Path) -> None:
    disk = {"disk_dir": str(tmp_path), "disk_blocks": 20}
    weights = [torch.randn(8, 8), torch.randn(3)]
    named = [("a", weights[0]), ("b", weights[1])]
    first = weights_fingerprint("same path", torch.float32, named)
    weights[0][3, 4] = -weights[0][3, 4]
    second = weights_fingerprint("same path", torch.float32, named)
    with tiers(fingerprint=first, **disk) as (store, _, keys, _):
        demote(store, keys)
        store.flush()
    with tiers(fingerprint=second, **disk) as (store, _, keys, _):
        assert not any(promote(store, keys).ok) and store.stats.faults == {"other model": 12}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EIO])
def test_a_disk_that_takes_nothing_costs_only_misses(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(code, "injected")

    monkeypatch.setattr(tier_disk, "write_block", refuse)
    with tiers(host_blocks=4, disk_dir=str(tmp_path), disk_blocks=20) as (store, cache, keys, was):
        demote(store, keys)
        transfer = promote(store, keys)
        assert transfer.ok.count(True) == 4
        # The coldest of those in memory has been refused already.
        assert store.stats.dropped == 9 == store.stats.faults.total()
        assert not store.stats.written.total()
        assert_sound(cache, transfer, was)


def test_a_full_disk_makes_room_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, room = tier_disk.write_block, 3

    def bounded(path: Path, *args: Any, **how: Any) -> None:
        if len(list(tmp_path.glob("*.kv"))) >= room:
            raise OSError(errno.ENOSPC, "injected")
        write(path, *args, **how)

    monkeypatch.setattr(tier_disk, "write_block", bounded)
    disk = {"disk_dir": str(tmp_path), "disk_blocks": 20, "background": False}
    with tiers(staging_blocks=2, **disk) as (store, cache, keys, was):
        demote(store, keys)
        transfer = promote(store, keys)
        assert [bool(t) for t in transfer.tiers] == [False] * 9 + [True] * 3
        assert store.stats.faults == {"disk full": 9}
        assert_sound(cache, transfer, was)


def test_a_failed_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "injected")))
    with tiers(disk_dir=str(tmp_path), disk_blocks=20) as (store, _, keys, _):
        demote(store, keys)
        assert not list(tmp_path.glob("*.kv")) and not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("way", ["store", "load"])
def test_a_failed_copy_is_a_miss(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with tiers(host_blocks=12) as (store, cache, keys, was):
        demote(store, keys[:6])

        def fail(*_: Any, **__: Any) -> None:
            raise RuntimeError("injected")

        with monkeypatch.context() as patch:
            patch.setattr(store._mover, way, fail)
            if way == "store":
                store.demote([(i, key) for i, key in enumerate(keys)][6:])
            else:
                assert not any(promote(store, keys[:6]).ok)
        assert store.stats.faults == {"copy failed": 1}
        store.check_invariants()
        transfer = promote(store, keys)
        assert transfer.ok == [True] * 6 + [False] * 6
        assert_sound(cache, transfer, was)


def test_a_promotion_waits_for_no_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, write = threading.Event(), tier_disk.write_block

    def slow(*args: Any, **how: Any) -> None:
        assert go_on.wait(30)
        write(*args, **how)

    monkeypatch.setattr(tier_disk, "write_block", slow)
    with tiers(host_blocks=12, disk_dir=str(tmp_path), disk_blocks=20) as (store, cache, keys, was):
        store.demote(list(enumerate(keys)))  # two of them are being written now, and wait
        transfer = promote(store, keys)
        assert transfer.ok == [True] * 12 and not go_on.is_set()
        assert_sound(cache, transfer, was)
        go_on.set()


def test_a_transfer_is_not_done_before_its_last_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, read = threading.Event(), tier_disk.read_block

    def slow(*args: Any) -> None:
        assert go_on.wait(30)
        read(*args)

    with tiers(host_blocks=4, disk_dir=str(tmp_path), disk_blocks=20) as (store, _, keys, _):
        demote(store, keys)
        monkeypatch.setattr(tier_disk, "read_block", slow)
        transfer = store.promote([(key, 12 + i) for i, key in enumerate(keys)])
        assert not transfer.done and store.poll() == [] and transfer.finished_s is None
        demote_more = [(i, key) for i, key in enumerate(keys)]
        store.demote(demote_more)  # must not take a slot that is being read
        go_on.set()
        transfer.wait()
        assert all(transfer.ok) and store.poll() == [transfer]
        assert transfer.finished_s is not None and transfer.finished_s >= transfer.started_s


def test_after_close_nothing_is_found() -> None:
    with tiers(host_blocks=12) as (store, _, keys, _):
        demote(store, keys)
        store.close()
        assert store.num_leading(keys) == 0
        store.demote([(0, keys[0])])
        transfer = store.promote([(keys[0], 12)])
        assert transfer.done and transfer.ok == [False]


def test_peer_process_serves_and_hands_down(peer: PeerProcess, tmp_path: Path) -> None:
    below = {"peer_process": peer, "peer_blocks": 5, "disk_dir": str(tmp_path), "disk_blocks": 20}
    with tiers(host_blocks=2, clean_fraction=1.0, **below) as (store, cache, keys, was):
        sent = peer.bytes_sent
        demote(store, keys)
        assert peer.bytes_sent > sent
        where = [store.tier_of(key) for key in keys]
        assert where == ["disk"] * 7 + ["peer process"] * 3 + ["host"] * 2
        transfer = promote(store, keys)
        assert transfer.ok == [True] * 12
        assert_sound(cache, transfer, was)


def test_a_row_that_changed_in_the_peer_is_a_miss(peer: PeerProcess) -> None:
    with tiers(peer_process=peer, peer_blocks=12, staging_blocks=2) as (store, cache, keys, was):
        demote(store, keys)
        peer.put([1], torch.ones(1, store.payload.num_bytes, dtype=torch.uint8))
        transfer = promote(store, keys)
        assert transfer.ok.count(False) == 1 and store.stats.faults == {"checksum": 1}
        assert_sound(cache, transfer, was)


def test_a_peer_that_dies_costs_misses() -> None:
    peer = PeerProcess(timeout_s=5)
    with tiers(host_blocks=2, peer_process=peer, peer_blocks=12) as (store, cache, keys, was):
        demote(store, keys)
        assert promote(store, keys).ok == [True] * 12
        peer.kill()
        cache.pages[12:].zero_()
        transfer = promote(store, keys)
        assert transfer.ok.count(True) == 2 and store.stats.faults["peer lost"] == 1
        assert_sound(cache, transfer, was)
        demote(store, keys)
        assert peer.lost and store.num_leading(keys) == 0
    peer.close()
    with (
        pytest.raises(TierError, match="start another one"),
        tiers(peer_process=peer, peer_blocks=12),
    ):
        pass


def test_memory_whose_owner_ends_is_forgotten_and_not_asked_again() -> None:
    """As the memory of a peer's GPU; here it is the host tier that loses its owner."""
    with tiers(host_blocks=12) as (store, cache, keys, _was):
        (tier,) = store._memory.tiers
        demote(store, keys)
        assert promote(store, keys).ok == [True] * 12
        tier.alive = lambda: False
        cache.pages[12:].zero_()
        assert store.num_leading(keys) == 0
        transfer = promote(store, keys)
        assert transfer.ok == [False] * 12 and store.stats.faults == {"peer lost": 1}
        demote(store, keys)
        assert store.occupancy() == {"host": (0, 12)}


def test_blocks_that_are_near_are_on_their_way_when_promote_returns(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As from a peer's GPU; what is on disk still comes from the reader."""
    monkeypatch.setattr(CpuMover, "is_near", lambda self, rows: True)
    monkeypatch.setattr(tiers_module, "_PIECES", (2, 3))
    below = {"disk_dir": str(tmp_path), "disk_blocks": 12}
    with tiers(host_blocks=5, clean_fraction=1.0, **below) as (store, cache, keys, was):
        demote(store, keys)
        transfer = store.promote([(key, 12 + i) for i, key in enumerate(keys)])
        assert transfer.tiers[-5:] == ["host"] * 5
        transfer.wait()
        assert transfer.tiers == ["disk"] * 7 + ["host"] * 5 and all(transfer.ok)
        assert store.stats.promoted == {"disk": 7, "host": 5}
        assert_sound(cache, transfer, was)


def test_blocks_whose_owner_ends_while_they_are_copied_are_misses() -> None:
    with tiers(host_blocks=12, background=False) as (store, _cache, keys, _was):
        (tier,) = store._memory.tiers
        demote(store, keys)
        living = iter([True, True])  # at the promotion, and when the copy starts
        tier.alive = lambda: next(living, False)
        transfer = promote(store, keys)
        assert transfer.tiers == ["host"] * 12 and transfer.ok == [False] * 12


def test_a_peer_process_without_a_gpu_has_none_to_lend(peer: PeerProcess) -> None:
    with pytest.raises(TierError, match="no GPU to lend"):
        peer.lend(4, 64, torch.device("cpu"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"host_blocks": -1}, "negative"),
        ({"disk_blocks": 3}, "disk_dir"),
        ({"peer_blocks": 3}, "peer_device"),
        ({"clean_fraction": 2.0}, "clean_fraction"),
        ({"staging_blocks": 0}, "staging_blocks"),
        ({"load_path": "fast"}, "load_path"),
        ({"policy": "newest", "host_blocks": 2}, "unknown eviction policy"),
    ],
)
def test_a_configuration_that_makes_no_sense(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message), tiers(**config):
        pass


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1", "cpu"])
def test_the_peer_is_never_the_same_device_under_another_name(device: str) -> None:
    with (
        pytest.raises(TierError, match="another CUDA device"),
        tiers(peer_device=device, peer_blocks=4),
    ):
        pass
