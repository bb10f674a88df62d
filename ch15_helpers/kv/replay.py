"""A load's prompts through the prefix cache, without a model: what would have been found."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ch15_helpers.kv.blocks import BlockManager
from ch15_helpers.kv.keys import KeyTable
from ch15_helpers.kv.policies import EvictionPolicy, RecomputeCost
from ch15_helpers.kv.prefix import CachedBlock, Content, PrefixCache, PrefixStats


@dataclass
class ReplayStats(PrefixStats):
    """PrefixStats, and what the hits were worth.

    Attributes:
        saved_s, prompt_s: time to compute the blocks that were found, and all full blocks, in the
            unit of the RecomputeCost.
    """

    saved_s: float = 0.0
    prompt_s: float = 0.0

    @property
    def saved_share(self) -> float:
        """Share of the computation that the cache saved."""
        return self.saved_s / self.prompt_s if self.prompt_s else 0.0


def replay(
    prompts: Iterable[Sequence[Any]],
    num_blocks: int,
    *,
    block_size: int = 1,
    policy: str | EvictionPolicy = "lru",
    cost: RecomputeCost | None = None,
) -> ReplayStats:
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
    cache.stats = stats = ReplayStats()
    worth = [0.0]  # of the first n blocks of a prompt
    cost = RecomputeCost() if cost is None else cost
    for name, prompt in enumerate(prompts):
        content, length = _reader(prompt), len(prompt)
        path: list[CachedBlock] = []
        cache.follow(path, content, length)
        stats.lookups += 1
        stats.prompt_tokens += length
        stats.prompt_blocks += length // block_size
        stats.hit_tokens += len(path) * block_size
        stats.hit_blocks += len(path)
        while len(worth) <= length // block_size:
            worth.append(worth[-1] + cost.block_s(len(worth) - 1, block_size))
        stats.saved_s += worth[len(path)]
        stats.prompt_s += worth[length // block_size]
        kept = min(length // block_size, num_blocks) * block_size
        blocks.adopt(name, [node.block for node in path])
        if kept > len(path) * block_size:
            blocks.ensure(name, kept, kept - len(path) * block_size)
        cache.extend(path, blocks.table(name), content, kept)
        blocks.free(name)
    return stats


def _reader(prompt: Sequence[Any]) -> Content:
    return lambda start, stop: tuple(prompt[start:stop])
