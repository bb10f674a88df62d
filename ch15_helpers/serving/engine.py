"""The engine: text or token ids in, text and token ids out, one Step at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from rich.progress import Progress

from ch15_helpers.errors import DeviceLostError, InvalidRequestError
from ch15_helpers.model.transformer import Transformer
from ch15_helpers.serving.config import EngineConfig
from ch15_helpers.serving.engine_core import EngineCore, StepRecord
from ch15_helpers.serving.engine_parts import build_parts, overlaps
from ch15_helpers.serving.intake import Prompt, encode, params_for
from ch15_helpers.serving.request import SLO, Request, RequestOutput, SamplingParams
from ch15_helpers.serving.runner import ModelRunner
from ch15_helpers.serving.sampling import derive_seed
from ch15_helpers.serving.scheduler import Scheduler

__all__ = ["Engine", "StepRecord"]


class Engine(EngineCore):
    """Serves one model on one device with paged KV and iteration-level scheduling.

    Attributes:
        model, config, scheduler, runner, cache, host_cache: the parts, for notebooks to look at.
        num_steps: steps that ran the model.
        lost: what the device failed with; from then on every request is refused.
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
            CapacityError: the KV pool would not have a single block, or does not fit in memory.
            EngineConfigError: ``async_scheduling`` is on, and a subclass replaces a stage.
            TierError: a tier cannot be built.
        """
        self.model = model
        self.config = config = EngineConfig() if config is None else config
        self.clock = clock
        self.on_step = on_step
        self.num_steps = 0
        self.lost = None
        parts = build_parts(model, config, self.scheduler_type, self.runner_type, clock)
        self.scheduler, self.runner, self.offload = parts.scheduler, parts.runner, parts.offload
        self.cache, self.host_cache = parts.cache, parts.host_cache
        self._overlaps = overlaps(config.async_scheduling, self.scheduler, self.runner)
        self._in_flight = None
        self._num_requests = 0
        self._ended = []  # ended outside a step, not handed out yet

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
            DeviceLostError: the device failed earlier.
        """
        self._refuse_if_lost()
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
            DeviceLostError: the device failed earlier.
        """
        self._refuse_if_lost()
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
        self._ended += self._settle()  # the child starts from what the parent really has
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

    def _refuse_if_lost(self) -> None:
        if self.lost is not None:
            raise DeviceLostError(
                f"the device {self.model.device} stopped working ({self.lost}); start a new "
                "process, and an engine in it"
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
