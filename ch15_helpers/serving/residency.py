"""Where each request's KV blocks are: on the device, in the host pool, or nowhere yet."""

from __future__ import annotations

from ch15_helpers.kv.blocks import BlockAllocator, BlockManager
from ch15_helpers.serving.config import SchedulerConfig
from ch15_helpers.serving.request import Request, RequestStatus
from ch15_helpers.serving.step import Step


class Residency:
    """Moves requests between the device pool and the host pool, and writes the copies down."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.blocks = BlockManager(config.num_blocks, config.block_size)
        self.host_blocks = BlockAllocator(config.num_host_blocks)
        self._config = config

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

    def bring_in(self, request: Request, step: Step) -> None:
        """Give a request device blocks for all its known tokens, and swapped contents back."""
        tokens = request.num_tokens
        self.blocks.ensure(request.request_id, tokens, tokens - request.num_computed_tokens)
        request.slot = self.blocks.row(request.request_id)
        if request.host_blocks:
            table = self.blocks.table(request.request_id)
            step.swap_in += zip(request.host_blocks, table, strict=False)
            self._free_host(request)
        request.status = RequestStatus.RUNNING
        self.set_event(request)

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
        self.blocks.fork(parent.request_id, child.request_id)
        child.slot = self.blocks.row(child.request_id)
        child.status = RequestStatus.RUNNING

    def evict(self, request: Request, step: Step, copies: dict[int, int]) -> None:
        """Take a request's device blocks away, after a copy to the host where that is possible."""
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
        else:
            self.forget(request)
        self.blocks.free(request.request_id)
        request.slot = -1

    def forget(self, request: Request) -> None:
        """A request without device blocks is to be recomputed from its tokens."""
        self._free_host(request)
        request.num_computed_tokens = 0
        request.status = RequestStatus.PREEMPTED

    def release(self, request: Request) -> None:
        """Free whatever the request holds."""
        if request.request_id in self.blocks:
            self.blocks.free(request.request_id)
        self._free_host(request)
        request.slot = -1

    def set_event(self, request: Request) -> None:
        """Find how many computed tokens make the request end or its next token need a block.

        While it decodes, it has one known token more than computed ones.
        """
        last = request.num_prompt_tokens + request.max_output_tokens - 1
        request.event_at = min(last, self.blocks.capacity(request.request_id))

    def check_invariants(self) -> None:
        """Raise AssertionError when either pool is inconsistent."""
        self.blocks.check_invariants()
        self.host_blocks.check_invariants()

    def _free_host(self, request: Request) -> None:
        self.host_blocks.free_many(request.host_blocks)
        request.host_blocks = []
