"""Conversations like those of Mooncake's trace, made up, for load that must run anywhere.

The trace (Qin et al., FAST 2025, one hour of Kimi's conversations, 12,031 requests) is data that
this project does not hold. Its marginals are few numbers, and this module draws from them.
"""

from __future__ import annotations

import numpy as np

from ch15_helpers.serving.distributions import Lengths, LogNormal, Poisson, Uniform
from ch15_helpers.serving.workload import Segment, Workload, WorkloadRequest

SYSTEM_TOKENS = 512
"""All requests of the trace begin with the same block."""
FOLLOW_UP_SHARE = 0.35
"""Share of requests that continue an earlier one: 1.54 turns to a conversation. (38.7 % do in the
trace, some of them from the middle of what was said before.)"""
SESSIONS_PER_S = 2.2
"""Conversations that begin in a second."""
THINK_S = 215.0
"""Mean time from one turn's arrival to the next."""

# Tokens beyond the system prompt: of a first turn, of what a later turn adds, and of an answer.
FIRST: Lengths = LogNormal.from_median_and_mean(4_900, 9_900, maximum=120_000)
LATER: Lengths = LogNormal.from_median_and_mean(600, 3_100, maximum=120_000)
ANSWER: Lengths = Uniform(1, 690)


def mooncake_like(
    sessions: int, seed: int = 0, *, rate: float = 1.0, name: str = "Mooncake-like"
) -> Workload:
    """Conversations with the trace's marginals: lengths, turns, shared prefix, time between turns.

    Sessions begin as a Poisson process, later turns come at exponential intervals, and nothing is
    correlated. An infinite cache then hits as large a share of blocks of 512 tokens as in the
    trace (36.6 %), and a finite one close to it (a test compares them where the trace is there).

    Args:
        sessions: conversations; about 1.54 times as many requests.
        rate: of sessions, relative to the trace's.
    """
    streams = [np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(6)]
    begin_s = Poisson(SESSIONS_PER_S * rate).times_s(sessions, streams[0])
    turns = streams[1].geometric(1 - FOLLOW_UP_SHARE, sessions)
    first = FIRST.sample(sessions, streams[2])
    found: list[WorkloadRequest] = []
    content = 1
    for session in range(sessions):
        count, now_s = int(turns[session]), float(begin_s[session])
        later = LATER.sample(count, streams[3]).tolist()
        answers = ANSWER.sample(count, streams[4]).tolist()
        prompt: tuple[Segment, ...] = ((0, SYSTEM_TOKENS),)
        for turn in range(count):
            new = later[turn] if turn else int(first[session])
            prompt = (*prompt, (content, new))
            size = sum(length for _, length in prompt)
            found.append(WorkloadRequest(now_s, size, answers[turn], prompt, session, turn))
            prompt = (*prompt, (content + 1, answers[turn]))
            content += 2
            now_s += THINK_S * float(streams[5].standard_exponential())
    found.sort(key=lambda request: request.arrival_s)
    return Workload(name, tuple(found), seed)
