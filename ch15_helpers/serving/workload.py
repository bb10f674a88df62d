"""Workloads: which requests arrive when, how long they are, and what they share.

A workload is plain data, made before the run and independent of the system under test (open
loop), so that the same one drives the engine (``loadgen``) and the simulator. Prompts are made of
*segments* with an id: equal ids are equal tokens, which is how conversations and traces with
block hashes share prefixes.

The two defaults reproduce published marginals of the Azure LLM inference traces of 2023
(Patel et al., "Splitwise", ISCA 2024; the numbers are medians and means of the public files):
rate, burstiness and both lengths. Context and output are drawn independently; in the traces the
correlation of their logarithms is 0.09 (conversation) and 0.00 (code).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ch15_helpers.errors import WorkloadError
from ch15_helpers.serving.distributions import (
    Arrivals,
    Gamma,
    Hyperexponential,
    Lengths,
    LogNormal,
    gap_cv,
)
from ch15_helpers.serving.metrics import Percentiles, percentiles
from ch15_helpers.serving.request import SLO, SamplingParams

Segment = tuple[int, int]
"""(content id, number of tokens)."""


@dataclass(frozen=True, slots=True)
class WorkloadRequest:
    """One request to come.

    Attributes:
        arrival_s: since the start of the workload.
        num_prompt_tokens, num_output_tokens: at least 1 each; the output is exactly that long.
        segments: what the prompt is made of, in order; empty is content of its own.
        session, turn: which conversation and which turn of it; -1 is none.
        priority, slo: see ``Request``.
    """

    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    segments: tuple[Segment, ...] = ()
    session: int = -1
    turn: int = 0
    priority: int = 0
    slo: SLO | None = None

    def __post_init__(self) -> None:
        if self.num_prompt_tokens < 1 or self.num_output_tokens < 1:
            raise WorkloadError(
                f"a request needs at least one prompt and one output token, got "
                f"{self.num_prompt_tokens} and {self.num_output_tokens}"
            )
        if self.segments and sum(n for _, n in self.segments) != self.num_prompt_tokens:
            raise WorkloadError(
                f"the segments {self.segments} do not add up to {self.num_prompt_tokens} tokens"
            )

    @property
    def params(self) -> SamplingParams:
        """Greedy, to exactly the length asked for."""
        return SamplingParams(max_tokens=self.num_output_tokens, ignore_eos=True)


@dataclass(frozen=True)
class WorkloadStats:
    """What a workload comes to: ``gap_cv`` is the burstiness (CV of the gaps, 1 for Poisson)."""

    num_requests: int
    duration_s: float
    rate_per_s: float
    gap_cv: float
    gap_s: Percentiles
    prompt_tokens: Percentiles
    output_tokens: Percentiles


@dataclass(frozen=True)
class Workload:
    """Requests in order of arrival.

    Attributes:
        name: for tables and figures.
        requests: in order of ``arrival_s``.
        seed: decides the content of the prompts.
    """

    name: str
    requests: tuple[WorkloadRequest, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        arrivals = [request.arrival_s for request in self.requests]
        if any(later < earlier for earlier, later in itertools.pairwise(arrivals)):
            raise WorkloadError(f"the requests of {self.name!r} are not in order of arrival")

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[WorkloadRequest]:
        return iter(self.requests)

    def head(self, count: int) -> Workload:
        """The first ``count`` requests."""
        return replace(self, requests=self.requests[:count])

    def map(self, change: Callable[[WorkloadRequest], WorkloadRequest]) -> Workload:
        """Change every request; for priorities and SLOs together with ``dataclasses.replace``."""
        return replace(self, requests=tuple(map(change, self.requests)))

    def scaled(self, *, rate: float = 1.0, prompt: float = 1.0, output: float = 1.0) -> Workload:
        """Arrivals ``rate`` times as fast, lengths times ``prompt`` and ``output``.

        Burstiness, the shape of the length distributions and shared prefixes stay as they are.
        """

        def change(request: WorkloadRequest) -> WorkloadRequest:
            segments = tuple((name, _scale(n, prompt)) for name, n in request.segments)
            tokens = sum(n for _, n in segments) or _scale(request.num_prompt_tokens, prompt)
            return replace(
                request,
                arrival_s=request.arrival_s / rate,
                num_prompt_tokens=tokens,
                num_output_tokens=_scale(request.num_output_tokens, output),
                segments=segments,
            )

        return self.map(change)

    def clipped(self, max_prompt_tokens: int, max_output_tokens: int) -> Workload:
        """Prompts cut at the end and outputs cut, so that they fit a model's context."""

        def change(request: WorkloadRequest) -> WorkloadRequest:
            tokens = min(request.num_prompt_tokens, max_prompt_tokens)
            return replace(
                request,
                num_prompt_tokens=tokens,
                num_output_tokens=min(request.num_output_tokens, max_output_tokens),
                segments=_cut(request.segments, tokens),
            )

        return self.map(change)

    def prompt(self, index: int, vocab_size: int) -> list[int]:
        """Token ids of one prompt: random, but equal where segment ids are equal."""
        request = self.requests[index]
        # Content of its own gets an id that no segment has.
        segments = request.segments or ((-1 - index, request.num_prompt_tokens),)
        parts = [_content(self.seed, name, length, vocab_size) for name, length in segments]
        tokens: list[int] = np.concatenate(parts).tolist()
        return tokens

    @cached_property
    def stats(self) -> WorkloadStats:
        """Rate, burstiness and lengths."""
        arrivals = np.array([request.arrival_s for request in self.requests])
        gaps = np.diff(arrivals)
        duration_s = float(gaps.sum())
        return WorkloadStats(
            num_requests=len(self),
            duration_s=duration_s,
            rate_per_s=len(gaps) / duration_s if duration_s > 0 else np.inf,
            gap_cv=gap_cv(arrivals),
            gap_s=percentiles(gaps.tolist()),
            prompt_tokens=percentiles([float(r.num_prompt_tokens) for r in self.requests]),
            output_tokens=percentiles([float(r.num_output_tokens) for r in self.requests]),
        )

    def shared_fraction(self) -> float:
        """Fraction of prompt tokens in a prefix of segments that an earlier request had too.

        It is what an unlimited prefix cache would find.
        """
        seen: set[tuple[int, ...]] = set()
        shared = total = 0
        for request in self.requests:
            total += request.num_prompt_tokens
            state, known = 0, True
            for name, length in request.segments:
                state = hash((state, name, length))
                known = known and (state,) in seen
                shared += length if known else 0
                seen.add((state,))
        return shared / total if total else 0.0


def synthetic(
    name: str,
    arrivals: Arrivals,
    prompt_tokens: Lengths,
    output_tokens: Lengths,
    count: int,
    seed: int = 0,
) -> Workload:
    """Independent requests. Times, prompts and outputs each have a random stream of their own.

    So a change of one leaves the others as they were (common random numbers): two rates are
    compared on the same lengths.
    """
    times, prompts, outputs = (np.random.default_rng(s) for s in _streams(seed, 3))
    columns = zip(
        arrivals.times_s(count, times).tolist(),
        prompt_tokens.sample(count, prompts).tolist(),
        output_tokens.sample(count, outputs).tolist(),
        strict=True,
    )
    return Workload(name, tuple(WorkloadRequest(*column) for column in columns), seed)


def azure_conversation(count: int, seed: int = 0, rate_per_s: float = 5.53) -> Workload:
    """Like the Azure 2023 conversation trace: median context 1020, output 129, CV 1.09."""
    return synthetic(
        "Azure-like conversation",
        Gamma(rate_per_s, cv=1.09),
        LogNormal.from_median_and_mean(1020, 1155, maximum=14050),
        LogNormal.from_median_and_mean(129, 211, maximum=1000),
        count,
        seed,
    )


def azure_code(count: int, seed: int = 0, rate_per_s: float = 2.57) -> Workload:
    """Like the Azure 2023 code trace: median context 1469, output 13, CV 13.2.

    The CV comes from a few pauses of minutes between busy spells, hence the mixture; its third
    parameter is the trace's median gap, 0.164 of the mean.
    """
    return synthetic(
        "Azure-like code",
        Hyperexponential(rate_per_s, cv=13.2, median_gap_s=0.164 / rate_per_s),
        LogNormal.from_median_and_mean(1469, 2048, maximum=7437),
        LogNormal.from_median_and_mean(13, 27.9, maximum=1899),
        count,
        seed,
    )


def multi_turn(
    arrivals: Arrivals,
    turns: Lengths,
    user_tokens: Lengths,
    answer_tokens: Lengths,
    sessions: int,
    *,
    system_tokens: int = 0,
    think_s: float = 10.0,
    seed: int = 0,
) -> Workload:
    """Conversations: each turn's prompt is the whole conversation so far and a new message.

    Args:
        arrivals: when sessions start.
        turns: how many turns a session has.
        user_tokens, answer_tokens: per turn.
        system_tokens: a prefix that all sessions share.
        think_s: mean of the exponential time from one turn's arrival to the next. It does not
            wait for the answer (open loop); choose it above the latency that you expect.

    The answers in later prompts are as long as the earlier outputs, but their tokens are made up,
    as when a recorded conversation is replayed.
    """
    starts, counts, users, answers, gaps = (np.random.default_rng(s) for s in _streams(seed, 5))
    found: list[WorkloadRequest] = []
    content = 1
    begin_s = arrivals.times_s(sessions, starts).tolist()
    for session, num_turns in enumerate(turns.sample(sessions, counts).tolist()):
        prompt: tuple[Segment, ...] = ((0, system_tokens),) if system_tokens else ()
        now_s = begin_s[session]
        user = user_tokens.sample(num_turns, users).tolist()
        answer = answer_tokens.sample(num_turns, answers).tolist()
        for turn in range(num_turns):
            prompt = (*prompt, (content, user[turn]))
            size = sum(n for _, n in prompt)
            found.append(WorkloadRequest(now_s, size, answer[turn], prompt, session, turn))
            prompt = (*prompt, (content + 1, answer[turn]))
            content += 2
            now_s += think_s * gaps.standard_exponential()
    found.sort(key=lambda request: request.arrival_s)
    return Workload("multi-turn", tuple(found), seed)


def _streams(seed: int, count: int) -> list[np.random.SeedSequence]:
    return np.random.SeedSequence(seed).spawn(count)


def _scale(tokens: int, factor: float) -> int:
    return max(1, round(tokens * factor))


def _cut(segments: tuple[Segment, ...], tokens: int) -> tuple[Segment, ...]:
    kept: list[Segment] = []
    for name, length in segments:
        if tokens <= 0:
            break
        kept.append((name, min(length, tokens)))
        tokens -= length
    return tuple(kept)


def _content(seed: int, name: int, length: int, vocab_size: int) -> np.ndarray:
    """``length`` token ids that depend on seed and name alone; longer ones continue shorter."""
    return np.random.default_rng([seed, abs(name), int(name < 0)]).integers(
        0, vocab_size, length, dtype=np.int64
    )
