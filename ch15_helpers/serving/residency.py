"""Where each request's KV blocks are: on the device, in the host pool, or nowhere yet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ch15_helpers.kv.blocks import BlockAllocator, BlockManager
from ch15_helpers.kv.keys import BlockKey, KeyTable
from ch15_helpers.kv.prefix import PrefixCache
from ch15_helpers.serving.config import SchedulerConfig
from ch15_helpers.serving.request import Request, RequestStatus
from ch15_helpers.serving.step import Step


class TierIndex(Protocol):
    """What is asked of the lower tiers while scheduling (``kv.tiers.TieredStore`` has it)."""

    def num_leading(self, keys: Sequence[BlockKey]) -> int:
        """How many of the first keys are in some tier; no input or output is done."""


class Residency:
    """Moves requests between the device pool and the host pool, and writes the copies down.

    Attributes:
        prefix: the prefix cache, where the configuration enables it.
        tiers: where evicted blocks went, if anywhere; set by ``attach_tiers``.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.blocks = BlockManager(config.num_blocks, config.block_size)
        self.host_blocks = BlockAllocator(config.num_host_blocks)
        self.prefix: PrefixCache | None = None
        self.tiers: TierIndex | None = None
        self._config = config
        if config.enable_prefix_caching:
            self.prefix = PrefixCache(
                self.blocks.allocator,
                KeyTable(config.block_size),
                config.eviction_policy,
                config.recompute_cost,
            )

    def attach_tiers(self, tiers: TierIndex) -> None:
        """From now on evicted blocks go to ``tiers``, and prompts are looked up there, too."""
        if self.prefix is None:
            raise ValueError("tiers hold what the prefix cache evicts; set enable_prefix_caching")
        self.tiers = tiers
        self.prefix.keep_evicted = True

    def why_never(self, request: Request) -> str | None:
        """Why this request can never run, or None when it can."""
        tokens, limit = request.num_tokens, self._config.max_model_len
        if limit is not None and tokens > limit:
            return f"the prompt has {tokens} tokens, the model's context is {limit} tokens"
        needed = self.blocks.blocks_for(tokens)
        if needed > self._config.num_blocks:
            return (
                f"the request has {tokens} tokens and needs {needed} KV blocks of "
                f"{self._config.block_size}, the pool has {self._config.num_blocks}"
            )
        return None

    def blocks_to_take(self, request: Request) -> int:
        """By how many ``bring_in`` would lower the number of free blocks; finds cached ones."""
        needed = self.blocks.blocks_for(request.num_tokens)
        if self.prefix is None or request.host_blocks:
            return needed
        path = request.path
        self.prefix.follow(path, request.content, request.num_tokens - 1)
        return needed - len(path) + self.prefix.num_idle(path)

    def num_to_compute(self, request: Request) -> int:
        """Tokens that a waiting request would have to compute, after ``blocks_to_take``."""
        done = max(request.num_computed_tokens, len(request.path) * self.blocks.block_size)
        return request.num_tokens - done

    def bring_in(self, request: Request, step: Step) -> list[tuple[BlockKey, int]]:
        """Give a request device blocks for all its known tokens, and swapped contents back.

        Returns:
            Blocks that a lower tier has: (key, device block). While they are on their way the
            request cannot run; ``loaded`` ends that.
        """
        wanted: list[tuple[BlockKey, int]] = []
        if self.prefix is not None and not request.host_blocks:
            wanted = self._reuse(request, step, self.prefix)
        else:
            tokens = request.num_tokens
            self.blocks.ensure(request.request_id, tokens, tokens - request.num_computed_tokens)
        request.slot = self.blocks.row(request.request_id)
        if request.host_blocks:
            table = self.blocks.table(request.request_id)
            step.swap_in += zip(request.host_blocks, table, strict=False)
            self._free_host(request)
        request.status = RequestStatus.LOADING if wanted else RequestStatus.RUNNING
        self.set_event(request)
        return wanted

    def loaded(self, request: Request, num_blocks: int) -> None:
        """The first ``num_blocks`` blocks that were on their way are there; no more will come."""
        assert self.prefix is not None
        tokens = num_blocks * self.blocks.block_size
        request.num_computed_tokens += tokens
        request.status = RequestStatus.RUNNING
        self.keep(request)
        request.num_shared_blocks = len(request.path)
        self._count(request, tokens)
        self.prefix.stats.promoted_tokens += tokens

    def keep(self, request: Request) -> None:
        """Cache the full blocks that the request has computed."""
        computed = request.num_computed_tokens
        if self.prefix is None or computed // self.blocks.block_size <= len(request.path):
            return
        name = request.request_id
        table = self.blocks.table(name)
        for index, block in self.prefix.extend(request.path, table, request.content, computed):
            self.blocks.replace(name, index, block)

    def can_grow(self, request: Request) -> bool:
        """Whether the last known token can get a block of its own to be written to."""
        return self.blocks.can_grow(request.request_id, request.num_tokens)

    def grow(self, request: Request, copies: dict[int, int]) -> None:
        """Give it that block; ``copies`` maps a new block to the one that it must copy."""
        ops = self.blocks.ensure(request.request_id, request.num_tokens)
        copies.update((target, source) for source, target in ops)
        self.set_event(request)

    def share(self, parent: Request, child: Request) -> None:
        """Make ``child`` a running request on the blocks of ``parent``."""
        # First, because only one of them could later exchange a block for an equal cached one.
        self.keep(parent)
        child.path = parent.path[:]
        self.blocks.fork(parent.request_id, child.request_id)
        child.slot = self.blocks.row(child.request_id)
        child.status = RequestStatus.RUNNING

    def evict(self, request: Request, step: Step, copies: dict[int, int]) -> None:
        """Take a request's device blocks away, after a copy to the host where that is possible."""
        self.keep(request)
        content = self.blocks.table(request.request_id)
        if copies:
            # The victim's pending copies are dropped: their targets belong to others from now on.
            # What they were to hold is still in the sources when swapping out, which comes first.
            content = [copies.pop(block, block) for block in content]
        num_blocks = self.blocks.blocks_for(request.num_computed_tokens)
        if self._config.preemption == "swap" and 0 < num_blocks <= self.host_blocks.num_free:
            request.host_blocks = self.host_blocks.allocate_many(num_blocks)
            step.swap_out += zip(content, request.host_blocks, strict=False)
            request.status = RequestStatus.SWAPPED
            request.path = []
        else:
            self.forget(request)
        self.blocks.free(request.request_id)
        request.slot = -1

    def withdraw(self, request: Request) -> None:
        """Take back the blocks of a request whose content may never have been put there."""
        self.forget(request)
        self.blocks.free(request.request_id)
        request.slot = -1

    def forget(self, request: Request) -> None:
        """A request without device blocks is to be recomputed from its tokens."""
        self._free_host(request)
        request.num_computed_tokens = 0
        request.path = []
        request.status = RequestStatus.PREEMPTED

    def release(self, request: Request, trusted: bool = True) -> None:
        """Free whatever the request holds.

        Args:
            trusted: what it computed may be cached. Otherwise what it has cached is struck off.
        """
        if request.request_id in self.blocks:
            if trusted:
                self.keep(request)
            self.blocks.free(request.request_id)
            if self.prefix is not None and not trusted:
                self.prefix.discard(request.path[request.num_shared_blocks :])
        request.path = []
        self._free_host(request)
        request.slot = -1

    def set_event(self, request: Request) -> None:
        """Find how many computed tokens make the request end or its next token need a block.

        While it decodes, it has one known token more than computed ones.
        """
        last = request.num_prompt_tokens + request.max_output_tokens - 1
        request.event_at = min(last, self.blocks.capacity(request.request_id))

    def check_invariants(self) -> None:
        """Raise AssertionError when a pool or the cache is inconsistent."""
        self.blocks.check_invariants()
        self.host_blocks.check_invariants()
        if self.prefix is not None:
            self.prefix.check_invariants()

    # ---- inside ----------------------------------------------------------------------------

    def _reuse(
        self, request: Request, step: Step, prefix: PrefixCache
    ) -> list[tuple[BlockKey, int]]:
        """Start the table with what is cached; the last known token is always computed.

        Where the prompt goes on inside a cached block, that block is copied and the copy is
        written to from where they differ (copy-on-write).
        """
        name, path, tokens = request.request_id, request.path, request.num_tokens
        wanted = self._in_tiers(request, prefix)
        near = None if wanted else prefix.nearest(path, request.content, tokens - 1)
        source, count = -1, 0
        if near is not None:
            source, count = near[0].block, near[1]
            prefix.policy.touch(near[0])
        self.blocks.adopt(name, [node.block for node in path])
        computed = len(path) * self.blocks.block_size
        # May evict the source. That is in order: copies are made before anything is written.
        self.blocks.ensure(name, tokens, tokens - computed)
        table = self.blocks.table(name)
        if count and table[len(path)] != source:
            step.copies.append((source, table[len(path)]))
        request.num_computed_tokens = computed + count
        request.num_shared_blocks = len(path)
        if request.first_scheduled_s is None:
            prefix.stats.lookups += 1
            prefix.stats.prompt_tokens += request.num_prompt_tokens
            prefix.stats.prompt_blocks += request.num_prompt_tokens // self.blocks.block_size
            prefix.stats.copied_tokens += count
        self._count(request, computed + count)
        return list(zip(wanted, table[len(path) :], strict=False))

    def _in_tiers(self, request: Request, prefix: PrefixCache) -> list[BlockKey]:
        """Keys of the blocks after the cached ones that a lower tier has."""
        if self.tiers is None:
            return []
        size, path = self.blocks.block_size, request.path
        last = (request.num_tokens - 1) // size * size
        tokens = request.tokens(len(path) * size, last)
        after = path[-1].key(prefix.keys) if path else None
        keys = list(prefix.keys.keys_of(tokens, after))
        return keys[: self.tiers.num_leading(keys)] if keys else []

    def _count(self, request: Request, tokens: int) -> None:
        """Note that ``tokens`` were found instead of computed."""
        assert self.prefix is not None
        stats = self.prefix.stats
        if request.num_preemptions:
            stats.recovered_tokens += tokens
            return
        request.num_cached_tokens += tokens
        stats.hit_tokens += tokens
        stats.hit_blocks += tokens // self.blocks.block_size

    def _free_host(self, request: Request) -> None:
        self.host_blocks.free_many(request.host_blocks)
        request.host_blocks = []
