"""Real replica processes: the tokens of one engine, whoever dies meanwhile, each answered once."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from ch15_helpers import Engine, EngineConfig, SamplingParams, load_model
from ch15_helpers.errors import ReplicaError
from ch15_helpers.serving.replica_pool import ReplicaPool
from ch15_helpers.serving.replica_spec import ReplicaOutput, ReplicaSpec

SPEC = ReplicaSpec("random:TINY", engine={"num_blocks": 256}, beat_s=0.05)
PROMPTS = [[1 + (7 * number + k) % 300 for k in range(5 + 3 * number)] for number in range(10)]
SHORT = SamplingParams(max_tokens=12, ignore_eos=True)
LONG = SamplingParams(max_tokens=400, ignore_eos=True)


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    """Tokens of a single engine in this process."""
    engine = Engine(load_model("random:TINY", device="cpu"), EngineConfig(num_blocks=256))
    return [output.token_ids for output in engine.generate(PROMPTS, LONG)]


@pytest.fixture(scope="module")
def pool() -> Iterator[ReplicaPool]:
    """Two replicas that no test kills."""
    with ReplicaPool.launch(SPEC, 2, "round_robin") as pool:
        yield pool


def is_running(pid: int) -> bool:
    """Whether a process is there and not a zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_all_are_gone(pids: list[int]) -> None:
    deadline_s = time.monotonic() + 10
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline_s, "processes are left behind"
        time.sleep(0.02)


def work_until_tokens(pool: ReplicaPool, count: int) -> list[ReplicaOutput]:
    """Poll until that many open requests have a first token, so that work is under way."""
    ended: list[ReplicaOutput] = []
    while pool.num_started() < count:
        ended += pool.poll(0.2)
        assert pool.num_open, "all ended before the accident"
    return ended


def collect(pool: ReplicaPool, ended: list[ReplicaOutput], count: int) -> list[ReplicaOutput]:
    """The rest of the answers; fails when one comes twice."""
    deadline_s = time.monotonic() + 60
    while len(ended) < count:
        ended += pool.poll(0.2)
        assert time.monotonic() < deadline_s, "requests are lost"
    assert not pool.poll(0.0)
    assert len({output.request_id for output in ended}) == count
    return sorted(ended, key=lambda output: output.request_id)


@pytest.mark.parametrize("policy", ["round_robin", "kv_aware", "power_of_two"])
def test_tokens_are_those_of_one_engine(
    pool: ReplicaPool, expected: list[list[int]], policy: str
) -> None:
    pool.reset(policy)
    answers = pool.serve(PROMPTS, SHORT, max_open=6)
    assert [answer.token_ids for answer in answers] == [tokens[:12] for tokens in expected]
    assert {answer.replica for answer in answers} == {0, 1}
    assert all(answer.num_attempts == 1 and answer.error is None for answer in answers)
    assert all(0 < (a.ttft_s or 0) <= (a.e2e_s or 0) for a in answers)
    pool.router.check_invariants()
    assert not pool.num_open
    assert not sum(pool.router.loads.outstanding)


def test_sampled_tokens_do_not_depend_on_the_replica(pool: ReplicaPool) -> None:
    warm = SamplingParams(max_tokens=12, temperature=1.0, ignore_eos=True, seed=5)
    pool.reset("round_robin")
    first = pool.serve([PROMPTS[3]] * 4, warm)
    assert {answer.replica for answer in first} == {0, 1}
    assert len({tuple(answer.token_ids) for answer in first}) == 1
    without = pool.serve([PROMPTS[3]] * 2, SamplingParams(max_tokens=12, temperature=1.0))
    assert without[0].token_ids != without[1].token_ids


def test_a_wrong_request_fails_alone(pool: ReplicaPool, expected: list[list[int]]) -> None:
    pool.reset("round_robin")
    prompts = [PROMPTS[0], [10**6], [], [1] * 5000, PROMPTS[1]]
    answers = pool.serve(prompts, SHORT)
    assert [answer.finish_reason for answer in answers] == ["length", *["error"] * 3, "length"]
    assert "1000000" in (answers[1].error or "")
    assert "empty" in (answers[2].error or "")
    assert "5000 tokens" in (answers[3].error or "")
    assert [answers[0].token_ids, answers[4].token_ids] == [t[:12] for t in expected[:2]]


def wait_for_late_answers(pool: ReplicaPool, replica: int, count: int) -> None:
    """Until a replica has sent that many answers, which the pool does not read meanwhile."""
    deadline_s = time.monotonic() + 60
    arrived = b""
    while arrived.count(b'"op":"done"') < count:
        assert time.monotonic() < deadline_s, "no late answers"
        time.sleep(0.02)
        arrived = pool.links[replica].channel._socket.recv(1 << 20, socket.MSG_PEEK)


def test_a_replica_that_hangs_is_replaced_and_its_late_answers_are_dropped(
    pool: ReplicaPool, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped, not dead: it goes on and answers, after others have answered for it."""
    pool.reset("round_robin")
    monkeypatch.setattr(pool, "deadline_s", 1.0)
    late = pool.num_late_answers
    for prompt in PROMPTS:
        pool.submit(prompt, LONG)
    ended = work_until_tokens(pool, 10)
    os.kill(pool.links[1].pid, signal.SIGSTOP)
    try:
        answers = collect(pool, ended, 10)
    finally:
        os.kill(pool.links[1].pid, signal.SIGCONT)
    monkeypatch.undo()
    assert [answer.token_ids for answer in answers] == expected
    moved = [answer for answer in answers if answer.num_attempts == 2]
    assert moved and all(answer.replica == 0 for answer in moved)
    wait_for_late_answers(pool, 1, len(moved))
    assert not pool.poll()
    assert pool.num_late_answers == late + len(moved)
    assert pool.router.loads.alive[1], "it is not welcomed back"
    pool.router.check_invariants()
    again = pool.serve(PROMPTS[:4], SHORT)
    assert [answer.token_ids for answer in again] == [tokens[:12] for tokens in expected[:4]]
    assert {answer.replica for answer in again} == {0, 1}


def test_an_answer_counts_once(pool: ReplicaPool) -> None:
    """The same answer again, and the answer of an attempt that was never made."""
    pool.reset("round_robin")
    before = pool.num_late_answers
    number = pool.submit(PROMPTS[0], SHORT)
    attempt_id, output = next(iter(pool._open.items()))
    answers = collect(pool, [], 1)
    done = {"op": "done", "attempt": attempt_id, "token_ids": [1], "finish_reason": "length"}
    done |= {"error": None, "cached": 0, "steps": 1, "prompt_tokens": 1, "busy_s": 0.0}
    pool._done(pool.links[1], done)
    pool._done(pool.links[0], done | {"attempt": 10**9})
    assert not pool.poll()
    assert answers == [output]
    assert output.request_id == number
    assert output.token_ids != [1]
    assert pool.num_late_answers == before + 2


def test_a_damaged_cache_changes_the_tokens(pool: ReplicaPool, expected: list[list[int]]) -> None:
    """The comparison above can fail, and where it does it names the replica."""
    pool.reset("round_robin")
    for prompt in PROMPTS:
        pool.submit(prompt, LONG)
    ended = work_until_tokens(pool, 10)
    pool.damage(0)
    for answer in collect(pool, ended, 10):
        assert (answer.token_ids == expected[PROMPTS.index(answer.prompt)]) == (answer.replica == 1)


def test_killed_replicas_lose_no_request(expected: list[list[int]]) -> None:
    """First one of three dies in the middle of its work, then all do."""
    with ReplicaPool.launch(SPEC, 3, "least_outstanding_tokens") as pool:
        pids = [link.pid for link in pool.links]
        for prompt in PROMPTS:
            pool.submit(prompt, LONG)
        ended = work_until_tokens(pool, 10)
        pool.kill(1)
        answers = collect(pool, ended, 10)
        assert [answer.token_ids for answer in answers] == expected
        moved = [answer for answer in answers if answer.num_attempts == 2]
        assert len(moved) >= 3
        assert all(answer.replica in (0, 2) for answer in answers)
        pool.router.check_invariants()

        for prompt in PROMPTS:
            pool.submit(prompt, LONG)
        ended = work_until_tokens(pool, 10)
        pool.kill(0)
        pool.kill(2)
        answers = collect(pool, ended, 10)
        open_ones = [answer for answer in answers if answer.finish_reason == "error"]
        assert open_ones
        for answer in open_ones:
            assert "no replica is alive (replica 0: its process ended" in (answer.error or "")
            assert not answer.token_ids
        assert "no replica is alive" in (pool.serve([[1, 2]], SHORT)[0].error or "")
    wait_until_all_are_gone(pids)


def test_a_request_that_kills_its_replicas_is_given_up() -> None:
    with ReplicaPool.launch(SPEC, 2, max_attempts=1) as pool:
        pool.submit(PROMPTS[0], LONG)
        work_until_tokens(pool, 1)
        pool.kill(pool.router.loads.outstanding.index(max(pool.router.loads.outstanding)))
        answer = collect(pool, [], 1)[0]
        assert "died 1 times" in (answer.error or "")
        # The other one still serves.
        assert pool.serve([PROMPTS[0]], SHORT)[0].error is None


def test_a_model_that_cannot_be_loaded_says_why_and_leaves_nothing() -> None:
    with pytest.raises(ReplicaError, match=r"could not start: \w+: .*NO_SUCH"):
        ReplicaPool.launch(ReplicaSpec("random:NO_SUCH"), 2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"engine": {"blocks": 3}}, r"EngineConfig has no \['blocks'\]"),
        ({"beat_s": 0.0}, "beat_s"),
    ],
)
def test_nonsense_is_refused_before_anything_starts(
    values: dict[str, object], message: str
) -> None:
    with pytest.raises(ReplicaError, match=message):
        ReplicaSpec(**values)  # type: ignore[arg-type]


def test_torchrun_by_hand(expected: list[list[int]]) -> None:
    """The command of the chapter: rank 0 routes, all ranks serve."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
        *("-m", "ch15_helpers.serving.replicas", "--model", "random:TINY", "--requests", "4"),
        *("--max-tokens", "6", "--policy", "round_robin"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["request"] for answer in answers] == [0, 1, 2, 3]
    assert [answer["replica"] for answer in answers] == [0, 1, 0, 1]
    prompts = [[1 + (number + k) % 97 for k in range(24)] for number in range(4)]
    engine = Engine(load_model("random:TINY", device="cpu"), EngineConfig(num_blocks=64))
    six = SamplingParams(max_tokens=6, ignore_eos=True)
    assert [a["tokens"] for a in answers] == [o.token_ids for o in engine.generate(prompts, six)]


def test_a_router_that_is_killed_takes_its_replicas_with_it() -> None:
    code = (
        "import os, signal\n"
        "from ch15_helpers.serving.replica_pool import ReplicaPool\n"
        "from ch15_helpers.serving.replica_spec import ReplicaSpec\n"
        "pool = ReplicaPool.launch(ReplicaSpec('random:TINY', engine={'num_blocks': 64}), 2)\n"
        "print(*[link.pid for link in pool.links], pool._launched._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    pids = [int(text) for text in done.stdout.split()]
    assert len(pids) == 3, done.stderr
    wait_until_all_are_gone(pids)
