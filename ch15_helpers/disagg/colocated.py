"""Two engines with pools of their own on one device: prefill and decode, apart but not far.

Prompts are computed by one engine, handed over block by block through a transport, and continued by
the other. Both share the device's time. What the split buys is freedom of schedule: between two
layers of a prompt the decode engine may take a step, so a long prompt holds up nobody for longer
than a few layers. It buys no throughput: the work is the same, and the blocks have to move. On a
GPU they move beside the decode step, on a stream of their own.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from ch15_helpers.disagg.clock import Clock, VirtualClock
from ch15_helpers.disagg.pool import Part, RegisteredPool, refs_of
from ch15_helpers.disagg.recompute import recompute_blocks
from ch15_helpers.disagg.stages import DecodeEngine, PrefillEngine
from ch15_helpers.disagg.transfer import Transfer
from ch15_helpers.disagg.transport import BlockTransport
from ch15_helpers.disagg.wire import LocalHub, Wire
from ch15_helpers.model.transformer import Transformer
from ch15_helpers.serving.config import EngineConfig
from ch15_helpers.serving.engine import StepRecord
from ch15_helpers.serving.intake import Prompt, encode, params_for
from ch15_helpers.serving.request import Request, RequestOutput, SamplingParams
from ch15_helpers.serving.sampling import derive_seed
from ch15_helpers.serving.step import Step

_PREFILL, _DECODE = 0, 1


@dataclass(slots=True)
class Handover:
    """Where the time of one request's handover went.

    Attributes:
        num_bytes: that travelled, tags included.
        num_transfers: as many as the prompt has slices of layers.
        orchestration_s: reserving blocks, naming them, and putting the request on the other side.
        transfer_s: from the start of each transfer to its end, added up.
        pack_s, place_s: of these, digests and copies of the two ends.
        wait_s: from the first token to the start of the first decode step with the request.
        first_step_s: that step.
        num_recomputed: tokens of blocks that did not arrive intact.
    """

    request_id: str
    num_prompt_tokens: int
    num_blocks: int
    num_bytes: int = 0
    num_transfers: int = 0
    orchestration_s: float = 0.0
    transfer_s: float = 0.0
    pack_s: float = 0.0
    place_s: float = 0.0
    wait_s: float | None = None
    first_step_s: float | None = None
    num_recomputed: int = 0

    def count(self, send: Transfer, receive: Transfer) -> None:
        """Add one finished transfer."""
        self.num_bytes += receive.num_bytes
        self.num_transfers += 1
        self.pack_s += send.pack_s
        self.place_s += receive.place_s


@dataclass(slots=True)
class _Prompt:
    """The prompt that is being computed."""

    request: Request
    ticket: int
    handover: Handover
    table: list[int]
    num_sent: int = 0  # layers
    bad: set[int] = field(default_factory=set)  # logical blocks that did not arrive intact


class SplitPools:
    """A prefill engine and a decode engine on one device; requests go in and out as of an Engine.

    One prompt is computed at a time, and only once the decode side has reserved its blocks: prompts
    wait in a queue while that pool is full.

    Attributes:
        prefill, decode: the engines.
        handovers: one for each request so far.
        num_slices: runs of layers after which blocks were sent.
    """

    def __init__(
        self,
        model: Transformer,
        prefill: EngineConfig,
        decode: EngineConfig,
        *,
        slice_work: int | None = None,
        decode_between: bool = True,
        verify: bool = True,
        wrap: Callable[[Wire], Wire] | None = None,
        clock: Clock = time.perf_counter,
        on_step: Callable[[StepRecord], None] | None = None,
    ) -> None:
        """Allocate both pools and join them.

        Args:
            prefill, decode: of the two engines, without prefix caching; ``prefill`` is run with
                whole prompts, one at a time.
            slice_work: tokens times layers of a slice, but one layer at the least; blocks leave
                after each slice. None: all at once, after the last layer.
            decode_between: let the decode engine take a step after each slice.
            verify: check what arrives, and compute again what is not intact.
            wrap: puts something around both wires: a FaultyWire, or the FabricWire of one fabric.
            clock: a VirtualClock counts the modelled network alone; computing takes no time on it.
            on_step: called after each step of the decode engine.

        Raises:
            ValueError: prefix caching is on, or the two have different blocks.
        """
        _check(prefill, decode)
        prefill = replace(
            prefill, max_num_seqs=1, enable_chunked_prefill=False, capture_decode=False
        )
        decode = replace(decode, capture_prompts=False)  # it has none
        self.model, self.clock = model, clock
        self.prefill = PrefillEngine(model, prefill, clock=clock)
        self.decode = DecodeEngine(model, decode, clock=clock, on_step=self._after_decode)
        self.prefill.runner.on_layer = self._layer_done
        self.handovers: list[Handover] = []
        self.num_slices = 0
        self._slice_work, self._decode_between, self._on_step = slice_work, decode_between, on_step
        self._queue: deque[Request] = deque()
        self._arriving: dict[str, tuple[Handover, float]] = {}  # and when its first token came
        self._prompt: _Prompt | None = None
        self._ended: list[RequestOutput] = []  # of decode steps within a prompt
        self._num_requests = 0
        on_gpu = model.device.type == "cuda"
        self._beside = torch.cuda.Stream(model.device) if on_gpu else None  # type: ignore[no-untyped-call]
        hub = LocalHub(2, model.device)
        wires: list[Wire] = [hub.wire(_PREFILL), hub.wire(_DECODE)]
        wires = wires if wrap is None else [wrap(wire) for wire in wires]
        self._ends = [BlockTransport(wire, clock=clock, verify=verify) for wire in wires]
        pools = [RegisteredPool(engine.cache) for engine in (self.prefill, self.decode)]
        for end, pool in zip(self._ends, pools, strict=True):
            end.register(pool)
        self._whole: Part = pools[_DECODE].whole

    # ---- as an Engine ----------------------------------------------------------------------

    @property
    def has_unfinished(self) -> bool:
        """Whether ``step`` has anything to do or to hand out."""
        return bool(self._queue or self._ended) or self.decode.has_unfinished

    def add_request(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        request_id: str | None = None,
        arrival_s: float | None = None,
    ) -> str:
        """Queue one request; returns its id. As for ``Engine``."""
        tokens = encode(self.model, prompt, "the prompt")
        number, params = self._num_requests, params or SamplingParams()
        self._num_requests += 1
        seed = derive_seed(self.decode.config.seed, number) if params.seed is None else params.seed
        request = Request(
            request_id=f"request-{number}" if request_id is None else request_id,
            prompt_token_ids=tokens,
            params=params,
            arrival_s=self.clock() if arrival_s is None else arrival_s,
            eos_token_ids=self.model.config.eos_token_ids,
            seed=seed,
        )
        self._queue.append(request)
        return request.request_id

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Continue every prompt; returns the outputs in the order of the prompts."""
        each = params_for(len(prompts), params)
        names = [self.add_request(p, some) for p, some in zip(prompts, each, strict=True)]
        outputs: dict[str, RequestOutput] = {}
        while self.has_unfinished:
            outputs |= {output.request_id: output for output in self.step()}
        return [outputs[name] for name in names]

    def step(self) -> list[RequestOutput]:
        """Compute one prompt, with decode steps between its layers; or take a decode step.

        Returns the outputs of the requests that ended.
        """
        if self._queue and self._may_start(self._queue[0]):
            self._run_prompt(self._queue.popleft())
        elif self.decode.has_unfinished:
            self._ended += self.decode.step()
        ended, self._ended = self._ended, []
        return ended

    def check_invariants(self) -> None:
        """Raise AssertionError when a side is inconsistent."""
        self.prefill.check_invariants()
        self.decode.check_invariants()
        for end in self._ends:
            end.check_invariants()

    # ---- inside ----------------------------------------------------------------------------

    def _may_start(self, request: Request) -> bool:
        # With nobody there to give blocks back, the watermark and the next token do not matter.
        scheduler = self.decode.scheduler
        return scheduler.can_reserve(request) or not scheduler.num_running

    def _run_prompt(self, request: Request) -> None:
        began_s = self.clock()
        ticket = self.decode.reserve(request)
        if ticket is None:
            return
        request.first_scheduled_s = began_s
        table = self.decode.scheduler.blocks.table(request.request_id)
        handover = Handover(request.request_id, request.num_prompt_tokens, len(table))
        self.handovers.append(handover)
        self._prompt = _Prompt(request, ticket, handover, table)
        handover.orchestration_s = self.clock() - began_s
        first = replace(request.params, max_tokens=1, seed=request.seed)
        self.prefill.add_request(request.prompt_token_ids, first, request.request_id)
        (output,) = self.prefill.step()
        self._go_on(self._prompt, output)
        self._prompt = None

    def _go_on(self, prompt: _Prompt, output: RequestOutput) -> None:
        """The prompt is computed: let the decode side continue from its first token."""
        first_s, handover = self.clock(), prompt.handover
        if output.error is not None:
            self.decode.withdraw(prompt.ticket, output.error)
            return
        assert prompt.num_sent == self.model.config.num_hidden_layers, "a layer was not reported"
        if prompt.bad:
            handover.num_recomputed = recompute_blocks(
                self.model,
                self.decode.cache,
                prompt.table,
                prompt.request.prompt_token_ids,
                sorted(prompt.bad),
                attention_backend=self.decode.config.attention_backend,
            )
        began_s = self.clock()
        self._arriving[prompt.request.request_id] = handover, first_s
        self.decode.arrive(prompt.ticket, output.token_ids[0], first_s)
        handover.orchestration_s += self.clock() - began_s

    def _layer_done(self, step: Step, layer: int) -> None:
        """Send the layers that are complete; then it is the decode engine's turn."""
        prompt = self._prompt
        assert prompt is not None
        assert len(step.chunks) == 1, "one prompt at a time"
        layers, work = self.model.config.num_hidden_layers, self._slice_work
        tokens = prompt.request.num_prompt_tokens
        at_once = layers if work is None else max(1, work // tokens)
        if layer + 1 < layers and (layer + 1) % at_once:
            return
        source = self.prefill.scheduler.blocks.table(prompt.request.request_id)
        turn = self._decode_between and self.decode.scheduler.has_runnable
        if turn and self._beside is not None:
            self._hand_over_beside(self._beside, prompt, source, layer)
            return
        self._hand_over(prompt, source, layer)
        if turn:
            self._ended += self.decode.step()

    def _hand_over_beside(
        self, beside: torch.cuda.Stream, prompt: _Prompt, source: list[int], layer: int
    ) -> None:
        """The blocks leave while the decode step runs: it reads other ones."""
        main = torch.cuda.current_stream(self.model.device)
        computed = main.record_event()
        self.decode.begin()
        try:
            with torch.cuda.stream(beside):
                beside.wait_event(computed)
                self._hand_over(prompt, source, layer)
        finally:
            main.wait_stream(beside)
            self._ended += self.decode.finish()

    def _hand_over(self, prompt: _Prompt, source: list[int], layer: int) -> None:
        began_s = self.clock()
        part = replace(self._whole, layers=(prompt.num_sent, layer + 1))
        sequence, channel = len(self.handovers), self.num_slices
        theirs, ours = refs_of(prompt.table, sequence), refs_of(source, sequence)
        started_s = self.clock()
        prefill, decode = self._ends
        receive = decode.receive(theirs, source=_PREFILL, channel=channel, part=part)
        send = prefill.send(ours, to=_DECODE, channel=channel, part=part)
        self._settle(send, receive)
        ended_s = self.clock()
        prompt.num_sent = layer + 1
        prompt.bad.update(receive.to_recompute)
        self.num_slices += 1
        prompt.handover.count(send, receive)
        prompt.handover.orchestration_s += started_s - began_s
        prompt.handover.transfer_s += ended_s - started_s

    def _settle(self, *transfers: Transfer) -> None:
        """Let both ends make progress: each may need what the other has still to start."""
        while True:
            for end in self._ends:
                end.poll()
            if all(transfer.done for transfer in transfers):
                return
            if isinstance(self.clock, VirtualClock):
                events = [end.wire.next_event_s() for end in self._ends]
                due = [s for s in events if s is not None] or [t.deadline_s for t in transfers]
                self.clock.advance_to(min(due))

    def _after_decode(self, record: StepRecord) -> None:
        if self._arriving:
            for request in record.step.decodes:
                handover, first_s = self._arriving.pop(request.request_id, (None, 0.0))
                if handover is not None:
                    handover.wait_s = record.start_s - first_s
                    handover.first_step_s = record.end_s - record.start_s
        if self._on_step is not None:
            self._on_step(record)


def _check(prefill: EngineConfig, decode: EngineConfig) -> None:
    if prefill.enable_prefix_caching or decode.enable_prefix_caching:
        raise ValueError(
            "two pools on one device keep no prefixes; set enable_prefix_caching=False in both"
        )
    for name in ("block_size", "kv_dtype"):
        ours, theirs = getattr(prefill, name), getattr(decode, name)
        if ours != theirs:
            raise ValueError(
                f"{name} is {ours!r} on the prefill side and {theirs!r} on the decode side; "
                "blocks are handed over as they are, so both need the same"
            )
