"""One request: what was asked, what was generated, when, and how it ended."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, cast

from ch15_helpers.errors import InvalidRequestError
from ch15_helpers.serving.content import NamedText

if TYPE_CHECKING:
    from ch15_helpers.kv.prefix import CachedBlock

INVALID_TOKEN = -1
"""What the sampler returns for a row whose logits are not finite; no vocabulary has it."""
PENDING_TOKEN = -2
"""Stands for a token that a running step is about to sample; see ``Lookahead``."""


class RequestStatus(Enum):
    """Where a request is. RUNNING and LOADING ones alone hold KV blocks on the device."""

    WAITING = "waiting"
    LOADING = "loading"  # part of its prefix is on its way from a lower tier
    RUNNING = "running"
    PREEMPTED = "preempted"  # will be recomputed
    SWAPPED = "swapped"  # its blocks are in the host pool
    FINISHED = "finished"


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt.

    Attributes:
        max_tokens: most tokens to generate, at least 1.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of most likely tokens with at least this probability
            (nucleus sampling, Holtzman et al. 2020), in (0, 1].
        seed: makes the request reproducible whatever runs beside it; None derives one from the
            engine's seed and the request's number.
        ignore_eos: go on past the model's end-of-sequence tokens.
        stop_token_ids: further tokens that end the request; the token itself is kept.

    Raises:
        InvalidRequestError: a value makes no sense.
    """

    max_tokens: int = 16
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not _is_int(self.max_tokens) or self.max_tokens < 1:
            raise _invalid("max_tokens", self.max_tokens, "a whole number of at least 1")
        if not _is_number(self.temperature) or self.temperature < 0:
            raise _invalid("temperature", self.temperature, "a finite number of at least 0")
        if not _is_int(self.top_k) or self.top_k < 0:
            raise _invalid("top_k", self.top_k, "a whole number of at least 0 (0 keeps all)")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise _invalid("top_p", self.top_p, "a number in (0, 1]")
        if self.seed is not None and not _is_int(self.seed):
            raise _invalid("seed", self.seed, "None or a whole number")
        stop = tuple(self.stop_token_ids)
        if not all(_is_int(token) and token >= 0 for token in stop):
            raise _invalid("stop_token_ids", stop, "token ids")
        object.__setattr__(self, "stop_token_ids", stop)


@dataclass(frozen=True)
class SLO:
    """Service level objective of one request: both limits must hold for it to count.

    Attributes:
        ttft_s: limit of the time to first token, from arrival.
        tpot_s: limit of the time per output token after the first.
    """

    ttft_s: float
    tpot_s: float

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tpot_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    def met_by(self, output: RequestOutput) -> bool:
        """Whether the request completed within both limits (one token alone has no TPOT)."""
        ttft_s, tpot_s = output.metrics.ttft_s, output.metrics.tpot_s
        if output.finish_reason not in ("stop", "length") or ttft_s is None:
            return False
        return ttft_s <= self.ttft_s and (tpot_s is None or tpot_s <= self.tpot_s)


@dataclass(frozen=True)
class RequestMetrics:
    """Latencies of one request in seconds; None where it never got that far.

    Attributes:
        ttft_s: time to first token, from arrival.
        tpot_s: time per output token after the first: (last - first) / (tokens - 1).
        itl_s: inter-token latencies, one for each token after the first.
        e2e_s: from arrival to the last token.
        queue_s: from arrival to the first step that worked on the request.
        num_preemptions: how often the request lost its KV blocks to another.
        num_cached_tokens: prompt tokens that were found in the prefix cache or in its tiers.
    """

    ttft_s: float | None
    tpot_s: float | None
    itl_s: list[float]
    e2e_s: float | None
    queue_s: float | None
    num_preemptions: int = 0
    num_cached_tokens: int = 0


@dataclass(eq=False, slots=True)
class Request:
    """A request inside the scheduler. Mutable; the scheduler owns it until it is finished.

    ``num_computed_tokens`` counts tokens whose K and V are in the cache. A request whose prompt is
    computed always has exactly one known token that is not computed: the one sampled last.

    ``slo`` and ``priority`` (a smaller number is served earlier, as in vLLM) are what the caller
    was promised, not how to continue the prompt; only some policies look at them.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    arrival_s: float = 0.0
    eos_token_ids: tuple[int, ...] = ()
    seed: int = 0
    priority: int = 0
    slo: SLO | None = None
    output_token_ids: list[int] = field(default_factory=list)
    token_times_s: list[float] = field(default_factory=list)
    num_computed_tokens: int = 0
    status: RequestStatus = RequestStatus.WAITING
    finish_reason: str | None = None
    error: str | None = None
    first_scheduled_s: float | None = None
    num_preemptions: int = 0
    # Set by the scheduler:
    ordinal: int = -1  # order of arrival
    rank: float = 0.0  # place in the queue, from Policy.rank; smaller is earlier
    slot: int = -1  # row of BlockManager.tables while RUNNING
    max_output_tokens: int = 0  # max_tokens, or less where the model's context ends
    event_at: int = 0  # computed tokens at which something other than one more token happens
    host_blocks: list[int] = field(default_factory=list)
    stop_ids: frozenset[int] = frozenset()
    path: list[CachedBlock] = field(default_factory=list)  # cached blocks of its first tokens
    num_shared_blocks: int = 0  # of them, those that it did not compute itself
    num_cached_tokens: int = 0

    def __post_init__(self) -> None:
        eos = () if self.params.ignore_eos else self.eos_token_ids
        self.stop_ids = frozenset((*self.params.stop_token_ids, *eos, INVALID_TOKEN))
        self.max_output_tokens = self.params.max_tokens

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Known tokens: prompt and output."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def is_finished(self) -> bool:
        """Whether the request has ended, well or not."""
        return self.status is RequestStatus.FINISHED

    def tokens(self, start: int, stop: int) -> list[int]:
        """Known tokens ``start .. stop - 1``, over prompt and output alike."""
        split = len(self.prompt_token_ids)
        if stop <= split:
            return self.prompt_token_ids[start:stop]
        if start >= split:
            return self.output_token_ids[start - split : stop - split]
        return self.prompt_token_ids[start:] + self.output_token_ids[: stop - split]

    def content(self, start: int, stop: int) -> tuple[Any, ...]:
        """What tokens ``start .. stop - 1`` say; equal tuples are equal text."""
        prompt = cast("Sequence[int]", self.prompt_token_ids)
        if isinstance(prompt, NamedText):
            return prompt.content(start, stop)
        return tuple(self.tokens(start, stop))

    def take_over(self, parent: Request) -> None:
        """Continue from where ``parent`` is now (a fork); parameters and arrival stay our own."""
        self.prompt_token_ids = parent.prompt_token_ids[:]
        self.output_token_ids = list(parent.output_token_ids)
        self.token_times_s = list(parent.token_times_s)
        self.num_computed_tokens = parent.num_computed_tokens
        self.num_shared_blocks = parent.num_shared_blocks
        self.num_cached_tokens = parent.num_cached_tokens
        self.first_scheduled_s = parent.first_scheduled_s

    def metrics(self) -> RequestMetrics:
        """Latencies so far, from the recorded times."""
        times = self.token_times_s
        queued = self.first_scheduled_s
        return RequestMetrics(
            ttft_s=times[0] - self.arrival_s if times else None,
            tpot_s=(times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None,
            itl_s=[later - earlier for earlier, later in itertools.pairwise(times)],
            e2e_s=times[-1] - self.arrival_s if times else None,
            queue_s=None if queued is None else queued - self.arrival_s,
            num_preemptions=self.num_preemptions,
            num_cached_tokens=self.num_cached_tokens,
        )


@dataclass(frozen=True)
class RequestOutput:
    """What the engine hands back for one request.

    Attributes:
        token_ids: generated tokens, an ending stop token included.
        text: their text without special tokens; empty when the model has no tokenizer.
        finish_reason: ``stop``, ``length``, ``abort`` or ``error``.
        error: what went wrong when ``finish_reason`` is ``error``.
    """

    request_id: str
    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: str
    error: str | None
    metrics: RequestMetrics


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _invalid(name: str, value: object, expected: str) -> InvalidRequestError:
    return InvalidRequestError(f"{name} is {value!r}; it must be {expected}")
