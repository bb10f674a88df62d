"""Ranks are killed, links stall, completions are lost: nobody's answer is, and none comes twice."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from ch15_helpers import Engine, EngineConfig, SamplingParams, load_model
from ch15_helpers.disagg.link import LinkModel
from ch15_helpers.disagg.pipeline import DisaggCluster
from ch15_helpers.disagg.results import DisaggRun
from ch15_helpers.disagg.spec import DisaggSpec

SPEC = DisaggSpec(
    "random:TINY",
    num_prefill=2,
    num_decode=2,
    engine={"num_blocks": 64, "max_num_batched_tokens": 48},
    layers_per_part=1,
    handover_timeout_s=1.0,
    request_timeout_s=30.0,
    beat_s=0.05,
    policy="round_robin",
)
PROMPTS = [[1 + (7 * number + k) % 300 for k in range(60 + 5 * number)] for number in range(8)]
LONG = SamplingParams(max_tokens=150, ignore_eos=True)
SLOW = LinkModel(latency_s=0.25, bandwidth_GBps=1.0)  # so that parts are under way for long


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    """Tokens of a single engine in this process."""
    engine = Engine(load_model("random:TINY", device="cpu"), EngineConfig(num_blocks=256))
    return [output.token_ids for output in engine.generate(PROMPTS, LONG)]


def check(cluster: DisaggCluster, run: DisaggRun, expected: list[list[int]]) -> None:
    """All are answered, rightly, once; and nothing is left behind."""
    assert [output.error for output in run.outputs] == [None] * len(PROMPTS)
    assert [output.token_ids for output in run.outputs] == expected
    assert Counter(output.request_id for output in run.outputs).most_common(1)[0][1] == 1
    assert not cluster.num_open
    cluster.check_drained()


def once(when: Callable[[DisaggCluster], bool], do: Callable[[], None]) -> Callable[..., None]:
    """A hook that does something the first time that something holds."""
    done: list[bool] = []

    def hook(cluster: DisaggCluster) -> None:
        if not done and when(cluster):
            done.append(True)
            do()

    return hook


def test_one_rank_of_each_side_dies_and_then_the_rest(expected: list[list[int]]) -> None:
    with DisaggCluster.launch(SPEC, threads=1) as cluster:
        # A decode rank, while parts are on their way to it and others decode there.
        hook = once(lambda c: c.num_started > c.num_decoding > 0, lambda: cluster.kill(3))
        run = cluster.run(PROMPTS, LONG, network=SLOW, on_poll=hook)
        check(cluster, run, expected)
        assert cluster.alive == [True, True, True, False]
        assert run.num_replaced > 0 and {out.decode_rank for out in run.outputs} == {2}
        assert max(output.num_attempts for output in run.outputs) == 2
        # A prefill rank, before its requests have arrived anywhere.
        hook = once(lambda c: c.num_started > 0, lambda: cluster.kill(0))
        run = cluster.run(PROMPTS, LONG, network=SLOW, on_poll=hook)
        check(cluster, run, expected)
        assert cluster.alive == [False, True, True, False]
        assert run.num_replaced > 0
        # The last decode rank: nobody can answer, and everybody is told why.
        hook = once(lambda c: c.num_decoding > 0, lambda: cluster.kill(2))
        run = cluster.run(PROMPTS, LONG, on_poll=hook)
        assert all("decode rank 2: its process ended" in str(out.error) for out in run.outputs)
        assert not cluster.num_open
        cluster.check_drained()  # the prefill rank that lives


@pytest.fixture(scope="module")
def pair() -> Iterator[DisaggCluster]:
    """One rank of each side, which survive all."""
    spec = {**SPEC.to_dict(), "num_prefill": 1, "num_decode": 1, "max_attempts": 2}
    with DisaggCluster.launch(DisaggSpec.from_dict(spec), threads=1) as cluster:
        yield cluster


@pytest.mark.parametrize("fault", ["stall", "drop_completion"])
def test_a_link_fails_and_the_handover_starts_anew(
    pair: DisaggCluster, expected: list[list[int]], fault: str
) -> None:
    pair.fault(0, fault, count=1)
    run = pair.run(PROMPTS, LONG)
    check(pair, run, expected)
    attempts = [output.num_attempts for output in run.outputs]
    if fault == "stall":  # the decode rank waits in vain, until its deadline
        assert sorted(attempts) == [1] * 7 + [2]
        assert run.ranks[0].num_lost + run.ranks[1].num_lost >= 1
    else:  # everything arrived; only the sender does not know, and keeps the blocks for a while
        assert run.ranks[0].num_lost >= 1


def test_a_completion_is_lost_where_it_matters(
    pair: DisaggCluster, expected: list[list[int]]
) -> None:
    pair.fault(1, "drop_completion", count=1)
    run = pair.run(PROMPTS, LONG)
    check(pair, run, expected)
    assert max(output.num_attempts for output in run.outputs) == 2
    assert run.ranks[1].num_lost == 1


def test_a_request_that_runs_out_of_attempts_or_time_says_why(pair: DisaggCluster) -> None:
    pair.fault(0, "stall", count=100)
    run = pair.run(PROMPTS[:1], LONG)
    assert run.outputs[0].finish_reason == "error"
    assert "2 attempts failed" in str(run.outputs[0].error)
    assert "ended as expired" in str(run.outputs[0].error)
    pair.mend(0)
    assert pair.run(PROMPTS[:1], LONG).outputs[0].error is None
    pair.check_drained()


def test_a_rank_that_hangs_is_given_up(expected: list[list[int]]) -> None:
    spec = DisaggSpec.from_dict({**SPEC.to_dict(), "num_prefill": 1, "silence_s": 1.0})
    with DisaggCluster.launch(spec, threads=1) as cluster:
        pid = cluster.links[2].pid
        hook = once(lambda c: c.num_decoding > 0, lambda: os.kill(pid, signal.SIGSTOP))
        try:
            run = cluster.run(PROMPTS, LONG, on_poll=hook)
            assert [output.token_ids for output in run.outputs] == expected
            assert {output.decode_rank for output in run.outputs} == {1}
            assert cluster.alive == [True, True, False]
        finally:
            os.kill(pid, signal.SIGCONT)
        # It wakes up, drops what was taken from it, and serves again.
        deadline_s = time.monotonic() + 20
        while not all(cluster.alive):
            cluster.stats()
            assert time.monotonic() < deadline_s, "it does not come back"
        run = cluster.run(PROMPTS, LONG)
        check(cluster, run, expected)
        assert {output.decode_rank for output in run.outputs} == {1, 2}
