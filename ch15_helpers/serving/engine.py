"""The engine: text or token ids in, text and token ids out, one Step at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.progress import Progress

from ch15_helpers.errors import InvalidRequestError
from ch15_helpers.kv.cache import PagedKVCache
from ch15_helpers.kv.quantised import make_kv_cache
from ch15_helpers.model.transformer import Transformer
from ch15_helpers.serving.config import EngineConfig
from ch15_helpers.serving.graphs import DecodeGraphs, can_capture
from ch15_helpers.serving.intake import Prompt, encode, params_for
from ch15_helpers.serving.memory import pool_size, recompute_cost_of
from ch15_helpers.serving.offload import Offload, tiered_offload
from ch15_helpers.serving.request import SLO, Request, RequestOutput, SamplingParams
from ch15_helpers.serving.runner import ModelRunner
from ch15_helpers.serving.sampling import derive_seed
from ch15_helpers.serving.scheduler import Scheduler
from ch15_helpers.serving.step import Step


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step as it ran: what ``on_step`` gets.

    ``schedule_s`` and ``update_s`` are the scheduler's share; the rest of ``end_s - start_s`` is
    block copies, inputs, forward and sampling. ``has_work``: requests are left after it.
    """

    index: int
    start_s: float
    end_s: float
    schedule_s: float
    update_s: float
    step: Step
    num_tokens: int
    num_waiting: int
    num_free_blocks: int
    has_work: bool


class Engine:
    """Serves one model on one device with paged KV and iteration-level scheduling.

    Attributes:
        model, config, scheduler, runner, cache, host_cache: the parts, for notebooks to look at.
        num_steps: steps that ran the model.
        offload: the tiers below the device pool, where ``config.tiers`` asks for them.
        scheduler_type, runner_type: stages that a subclass may replace.
    """

    scheduler_type: type[Scheduler] = Scheduler
    runner_type: type[ModelRunner] = ModelRunner

    def __init__(
        self,
        model: Transformer,
        config: EngineConfig | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
        on_step: Callable[[StepRecord], None] | None = None,
    ) -> None:
        """Allocate the pools.

        Args:
            model: from ``load_model``.
            config: see EngineConfig.
            clock: seconds, monotonic; every recorded time comes from it.
            on_step: called after each step that ran.

        Raises:
            CapacityError: the KV pool would not have a single block.
            TierError: a tier cannot be built.
        """
        self.model = model
        self.config = config = EngineConfig() if config is None else config
        self.clock = clock
        self.on_step = on_step
        self.num_steps = 0
        num_blocks = config.num_blocks
        if num_blocks is None:
            num_blocks = pool_size(model.config, config, model.device, model.dtype)
        model_len = model.config.max_position_embeddings
        cost = recompute_cost_of(model.config)
        self.scheduler = self.scheduler_type(config.scheduler_config(num_blocks, model_len, cost))
        self.cache = self._pool(num_blocks, on_host=False)
        host_blocks = config.num_host_blocks
        self.host_cache = self._pool(host_blocks, on_host=True) if host_blocks else None
        self.runner = self.runner_type(
            model, self.cache, self.scheduler.blocks, self.host_cache, config.attention_backend
        )
        self.offload: Offload | None = None
        if config.tiers is not None:
            self.offload = self.runner.offload = tiered_offload(
                model, self.cache, self.scheduler, config.tiers, clock
            )
        if model.device.type == "cuda":
            self.runner.warm_up(config.max_num_seqs)
        if config.capture_decode and can_capture(model, config.attention_backend):
            limit = self.scheduler.config.max_model_len or model_len
            pages, scales = self.cache.pages, self.cache.scales
            self.runner.graphs = DecodeGraphs(model, pages, config.max_num_seqs, limit, scales)
            self.runner.graphs.capture()
        self._num_requests = 0
        self._ended: list[Request] = []  # ended outside a step, not handed out yet

    @property
    def has_unfinished(self) -> bool:
        """Whether ``step`` has anything to do or to hand out."""
        return self.scheduler.has_work or bool(self._ended)

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Continue every prompt; returns the outputs in the order of the prompts.

        Args:
            prompts: strings, or lists of token ids.
            params: for all, or one for each prompt.
            progress: show a progress bar.

        Raises:
            InvalidRequestError: a prompt or the list makes no sense; nothing was started. A
                prompt that is fine but too long does not raise: its output has an error.
        """
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            raise InvalidRequestError(
                f"prompts is a {type(prompts).__name__}; it must be a list of prompts"
            )
        if not prompts:
            raise InvalidRequestError("the list of prompts is empty; it needs at least one")
        each = params_for(len(prompts), params)
        token_ids = [encode(self.model, prompt, f"prompt {i}") for i, prompt in enumerate(prompts)]
        names = [
            self._queue(self._request(tokens, params, None, self.clock()))
            for tokens, params in zip(token_ids, each, strict=True)
        ]
        outputs: dict[str, RequestOutput] = {}
        wanted = set(names)
        others: list[Request] = []
        try:
            with Progress(disable=not progress) as bar:
                task = bar.add_task("generating", total=len(names))
                while len(outputs) < len(names):
                    for request in self._step():
                        if request.request_id in wanted:
                            outputs[request.request_id] = self._output(request)
                        else:
                            others.append(request)
                    bar.update(task, completed=len(outputs))
        finally:
            # After an interrupt nothing of this call stays behind; other requests lose nothing.
            for name in names:
                self.scheduler.abort(name)
            self._ended = others + [r for r in self._ended if r.request_id not in wanted]
        return [outputs[name] for name in names]

    def add_request(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        request_id: str | None = None,
        arrival_s: float | None = None,
        *,
        priority: int = 0,
        slo: SLO | None = None,
    ) -> str:
        """Queue one request; returns its id. A prompt that is too long ends in the next step.

        Args:
            arrival_s: when it arrived, on the engine's clock; None is now.
            priority: smaller is served earlier, under the ``priority`` policy.
            slo: its own latency limits, for the ``least_slack`` policy.

        Raises:
            InvalidRequestError: the prompt makes no sense, or the id is in use.
        """
        tokens = encode(self.model, prompt, "the prompt")
        now_s = self.clock() if arrival_s is None else arrival_s
        request = self._request(tokens, params or SamplingParams(), request_id, now_s)
        request.priority, request.slo = priority, slo
        return self._queue(request)

    def fork(
        self, request_id: str, params: SamplingParams | None = None, child_id: str | None = None
    ) -> str:
        """Continue a decoding request a second time, sharing its KV blocks (copy-on-write).

        Args:
            params: of the child; None is the parent's, with the parent's seed.

        Returns:
            The child's id; its output starts with the parent's tokens so far.

        Raises:
            InvalidRequestError: see ``Scheduler.fork``.
        """
        parent = self.scheduler.get(request_id)
        if parent is None:
            raise InvalidRequestError(f"there is no unfinished request {request_id!r}")
        child = self._request(
            parent.prompt_token_ids, params or parent.params, child_id, self.clock()
        )
        if params is None:
            child.seed = parent.seed
        self.scheduler.fork(request_id, child)
        return child.request_id

    def abort(self, request_id: str) -> bool:
        """End a request and free its blocks; its output comes from the next ``step``.

        Returns False when there is no such unfinished request.
        """
        request = self.scheduler.abort(request_id)
        if request is not None:
            self._ended.append(request)
        return request is not None

    def step(self) -> list[RequestOutput]:
        """Run one iteration; returns the outputs of the requests that ended.

        With nothing to do but to wait for blocks from a lower tier, it waits for them.
        """
        return [self._output(request) for request in self._step()]

    def close(self) -> None:
        """Stop what runs in the background. Needed only with ``config.tiers``."""
        if self.offload is not None:
            self.offload.close()

    def check_invariants(self) -> None:
        """Raise AssertionError when the scheduler or the pools are inconsistent."""
        self.scheduler.check_invariants()

    # ---- inside ----------------------------------------------------------------------------

    def _step(self) -> list[Request]:
        ended, self._ended = self._ended, []
        if self.offload is not None:
            self.offload.deliver()
        if not self.scheduler.has_work:
            return ended
        start_s = self.clock()
        step = self.scheduler.schedule(start_s)
        scheduled_s = self.clock()
        try:
            token_ids = self.runner.run(step)
        except Exception as error:
            # The scheduler's state is sound, the device's may not be: only this step's requests
            # depend on it.
            text = f"the model step failed: {type(error).__name__}: {error}"
            return ended + self._fail(step, text)
        except BaseException:
            self._fail(step, "interrupted")
            raise
        ran_s = self.clock()
        ended += self.scheduler.update(step, token_ids, ran_s)
        self.num_steps += 1
        if self.on_step is not None:
            self.on_step(self._record(step, start_s, scheduled_s, ran_s))
        if step.is_empty and not ended and self.offload is not None:
            self.offload.wait()
        return ended

    def _fail(self, step: Step, error: str) -> list[Request]:
        finished = self.scheduler.fail(step, error)
        if self.offload is not None:
            self.offload.drop(step)
        return finished

    def _record(self, step: Step, start_s: float, scheduled_s: float, ran_s: float) -> StepRecord:
        return StepRecord(
            index=self.num_steps - 1,
            start_s=start_s,
            end_s=ran_s,
            schedule_s=scheduled_s - start_s,
            update_s=self.clock() - ran_s,
            step=step,
            num_tokens=step.num_tokens,
            num_waiting=self.scheduler.num_waiting,
            num_free_blocks=self.scheduler.blocks.allocator.num_free,
            has_work=self.scheduler.has_work,
        )

    def _queue(self, request: Request) -> str:
        if not self.scheduler.add(request):
            self._ended.append(request)
        return request.request_id

    def _request(
        self, token_ids: list[int], params: SamplingParams, request_id: str | None, now_s: float
    ) -> Request:
        number = self._num_requests
        self._num_requests += 1
        seed = derive_seed(self.config.seed, number) if params.seed is None else params.seed
        return Request(
            request_id=f"request-{number}" if request_id is None else request_id,
            prompt_token_ids=token_ids,
            params=params,
            arrival_s=now_s,
            eos_token_ids=self.model.config.eos_token_ids,
            seed=seed,
        )

    def _output(self, request: Request) -> RequestOutput:
        tokenizer = self.model.tokenizer
        tokens = request.output_token_ids
        return RequestOutput(
            request_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            token_ids=tokens,
            text="" if tokenizer is None else tokenizer.decode(tokens),
            finish_reason=request.finish_reason or "",
            error=request.error,
            metrics=request.metrics(),
        )

    def _pool(self, num_blocks: int, on_host: bool) -> PagedKVCache:
        dtype = self.model.dtype if self.config.kv_dtype is None else self.config.kv_dtype
        device = self.model.device
        return make_kv_cache(
            self.model.config,
            num_blocks,
            self.config.block_size,
            dtype=dtype,
            device="cpu" if on_host else device,
            layout=self.config.kv_layout,
            pin_memory=on_host and device.type == "cuda",
        )
