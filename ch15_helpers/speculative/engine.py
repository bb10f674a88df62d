"""The engine with speculation: its scheduler plans room for drafts, its runner verifies them.

Everything else stays: admission, chunked prefill, preemption, prefix caching. A step is still
schedule, run, update; a decode is a chunk of ``1 + k`` tokens that asks for the logits of each, and
what is rejected is rolled back by shortening the block table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ch15_helpers.errors import InvalidRequestError
from ch15_helpers.kernels.kv_quant import is_quantised
from ch15_helpers.model.transformer import Transformer
from ch15_helpers.serving.batch_builder import HostBatch
from ch15_helpers.serving.config import EngineConfig, SchedulerConfig
from ch15_helpers.serving.engine import Engine
from ch15_helpers.serving.request import Request, RequestStatus
from ch15_helpers.serving.runner import ModelRunner
from ch15_helpers.serving.sampling import greedy_ids, sample
from ch15_helpers.serving.scheduler import Scheduler
from ch15_helpers.serving.step import Step
from ch15_helpers.serving.warm_up import patiently
from ch15_helpers.speculative.drafting import ModelProposer
from ch15_helpers.speculative.lengths import DraftLengths, FixedLength
from ch15_helpers.speculative.proposers import Proposer
from ch15_helpers.speculative.rows import QueryRow, host_batch
from ch15_helpers.speculative.verify import AcceptanceStats, Draft, verify

__all__ = ["SpeculativeEngine", "SpeculativeScheduler", "SpeculativeStep"]


@dataclass(slots=True)
class SpeculativeStep(Step):
    """A step whose decodes may get several tokens.

    Attributes:
        limits: for each decode, how many drafted tokens there is room for.
        drafts: how many were made and verified; filled in by the runner.
        verified: the tokens that each decode gets; filled in by the runner.
    """

    limits: list[int] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)
    verified: list[list[int]] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the model: with drafts, or with room for them before the run."""
        chunks = sum(chunk.num_tokens for chunk in self.chunks)
        return len(self.decodes) + chunks + sum(self.drafts or self.limits)


class SpeculativeScheduler(Scheduler):
    """Gives decodes room for drafts from what a step leaves free, and takes back what is left over.

    Drafts use spare budget and spare blocks: they delay no prompt and preempt nobody.

    Attributes:
        lengths: how many tokens to draft.
        forget: called with the id of each request that ends.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)
        self.lengths: DraftLengths = FixedLength(0)
        self.forget: Callable[[str], None] = lambda request_id: None

    def update(self, step: Step, token_ids: Sequence[int], now_s: float) -> list[Request]:
        """Record the outcome of a step; decodes may have got several tokens."""
        assert isinstance(step, SpeculativeStep)
        if not step.limits:
            return super().update(step, token_ids, now_s)
        events = []
        verified = step.verified or [[token] for token in token_ids[: len(step.decodes)]]
        for request, tokens in zip(step.decodes, verified, strict=True):
            ends = (place for place, token in enumerate(tokens, 1) if token in request.stop_ids)
            tokens = tokens[: next(ends, None)]
            request.output_token_ids += tokens
            request.token_times_s += [now_s] * len(tokens)
            request.num_computed_tokens += len(tokens)
            # As after a plain decode: blocks for what is computed, and an event if that is all.
            self.blocks.truncate(request.request_id, request.num_computed_tokens)
            self.residency.set_event(request)
            last = request.output_token_ids[-1]
            if request.num_computed_tokens >= request.event_at or last in request.stop_ids:
                events.append(request)
        ended = [request for request in events if self._ends_or_grows(request)]
        if ended:
            running = RequestStatus.RUNNING
            self._decoding = [r for r in self._decoding if r.status is running]
        if step.chunks:
            ended += self._update_chunks(step, token_ids, now_s)
        return step.failed + ended

    def _new_step(self) -> Step:
        return SpeculativeStep()

    def _fill(self, step: Step, now_s: float) -> None:
        super()._fill(step, now_s)
        assert isinstance(step, SpeculativeStep)
        if step.decodes:
            self._make_room(step)

    def _make_room(self, step: SpeculativeStep) -> None:
        """Extend the tables of decodes by as many drafts as budget and blocks allow."""
        budget = self.config.max_num_batched_tokens - step.num_tokens
        limits, count = [], len(step.decodes)
        for number, request in enumerate(step.decodes):
            room = request.max_output_tokens - len(request.output_token_ids) - 1
            share = -(-budget // (count - number))
            wanted = min(self.lengths.length(request.request_id, count), room, share)
            limit = self._fitting(request, wanted)
            if limit:
                copies = self.blocks.ensure(
                    request.request_id, request.num_tokens + limit, 1 + limit
                )
                step.copies = [*step.copies, *copies]
            budget -= limit
            limits.append(limit)
        if any(limits):
            step.limits = limits

    def _fitting(self, request: Request, wanted: int) -> int:
        """Drafts that fit into blocks that nobody needs."""
        spare = self.blocks.allocator.num_free - self._watermark_blocks
        name, known = request.request_id, request.num_tokens
        while wanted > 0 and self.blocks.blocks_needed(name, known + wanted, 1 + wanted) > spare:
            wanted -= 1
        return max(0, wanted)

    def _finish(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super()._finish(request, *args, **kwargs)
        self.forget(request.request_id)


class SpeculativeRunner(ModelRunner):
    """Runs a step with drafts as one forward pass.

    Attributes:
        proposer, lengths, stats: set by the engine.
    """

    proposer: Proposer
    lengths: DraftLengths
    stats: AcceptanceStats

    @property
    def captures_prompts(self) -> bool:
        """A step without drafts is a plain one, if no subclass looks into it."""
        return type(self)._execute is ModelRunner._execute

    @torch.inference_mode()
    def forward(self, host: HostBatch) -> tuple[Tensor, Tensor]:
        """Run a batch of any kind, captured where that is possible.

        Returns:
            logits float32 [R, vocab] and greedy ids int64 [R] of ``host.logits_indices``; the next
            run may overwrite both.
        """
        found = None if self.graphs is None else self.graphs.run(host)
        if found is not None:
            return found
        logits = self._execute(*self._uploader.upload(host))
        return logits, greedy_ids(logits)

    def _compute(self, step: Step) -> list[int]:
        assert isinstance(step, SpeculativeStep)
        if not step.limits:
            return super()._compute(step)
        drafts = self._propose(step)
        step.drafts = [len(draft.token_ids) for draft in drafts]
        if not any(step.drafts):
            return super()._compute(step)
        logits, greedy = self.forward(self._verification(step, drafts))
        count = len(step.decodes) + sum(step.drafts)
        # With drafts that were drawn, the greedy ids are not what decides.
        known = () if any(d.probs is not None for d in drafts) else (greedy[:count],)
        step.verified = verify(logits[:count], step.decodes, drafts, *known)
        for request, drafted, tokens in zip(step.decodes, step.drafts, step.verified, strict=True):
            self.stats.record(drafted, len(tokens) - 1)
            self.lengths.record(request.request_id, drafted, len(tokens) - 1)
        firsts = [tokens[0] for tokens in step.verified]
        others = step.sampled[len(step.decodes) :]
        return [*firsts, *sample(logits[count:], others)] if others else firsts

    def _propose(self, step: SpeculativeStep) -> list[Draft]:
        """Drafts; none in a step with prompts that is one launch only without them."""
        graphs = self.graphs if self.captures_prompts else None
        if graphs is not None and step.chunks:
            tokens = len(step.decodes) + sum(chunk.num_tokens for chunk in step.chunks)
            if tokens <= max(graphs.prompt_sizes, default=0):
                return [Draft()] * len(step.decodes)
        return self.proposer.propose(step.decodes, step.limits)

    def _verification(self, step: SpeculativeStep, drafts: Sequence[Draft]) -> HostBatch:
        """Decodes with their drafts, all logits wanted; then chunks, as in a plain step."""
        rows = [
            QueryRow(
                [request.output_token_ids[-1], *draft.token_ids],
                request.num_computed_tokens,
                self._blocks.table(request.request_id),
            )
            for request, draft in zip(step.decodes, drafts, strict=True)
        ]
        wanted = list(range(len(step.decodes) + sum(step.drafts)))
        end = len(wanted)
        for chunk in step.chunks:
            stop = chunk.start + chunk.num_tokens
            table = self._blocks.table(chunk.request.request_id)
            rows.append(QueryRow(chunk.request.tokens(chunk.start, stop), chunk.start, table))
            end += chunk.num_tokens
            if chunk.is_last:
                wanted.append(end - 1)
        return host_batch(rows, np.array(wanted, dtype=np.int64), self.cache.block_size)


class SpeculativeEngine(Engine):
    """An Engine that drafts and verifies.

    Attributes:
        proposer: who drafts.
        stats: what became of the drafts.
    """

    scheduler_type = SpeculativeScheduler
    runner_type = SpeculativeRunner

    def __init__(
        self,
        model: Transformer,
        config: EngineConfig | None = None,
        *,
        proposer: Proposer | Callable[[Engine], Proposer],
        lengths: DraftLengths | int = 4,
        **options: Any,
    ) -> None:
        """Allocate the pools, as Engine does.

        Args:
            proposer: who drafts, or a function that makes it from the engine (which has the pool
                that layer skipping shares).
            lengths: how many tokens to draft; a number is always that many.
            options: as for Engine.

        Raises:
            InvalidRequestError: the KV cache is quantised. Appending a token may rescale its block,
                and taking a rejected one back would not undo that.
        """
        super().__init__(model, config, **options)
        if is_quantised(self.cache.dtype):
            raise InvalidRequestError(
                f"speculation needs a KV cache that can be rolled back, {self.cache.dtype} is "
                "rescaled by what is rejected; use kv_dtype=None"
            )
        self.stats = AcceptanceStats()
        self.lengths = FixedLength(lengths) if isinstance(lengths, int) else lengths
        made = proposer(self) if callable(proposer) else proposer
        self.proposer: Proposer = made
        scheduler = cast(SpeculativeScheduler, self.scheduler)
        scheduler.lengths, scheduler.forget = self.lengths, self._forget
        runner = cast(SpeculativeRunner, self.runner)
        runner.proposer, runner.lengths, runner.stats = self.proposer, self.lengths, self.stats
        if isinstance(self.proposer, ModelProposer):
            self.proposer.capture(self.config)
        self._captured_for = 0
        self._capture()

    def set_lengths(self, lengths: DraftLengths | int) -> None:
        """Draft so many tokens from now on; 0 is none."""
        self.lengths = FixedLength(lengths) if isinstance(lengths, int) else lengths
        cast(SpeculativeScheduler, self.scheduler).lengths = self.lengths
        cast(SpeculativeRunner, self.runner).lengths = self.lengths
        self._capture()

    def _capture(self) -> None:
        """Capture verifications of the longest drafts there may be, unless they are already."""
        graphs, longest = self.runner.graphs, self.lengths.longest
        if graphs is None or longest <= self._captured_for:
            return
        shapes = graphs.verification_shapes(longest, self.config.max_num_batched_tokens)
        for shape in patiently(shapes, "capturing verifications"):
            graphs.capture([shape])
        self._captured_for = longest

    def _forget(self, request_id: str) -> None:
        self.proposer.forget(request_id)
        self.lengths.forget(request_id)
