"""A load's prompts through the prefix cache, without a model: what would have been found."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ch15_helpers.kv.blocks import BlockManager
from ch15_helpers.kv.keys import KeyTable
from ch15_helpers.kv.policies import EvictionPolicy, RecomputeCost
from ch15_helpers.kv.prefix import CachedBlock, Content, PrefixCache, PrefixStats


def replay(
    prompts: Iterable[Sequence[Any]],
    num_blocks: int,
    *,
    block_size: int = 1,
    policy: str | EvictionPolicy = "lru",
    cost: RecomputeCost | None = None,
) -> PrefixStats:
    """Serve prompts one after the other from a pool of ``num_blocks``.

    Each prompt is looked up, computed as far as it was not found, and let go. Nothing runs beside
    it, so that the whole pool is a cache; a prompt larger than the pool is kept as far as it goes.

    Args:
        prompts: token ids; with ``block_size`` 1 also names of blocks, such as the hash ids of the
            Mooncake traces (as ids that mean a prefix: equal ids have equal ids before them).
        policy, cost: as for PrefixCache.
    """
    blocks = BlockManager(num_blocks, block_size)
    cache = PrefixCache(blocks.allocator, KeyTable(block_size), policy, cost)
    stats = cache.stats
    for name, prompt in enumerate(prompts):
        content, length = _reader(prompt), len(prompt)
        path: list[CachedBlock] = []
        cache.follow(path, content, length)
        stats.lookups += 1
        stats.prompt_tokens += length
        stats.prompt_blocks += length // block_size
        stats.hit_tokens += len(path) * block_size
        stats.hit_blocks += len(path)
        kept = min(length // block_size, num_blocks) * block_size
        blocks.adopt(name, [node.block for node in path])
        blocks.ensure(name, kept, max(1, kept - len(path) * block_size))
        cache.extend(path, blocks.table(name), content, kept)
        blocks.free(name)
    return stats


def _reader(prompt: Sequence[Any]) -> Content:
    return lambda start, stop: tuple(prompt[start:stop])
