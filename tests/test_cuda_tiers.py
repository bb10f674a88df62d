"""Tiers on a GPU: copies on streams of their own lose no bit and no token."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from ch15_helpers import Engine, EngineConfig, SamplingParams, load_model
from ch15_helpers.bench.tiers import check_contents
from ch15_helpers.errors import TierError
from ch15_helpers.kv.cache import PagedKVCache
from ch15_helpers.kv.keys import KeyTable
from ch15_helpers.kv.peer_process import PeerProcess
from ch15_helpers.kv.tiers import TierConfig, TieredStore
from ch15_helpers.model.config import TINY

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


two_devices = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="needs two CUDA devices, one that lends its memory"
)
CACHES = pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        (torch.bfloat16, "block_major"),
        (torch.bfloat16, "layer_major"),
        (torch.float32, "layer_major"),
        ("fp8_e4m3", "block_major"),
        ("int8", "block_major"),
    ],
)


@CACHES
def test_contents_survive_a_round_trip(dtype: Any, layout: Any) -> None:
    check_contents(torch.device("cuda"), dtype, layout)


@two_devices
@CACHES
def test_contents_survive_a_round_trip_over_the_device_link(dtype: Any, layout: Any) -> None:
    check_contents(torch.device("cuda:0"), dtype, layout, peer="cuda:1")


def test_the_own_device_is_no_peer() -> None:
    cache = PagedKVCache(TINY, 4, 4, device="cuda")
    with pytest.raises(TierError, match="is the device that holds the cache"):
        TieredStore(cache, KeyTable(4), TierConfig(peer_device="cuda:0", peer_blocks=4))


@two_devices
def test_a_peer_device_gives_back_what_it_got() -> None:
    cache = PagedKVCache(TINY, 24, 4, device="cuda:0")
    cache.pages.normal_()
    was = cache.pages[:12].clone()
    keys = KeyTable(4)
    path = list(keys.keys_of(list(range(48))))
    how = {"peer_device": "cuda:1", "peer_blocks": 5, "host_blocks": 12, "staging_blocks": 3}
    store = TieredStore(cache, keys, TierConfig(**how))  # type: ignore[arg-type]
    store.demote(list(enumerate(path)))
    cache.pages[:12] = -1.0
    transfer = store.promote([(key, 12 + i) for i, key in enumerate(path)])
    transfer.wait()
    assert all(transfer.ok) and set(transfer.tiers) == {"peer", "host"}
    assert torch.equal(cache.pages[12:], was)
    store.check_invariants()
    store.close()


@two_devices
def test_a_process_that_lends_its_gpu_and_dies_costs_misses() -> None:
    """Its memory is mapped here, read while it lives, and a miss after: no hang, no lost device."""
    peer = PeerProcess(device="cuda:1")
    cache = PagedKVCache(TINY, 24, 4, device="cuda:0")
    cache.pages.normal_()
    was = cache.pages[:12].clone()
    keys = KeyTable(4)
    path = list(keys.keys_of(list(range(48))))
    how = {"peer_process": peer, "peer_blocks": 12, "host_blocks": 4}
    store = TieredStore(cache, keys, TierConfig(**how))  # type: ignore[arg-type]
    store.demote(list(enumerate(path)))
    cache.pages[:12] = -1.0
    transfer = store.promote([(key, 12 + i) for i, key in enumerate(path)])
    transfer.wait()
    assert all(transfer.ok) and set(transfer.tiers) == {"peer"}
    assert torch.equal(cache.pages[12:], was)
    peer.kill()
    transfer = store.promote([(key, i) for i, key in enumerate(path)])
    transfer.wait()
    assert not any(transfer.ok) and store.stats.faults == {"peer lost": 1}
    cache.pages[:12].copy_(was)
    store.demote(list(enumerate(path)))  # to the host, as far as there is room
    assert store.occupancy() == {"peer": (0, 12), "host": (4, 4)}
    store.drain()
    store.check_invariants()
    store.close()
    assert torch.equal(cache.pages[12:], was)


@pytest.mark.parametrize("layout", ["block_major", "layer_major"])
@pytest.mark.parametrize("tier", ["host", "host and disk", pytest.param("peer", marks=two_devices)])
def test_conversations_over_a_small_pool_keep_their_tokens(
    layout: Any, tier: str, tmp_path: Path
) -> None:
    """While one conversation comes back, another one decodes over captured steps."""
    model = load_model("random:SMOLLM2_135M", device="cuda", dtype=torch.float32)
    rng = random.Random(0)
    first = [[rng.randrange(1000) for _ in range(200)] for _ in range(5)]
    more = [[rng.randrange(1000) for _ in range(20)] for _ in range(3)]
    params = SamplingParams(max_tokens=12, ignore_eos=True)

    def serve(num_blocks: int, tiers: TierConfig | None) -> tuple[list[list[int]], int]:
        engine = Engine(
            model,
            EngineConfig(
                num_blocks=num_blocks,
                max_num_seqs=4,
                watermark=0.0,
                kv_layout=layout,
                enable_prefix_caching=True,
                tiers=tiers,
            ),
        )
        history, tokens = [list(prompt) for prompt in first], []
        for turn in range(3):
            for pair in ((0, 1), (2, 3), (4, 0)):
                outputs = engine.generate([history[user] for user in pair], params)
                for user, output in zip(pair, outputs, strict=True):
                    tokens.append(output.token_ids)
                    history[user] = history[user] + output.token_ids + more[turn]
        promoted = 0
        if engine.offload is not None:
            promoted = sum(engine.offload.store.stats.promoted.values())
            engine.offload.store.check_invariants()
        engine.close()
        return tokens, promoted

    expected, _ = serve(200, None)
    disk = {"disk_dir": str(tmp_path), "disk_blocks": 200} if "disk" in tier else {}
    config = TierConfig(host_blocks=40 if disk else 200, **disk)  # type: ignore[arg-type]
    if tier == "peer":
        config = TierConfig(peer_device="cuda:1", peer_blocks=200)
    tokens, promoted = serve(48, config)
    assert tokens == expected and promoted > 40
