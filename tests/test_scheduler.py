"""The scheduler by itself: no tensors, a clock that only counts."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

import pytest

from ch15_helpers.errors import InvalidRequestError
from ch15_helpers.serving.policy import FCFS, make_policy
from ch15_helpers.serving.request import INVALID_TOKEN, Request, RequestStatus, SamplingParams
from ch15_helpers.serving.scheduler import Scheduler, SchedulerConfig, Step


def make(**limits: object) -> Scheduler:
    defaults: dict[str, object] = {"block_size": 4, "num_blocks": 64, "watermark": 0.0}
    return Scheduler(SchedulerConfig(**{**defaults, **limits}))  # type: ignore[arg-type]


def request(name: str, prompt: int, max_tokens: int = 4, **params: object) -> Request:
    return Request(
        name,
        list(range(1, prompt + 1)),
        SamplingParams(max_tokens=max_tokens, **params),  # type: ignore[arg-type]
    )


def advance(scheduler: Scheduler, token: int = 50) -> tuple[Step, list[Request]]:
    step = scheduler.schedule(0.0)
    finished = scheduler.update(step, [token] * len(step.sampled), 1.0)
    scheduler.check_invariants()
    return step, finished


def run(scheduler: Scheduler, limit: int = 2000) -> list[Request]:
    done: list[Request] = []
    for _ in range(limit):
        if not scheduler.has_work:
            return done
        done += advance(scheduler)[1]
    raise AssertionError("no progress")


def names(requests: Iterable[Request]) -> list[str]:
    return [r.request_id for r in requests]


def shape(step: Step) -> tuple[list[str], list[tuple[str, int, int]]]:
    chunks = [(c.request.request_id, c.start, c.num_tokens) for c in step.chunks]
    return names(step.decodes), chunks


def test_requests_join_and_leave_between_iterations() -> None:
    scheduler = make()
    scheduler.add(request("a", 3, max_tokens=3))
    assert shape(advance(scheduler)[0]) == ([], [("a", 0, 3)])
    scheduler.add(request("b", 2, max_tokens=1))
    step, finished = advance(scheduler)
    assert shape(step) == (["a"], [("b", 0, 2)])
    assert names(finished) == ["b"]
    step, finished = advance(scheduler)
    assert shape(step) == (["a"], [])
    assert names(finished) == ["a"] and finished[0].output_token_ids == [50] * 3
    assert not scheduler.has_work and scheduler.blocks.allocator.num_used == 0


def test_prompts_are_chunked_to_the_budget_that_decodes_leave() -> None:
    scheduler = make(max_num_batched_tokens=5)
    scheduler.add(request("a", 2, max_tokens=9))
    scheduler.add(request("b", 9))
    scheduler.add(request("c", 1))
    assert shape(advance(scheduler)[0]) == ([], [("a", 0, 2), ("b", 0, 3)])
    step = advance(scheduler)[0]
    assert shape(step) == (["a"], [("b", 3, 4)])
    assert names(step.sampled) == ["a"]  # b's chunk does not reach its last token
    step = advance(scheduler)[0]
    assert shape(step) == (["a"], [("b", 7, 2), ("c", 0, 1)])
    assert step.num_tokens == 4
    assert names(step.sampled) == ["a", "b", "c"]


def test_without_chunking_a_prompt_is_never_split() -> None:
    scheduler = make(max_num_batched_tokens=5, enable_chunked_prefill=False)
    for name, length in (("a", 9), ("b", 2), ("c", 3), ("d", 1)):
        scheduler.add(request(name, length, max_tokens=9))
    assert shape(advance(scheduler)[0]) == ([], [("a", 0, 9)])  # the first may exceed the budget
    assert shape(advance(scheduler)[0]) == (["a"], [("b", 0, 2)])  # c does not fit beside b
    assert shape(advance(scheduler)[0]) == (["a", "b"], [("c", 0, 3)])


def test_max_num_seqs_bounds_what_runs() -> None:
    scheduler = make(max_num_seqs=2)
    for name in "abc":
        scheduler.add(request(name, 2, max_tokens=2))
    assert shape(advance(scheduler)[0])[1] == [("a", 0, 2), ("b", 0, 2)]
    advance(scheduler)
    assert shape(advance(scheduler)[0])[1] == [("c", 0, 2)]


def test_watermark_holds_admission_back_but_never_the_only_request() -> None:
    scheduler = make(num_blocks=10, watermark=0.3)  # 3 blocks stay free
    scheduler.add(request("a", 16))
    scheduler.add(request("b", 16))
    assert names(c.request for c in advance(scheduler)[0].chunks) == ["a"]
    scheduler = make(num_blocks=10, watermark=0.3)
    scheduler.add(request("whole pool", 40, max_tokens=1))
    assert names(advance(scheduler)[1]) == ["whole pool"]


def test_nobody_overtakes_a_request_that_does_not_fit() -> None:
    scheduler = make(num_blocks=6)
    scheduler.add(request("a", 12, max_tokens=3))
    scheduler.add(request("large", 16))
    scheduler.add(request("small", 1))
    assert names(c.request for c in advance(scheduler)[0].chunks) == ["a"]
    assert names(scheduler.waiting) == ["large", "small"]
    order = names(run(scheduler))
    assert order[0] == "a" and set(order) == {"a", "large", "small"}


def test_a_decode_gets_its_block_exactly_when_it_is_needed() -> None:
    scheduler = make(block_size=4)
    scheduler.add(request("a", 3, max_tokens=12))
    tables = []
    while scheduler.has_work:
        step = scheduler.schedule(0.0)
        tables.append(len(scheduler.blocks.table("a")))
        scheduler.update(step, [9], 0.0)
    # 3 prompt tokens, then writes at positions 3, 4, ... 13.
    assert tables == [1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4]


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_the_latest_arrival_is_preempted_and_returns_first(preemption: str) -> None:
    scheduler = make(num_blocks=6, preemption=preemption, num_host_blocks=8)
    scheduler.add(request("a", 8, max_tokens=14))
    scheduler.add(request("b", 8, max_tokens=6))
    advance(scheduler)
    scheduler.add(request("c", 4, max_tokens=1))
    step = advance(scheduler)[0]
    assert names(step.decodes) == ["a", "b"]  # each took its third block: the pool is full
    while not (step := advance(scheduler)[0]).preempted:
        pass
    assert names(step.preempted) == ["b"] and names(step.decodes) == ["a"]
    assert names(scheduler.waiting) == ["b", "c"]
    b = scheduler.get("b")
    assert b is not None and b.num_preemptions == 1 and scheduler.num_preemptions == 1
    if preemption == "swap":
        assert b.status is RequestStatus.SWAPPED and len(step.swap_out) == 3
        assert b.num_computed_tokens == 12
    else:
        assert b.status is RequestStatus.PREEMPTED and not step.swap_out
        assert b.num_computed_tokens == 0
    finished = run(scheduler)
    assert names(finished) == ["a", "b", "c"]
    assert [len(r.output_token_ids) for r in finished] == [14, 6, 1]
    assert scheduler.host_blocks.num_used == 0


def test_swapped_blocks_come_back_in_logical_order_and_decoding_goes_on() -> None:
    scheduler = make(num_blocks=6, preemption="swap", num_host_blocks=8)
    scheduler.add(request("a", 8, max_tokens=7))
    scheduler.add(request("b", 8, max_tokens=7))
    out: list[tuple[int, int]] = []
    while not out:
        out = advance(scheduler)[0].swap_out
    back: Sequence[tuple[int, int]] = []
    while not back:
        step = advance(scheduler)[0]
        back = step.swap_in
    assert [host for _, host in out] == [host for host, _ in back]
    assert [block for _, block in back] == scheduler.blocks.table("b")[:3]
    assert names(step.decodes) == ["b"] and not step.chunks  # nothing is recomputed


def test_swap_falls_back_to_recomputation_when_the_host_pool_is_full() -> None:
    scheduler = make(num_blocks=6, preemption="swap", num_host_blocks=2)
    scheduler.add(request("a", 8, max_tokens=8))
    scheduler.add(request("b", 8, max_tokens=8))
    while not (step := advance(scheduler)[0]).preempted:
        pass
    assert step.preempted[0].status is RequestStatus.PREEMPTED and not step.swap_out
    assert len(run(scheduler)) == 2


def test_a_lone_request_that_outgrows_the_pool_ends_with_an_error_and_keeps_its_tokens() -> None:
    scheduler = make(num_blocks=3)
    scheduler.add(request("a", 6, max_tokens=100))
    scheduler.add(request("b", 6, max_tokens=2))
    a, b = run(scheduler)
    assert a.finish_reason == "error" and len(a.output_token_ids) == 7  # 13 tokens: 4 blocks
    assert a.error is not None
    assert "needs 4 KV blocks of 4, the pool has 3; its tokens so far are kept" in a.error
    assert b.finish_reason == "length"
    assert scheduler.blocks.allocator.num_free == 3


def test_what_can_never_run_is_rejected_alone() -> None:
    scheduler = make(num_blocks=5, max_model_len=30)
    wide, long, fine = request("wide", 21), request("long", 31), request("fine", 20, max_tokens=1)
    assert not scheduler.add(wide) and not scheduler.add(long) and scheduler.add(fine)
    assert wide.error == "the request has 21 tokens and needs 6 KV blocks of 4, the pool has 5"
    assert long.error == "the prompt has 31 tokens, the model's context is 30 tokens"
    assert wide.finish_reason == long.finish_reason == "error"
    assert names(run(scheduler)) == ["fine"]


def test_output_ends_where_the_models_context_ends() -> None:
    scheduler = make(max_model_len=10)
    scheduler.add(request("a", 7, max_tokens=99))
    scheduler.add(request("full", 10, max_tokens=99))
    done = {r.request_id: r for r in run(scheduler)}
    assert len(done["a"].output_token_ids) == 3 and done["a"].finish_reason == "length"
    assert len(done["full"].output_token_ids) == 1


def test_stop_tokens_end_a_request_and_are_kept() -> None:
    scheduler = make()
    stopping = request("a", 3, max_tokens=9, stop_token_ids=(50,))
    scheduler.add(stopping)
    advance(scheduler, token=49)
    finished = advance(scheduler, token=50)[1]
    assert finished == [stopping] and stopping.finish_reason == "stop"
    assert stopping.output_token_ids == [49, 50]
    eos = Request("b", [1], SamplingParams(ignore_eos=True), eos_token_ids=(50,))
    assert 50 not in eos.stop_ids
    assert 50 in Request("c", [1], SamplingParams(), eos_token_ids=(50,)).stop_ids


def test_an_invalid_token_ends_only_its_own_request() -> None:
    scheduler = make()
    scheduler.add(request("a", 3))
    scheduler.add(request("b", 3))
    advance(scheduler)
    step = scheduler.schedule(0.0)
    (bad,) = scheduler.update(step, [INVALID_TOKEN, 7], 0.0)
    assert bad.request_id == "a" and bad.output_token_ids == [50] and len(bad.token_times_s) == 1
    assert bad.finish_reason == "error" and "not finite" in str(bad.error)
    assert names(run(scheduler)) == ["b"]


def test_abort_frees_in_every_state() -> None:
    scheduler = make(num_blocks=6, preemption="swap", num_host_blocks=8)
    for name in "ab":
        scheduler.add(request(name, 8, max_tokens=14))
    while not advance(scheduler)[0].preempted:
        pass
    scheduler.add(request("waiting", 4))
    b = scheduler.get("b")
    assert b is not None and b.status is RequestStatus.SWAPPED
    for name in ("b", "waiting", "a"):
        gone = scheduler.abort(name)
        assert gone is not None and gone.finish_reason == "abort"
        scheduler.check_invariants()
    assert scheduler.abort("a") is None and not scheduler.has_work
    assert scheduler.blocks.allocator.num_free == 6 and scheduler.host_blocks.num_free == 8


def test_abort_of_a_prompt_under_way() -> None:
    scheduler = make(max_num_batched_tokens=4)
    scheduler.add(request("a", 10))
    advance(scheduler)
    scheduler.abort("a")
    scheduler.check_invariants()
    assert scheduler.schedule(0.0).is_empty and scheduler.blocks.allocator.num_used == 0


def test_a_failed_step_ends_its_requests_and_distrusts_its_swaps() -> None:
    scheduler = make(num_blocks=6, preemption="swap", num_host_blocks=8)
    scheduler.add(request("a", 8, max_tokens=14))
    scheduler.add(request("b", 8, max_tokens=14))
    while not (step := scheduler.schedule(0.0)).preempted:
        scheduler.update(step, [50] * len(step.sampled), 0.0)
    failed = scheduler.fail(step, "it broke")
    scheduler.check_invariants()
    assert names(failed) == ["a"] and failed[0].error == "it broke"
    b = scheduler.get("b")
    assert b is not None and b.status is RequestStatus.PREEMPTED and b.num_computed_tokens == 0
    assert scheduler.host_blocks.num_used == 0
    assert names(run(scheduler)) == ["b"]


def test_fork_shares_blocks_until_one_writes() -> None:
    scheduler = make()
    scheduler.add(request("a", 6, max_tokens=8))
    advance(scheduler)
    scheduler.fork("a", request("child", 1, max_tokens=8))
    assert scheduler.blocks.allocator.num_used == 2
    step, _ = advance(scheduler)
    assert names(step.decodes) == ["a", "child"] and len(step.copies) == 1
    done = run(scheduler)
    assert [len(r.output_token_ids) for r in done] == [8, 8]


def test_fork_refuses_what_cannot_be() -> None:
    scheduler = make(max_num_seqs=1)
    scheduler.add(request("a", 6))
    with pytest.raises(InvalidRequestError, match="not decoding"):
        scheduler.fork("a", request("child", 1))
    advance(scheduler)
    advance(scheduler)
    with pytest.raises(InvalidRequestError, match="already"):
        scheduler.fork("a", request("child", 1, max_tokens=2))
    with pytest.raises(InvalidRequestError, match="limit is 1"):
        scheduler.fork("a", request("child", 1))
    assert len(run(scheduler)) == 1


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_a_preempted_fork_takes_its_unmade_copy_along(preemption: str) -> None:
    # The parent is given a private copy of the shared block, then preempted in the same step to
    # make room for z: swapping must read the block it was to copy, and no copy may remain, as
    # its target is z's by then.
    class ParentFirst(FCFS):
        def victim(self, running: Iterable[Request]) -> Request:
            return min(running, key=lambda r: r.request_id)

    scheduler = Scheduler(
        SchedulerConfig(
            block_size=4,
            num_blocks=4,
            watermark=0.0,
            preemption=preemption,  # type: ignore[arg-type]
            num_host_blocks=4,
        ),
        ParentFirst(),
    )
    scheduler.add(request("a", 6, max_tokens=8))
    scheduler.add(request("z", 4, max_tokens=8))
    advance(scheduler)
    scheduler.fork("a", request("child", 1, max_tokens=8))
    table = scheduler.blocks.table("a")
    step = advance(scheduler)[0]  # growth in order of arrival: a, z, child
    assert names(step.preempted) == ["a"] and names(step.decodes) == ["z", "child"]
    assert step.copies == []
    assert [block for block, _ in step.swap_out] == (table if preemption == "swap" else [])
    assert len(run(scheduler)) == 3


def test_empty_prompt_and_taken_id_are_refused() -> None:
    scheduler = make()
    with pytest.raises(InvalidRequestError, match="empty prompt"):
        scheduler.add(Request("a", []))
    scheduler.add(request("a", 1))
    with pytest.raises(InvalidRequestError, match="in use"):
        scheduler.add(request("a", 1))
    assert len(run(scheduler)) == 1


@pytest.mark.parametrize(
    "limits",
    [
        {"max_num_seqs": 0},
        {"block_size": 0},
        {"num_host_blocks": -1},
        {"watermark": 1.0},
        {"preemption": "kill"},
        {"policy": "lifo"},
    ],
)
def test_impossible_configurations_are_refused(limits: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(limits))):
        make(**limits)


def test_policy_may_admit_another_or_nobody() -> None:
    class ShortestFirst(FCFS):
        def next_index(self, waiting: Sequence[Request], num_running: int, now_s: float) -> int:
            if num_running:
                return -1  # static batching: a new batch only when the last one is done
            return min(range(len(waiting)), key=lambda i: waiting[i].num_tokens)

    scheduler = Scheduler(SchedulerConfig(block_size=4, num_blocks=64), ShortestFirst())
    for name, length in (("a", 9), ("b", 2), ("c", 5)):
        scheduler.add(request(name, length, max_tokens=2))
    assert names(run(scheduler)) == ["b", "c", "a"]
    assert make_policy("fcfs").name == "fcfs"


def test_a_decode_step_makes_a_bounded_number_of_calls() -> None:
    # Time is measured in the book; here the reason for it: calls per decoding request and step.
    def calls(num_seqs: int) -> float:
        scheduler = make(max_num_seqs=num_seqs, block_size=16, num_blocks=num_seqs * 8)
        for i in range(num_seqs):
            scheduler.add(request(f"r{i}", 8 + i % 16, max_tokens=64))
        advance(scheduler)
        count = 0

        def profile(frame: object, event: str, arg: object) -> None:
            nonlocal count
            count += event == "call"

        for _ in range(16):
            step = scheduler.schedule(0.0)
            tokens = [1] * num_seqs
            sys.setprofile(profile)
            scheduler.update(step, tokens, 0.0)
            scheduler_step = scheduler.schedule(0.0)
            sys.setprofile(None)
            scheduler.update(scheduler_step, tokens, 0.0)
        return count / 16 / num_seqs

    assert calls(64) < 3
    assert calls(256) < 1.1 * calls(64)
