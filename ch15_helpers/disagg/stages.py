"""The two stages of an engine that disaggregation replaces, and nothing else.

On the prefill side the runner says when a layer's keys and values are there, so that they can leave
while the next layer is computed (Splitwise, Patel et al., ISCA 2024). On the decode side the
scheduler reserves blocks for a prompt that is computed elsewhere, and lets the request decode once
they are filled (DistServe, Zhong et al., OSDI 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ch15_helpers.disagg.layer_graphs import LayerGraphs
from ch15_helpers.disagg.layer_watch import LayerWatch
from ch15_helpers.kernels.batch import BatchMetadata
from ch15_helpers.model.transformer import Transformer
from ch15_helpers.serving.batch_builder import HostBatch
from ch15_helpers.serving.config import EngineConfig
from ch15_helpers.serving.engine import Engine
from ch15_helpers.serving.engine_core import InFlight
from ch15_helpers.serving.graphs import can_capture
from ch15_helpers.serving.request import Request, RequestOutput, RequestStatus
from ch15_helpers.serving.runner import ModelRunner
from ch15_helpers.serving.scheduler import Scheduler
from ch15_helpers.serving.step import Step
from ch15_helpers.serving.warm_up import patiently

LayerDone = Callable[[Step, int], None]
"""Called with the step and the index of a layer whose keys and values are in the pages."""


class LayerwiseRunner(ModelRunner):
    """A ModelRunner that reports layers.

    Attributes:
        on_layer: called during a step, after each layer; None for nobody.
        layer_graphs: captured prompts that can be watched, or None.
        watch: on a GPU, waits for each layer before it is reported; None reports launches.
    """

    on_layer: LayerDone | None = None
    watch: LayerWatch | None = None
    layer_graphs: LayerGraphs | None = None
    _step: Step | None = None

    def run(self, step: Step) -> list[int]:
        """As ``ModelRunner.run``; the step is reported with each of its layers."""
        self._step = step
        try:
            return super().run(step)
        finally:
            self._step = None

    def _replay(self, host: HostBatch) -> tuple[Tensor, Tensor] | None:
        if self.layer_graphs is None:
            return super()._replay(host)
        with self._reporting() as seen:
            return self.layer_graphs.run_layers(host, seen)

    def _execute(self, token_ids: Tensor, positions: Tensor, batch: BatchMetadata) -> Tensor:
        if self._step is None or self.on_layer is None:  # warming up, or nobody listens
            return super()._execute(token_ids, positions, batch)
        with self._reporting() as seen:
            return self.model.forward(
                token_ids,
                positions,
                self.cache.pages,
                batch,
                attention_backend=self.attention_backend,
                on_layer_done=seen,
                kv_scales=self.cache.scales,
            )

    @contextmanager
    def _reporting(self) -> Iterator[Callable[[int], None]]:
        """What to call with each layer of the running step."""
        step, report = self._step, self.on_layer

        def seen(layer: int) -> None:
            if step is not None and report is not None:
                report(step, layer)

        if self.watch is None or step is None or report is None:
            yield seen
            return
        with self.watch.following(seen) as launched:
            yield launched


class PrefillEngine(Engine):
    """Computes prompts and their first token; ask for ``max_tokens=1``.

    A prompt's blocks are freed when its step is over, so they must have been sent by then. On a GPU
    prompts are captured layer by layer where ``capture_prompts`` is on. Build it with
    ``capture_decode=False``: it decodes nothing, and a captured decode step reports no layers.
    """

    runner_type = LayerwiseRunner
    runner: LayerwiseRunner

    def __init__(
        self, model: Transformer, config: EngineConfig | None = None, **options: Any
    ) -> None:
        """As for ``Engine``."""
        super().__init__(model, config, **options)
        config, runner = self.config, self.runner
        if not config.capture_prompts or not can_capture(model, config.attention_backend):
            return
        longest = self.scheduler.config.max_model_len or model.config.max_position_embeddings
        graphs = LayerGraphs(model, self.cache, config.max_num_seqs, longest, runner.last_ids)
        shapes = graphs.prompt_shapes(config.max_num_batched_tokens)
        for shape in patiently(shapes, "capturing layers"):
            graphs.capture([shape])
        runner.layer_graphs = graphs


class DecodeScheduler(Scheduler):
    """Takes in requests whose prompts are computed elsewhere. Its pool has no prefix cache."""

    @property
    def has_runnable(self) -> bool:
        """Whether a step would do anything: requests other than those whose KV is on its way."""
        return self.num_waiting > 0 or self.num_running > self.num_loading

    def can_reserve(self, request: Request) -> bool:
        """Whether there are a slot and blocks for the request's prompt now (back-pressure)."""
        needed = self.blocks.blocks_for(request.num_prompt_tokens + 1)
        reserve = self._watermark_blocks if self.num_running else 0
        free = self.blocks.allocator.num_free
        return self.num_running < self._max_running and needed + reserve <= free

    def reserve(self, request: Request) -> int:
        """Give a request its blocks; it waits, LOADING, until ``arrive`` or ``withdraw``.

        Returns:
            The ticket for these two.

        Raises:
            InvalidRequestError: its id is in use.
            OutOfBlocks: ``can_reserve`` was not asked.
        """
        self._register(request)
        name, tokens = request.request_id, request.num_prompt_tokens
        self.blocks.ensure(name, tokens, tokens)
        request.slot = self.blocks.row(name)
        request.status = RequestStatus.LOADING
        ticket = self._num_tickets
        self._num_tickets += 1
        self._loading[ticket] = request
        return ticket

    def arrive(self, ticket: int, first_token: int, now_s: float) -> list[Request]:
        """The blocks are filled, and the prefill's first token is known: go on decoding.

        Args:
            now_s: when the first token was ready.

        Returns:
            The request, if that token ended it.
        """
        request = self._loading.pop(ticket)
        self._disturbed = True
        if request is None:  # aborted meanwhile
            self.blocks.free(ticket)
            return []
        request.status = RequestStatus.RUNNING
        request.num_computed_tokens = request.num_prompt_tokens
        request.output_token_ids.append(first_token)
        request.token_times_s.append(now_s)
        if self._ends_or_grows(request):
            return [request]
        self._decoding = [*self._decoding, request]
        return []

    def withdraw(self, ticket: int, error: str) -> list[Request]:
        """The blocks will not be filled: end the request with an error, and return it."""
        request = self._loading.pop(ticket)
        self._disturbed = True
        if request is None:
            self.blocks.free(ticket)
            return []
        self._finish(request, "error", error)
        return [request]


class DecodeEngine(Engine):
    """An Engine that takes in what a prefill side has computed.

    Requests that end here without a step of their own come out of the next ``step``.
    """

    scheduler_type: type[DecodeScheduler] = DecodeScheduler
    scheduler: DecodeScheduler
    _begun: InFlight | None = None

    def begin(self) -> None:
        """Launch a step. Until ``finish`` nothing may be reserved, arrive or be withdrawn."""
        self._begun = self._launch()

    def finish(self) -> list[RequestOutput]:
        """Wait for the step that was begun; returns the outputs of the requests that ended."""
        current, self._begun = self._begun, None
        assert current is not None, "no step was begun"
        before, self._ended = self._ended, []
        try:
            token_ids = current.tokens()
        except Exception as error:
            ended = self._fail(current.step, error)
        else:
            end_s = self.clock()
            ended = self.scheduler.update(current.step, token_ids, end_s)
            self._report(current.step, current.start_s, end_s, current.schedule_s)
        return [self._output(request) for request in before + ended]

    def reserve(self, request: Request) -> int | None:
        """A ticket, as of ``DecodeScheduler.reserve``; None refuses one that can never fit."""
        if self.scheduler.residency.why_never(request) is None:
            return self.scheduler.reserve(request)
        self._queue(request)
        return None

    def arrive(self, ticket: int, first_token: int, now_s: float) -> None:
        """See ``DecodeScheduler.arrive``."""
        self._ended += self.scheduler.arrive(ticket, first_token, now_s)

    def withdraw(self, ticket: int, error: str) -> None:
        """See ``DecodeScheduler.withdraw``."""
        self._ended += self.scheduler.withdraw(ticket, error)
