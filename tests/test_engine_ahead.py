"""The next step launched while one runs: the same tokens, and nothing lost whatever goes wrong.

The CPU computes a step when it is launched, but the engine goes the same way as on a GPU: the next
step is scheduled, and its inputs are built, before anybody looks at the tokens of the last one.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from fakes import VOCAB, HashModel, expected_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from ch15_helpers import CapacityError, Engine, EngineConfig, SamplingParams
from ch15_helpers.errors import DeviceLostError, EngineConfigError
from ch15_helpers.serving import engine_parts, faults
from ch15_helpers.serving.engine import StepRecord
from ch15_helpers.serving.last_ids import Launched
from ch15_helpers.serving.request import PENDING_TOKEN
from ch15_helpers.serving.runner import ModelRunner
from ch15_helpers.serving.scheduler import Scheduler
from ch15_helpers.serving.step import Step
from ch15_helpers.serving.warm_up import patiently


def engine_of(model: HashModel | None = None, *, ahead: bool = True, **config: Any) -> Engine:
    ticks = itertools.count()
    defaults = {"block_size": 4, "num_blocks": 60, "max_num_seqs": 4, "watermark": 0.0}
    return Engine(
        model or HashModel(),  # type: ignore[arg-type]
        EngineConfig(**{**defaults, **config}, async_scheduling=ahead),
        clock=lambda: float(next(ticks)),
    )


def serve(
    prompts: list[list[int]], params: list[SamplingParams], **config: Any
) -> tuple[list[Any], list[Step]]:
    engine = engine_of(**config)
    steps: list[Step] = []
    engine.on_step = lambda record: steps.append(record.step)
    outputs = engine.generate(prompts, params)
    engine.check_invariants()
    assert engine.scheduler.blocks.allocator.num_used == 0
    assert engine._in_flight is None
    return [(o.token_ids, o.finish_reason, o.error) for o in outputs], steps


@given(
    seed=st.integers(0, 10**6),
    num_blocks=st.sampled_from([12, 20, 60]),
    budget=st.sampled_from([3, 9, 40]),
    temperature=st.sampled_from([0.0, 0.7]),
    preemption=st.sampled_from(["recompute", "swap"]),
    caching=st.booleans(),
    policy=st.sampled_from(["fcfs", "least_slack", "prefill_first", "static"]),
)
@settings(max_examples=60, deadline=None)
def test_a_step_ahead_gives_the_same_outputs(
    seed: int,
    num_blocks: int,
    budget: int,
    temperature: float,
    preemption: Any,
    caching: bool,
    policy: str,
) -> None:
    """Stop tokens end requests in the middle: the step that is ahead then computes for nobody."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(3) for _ in range(rng.randint(1, 14))] for _ in range(9)]
    params = [
        SamplingParams(
            max_tokens=rng.randint(1, 12),
            temperature=temperature,
            seed=rng.randrange(2**64),
            stop_token_ids=tuple(rng.randrange(VOCAB) for _ in range(12)),
        )
        for _ in prompts
    ]
    config = {
        "num_blocks": num_blocks,
        "max_num_batched_tokens": budget,
        "preemption": preemption,
        "num_host_blocks": 20 if preemption == "swap" else 0,
        "enable_prefix_caching": caching,
        "policy": policy,
    }
    ahead, _ = serve(prompts, params, **config)
    in_turn, _ = serve(prompts, params, ahead=False, **config)
    assert ahead == in_turn


class Watched(ModelRunner):
    """Notes in which order steps are launched and their tokens are read."""


def watch(engine: Engine) -> list[str]:
    """Events as they happen: launch n, read n."""
    events: list[str] = []
    launch, numbers = engine.runner.launch, itertools.count()

    def watched(step: Step) -> Launched | None:
        number = next(numbers)
        events.append(f"launch {number}")
        launched = launch(step)
        if launched is None:
            return None

        class Noted(Launched):
            def tokens(self) -> list[int]:
                events.append(f"read {number}")
                return super().tokens()

        return Noted(launched.ids, launched.done)

    engine.runner.launch = watched  # type: ignore[method-assign]
    return events


def test_a_step_is_launched_before_the_tokens_of_the_last_are_read() -> None:
    engine = engine_of()
    events = watch(engine)
    engine.generate([[1, 2, 3]], SamplingParams(max_tokens=4))
    order = ["launch 0", "launch 1", "read 0", "launch 2", "read 1", "launch 3", "read 2", "read 3"]
    assert [event for event in events if event != "launch 4"] == order


def test_steps_are_the_same_as_in_turn_and_records_see_no_pending_token() -> None:
    prompts, params = [[1] * 9, [2], [3, 4]], [SamplingParams(max_tokens=n) for n in (3, 7, 5)]
    shapes: dict[bool, list[tuple[int, int]]] = {}
    for ahead in (False, True):
        engine = engine_of(ahead=ahead, max_num_batched_tokens=6)
        records: list[StepRecord] = []

        def note(record: StepRecord, records: list[StepRecord] = records) -> None:
            records.append(record)
            known = [t for r in record.step.requests for t in r.output_token_ids]
            assert PENDING_TOKEN not in known

        engine.on_step = note
        engine.generate(prompts, params)
        shapes[ahead] = [(len(r.step.decodes), r.num_tokens) for r in records]
        assert [r.index for r in records] == list(range(engine.num_steps))
        pairs = itertools.pairwise(records)
        assert all(later.start_s >= earlier.end_s for earlier, later in pairs)
        assert not records[-1].has_work
    assert shapes[True] == shapes[False]


def test_a_stop_token_wastes_one_row_of_one_step() -> None:
    answers = [expected_tokens([1, 2], 20), expected_tokens([7], 20)]
    stop = answers[0][4]
    assert stop not in answers[0][:4] and stop not in answers[1]
    params = [SamplingParams(max_tokens=20, stop_token_ids=(stop,)), SamplingParams(max_tokens=20)]
    (first, second), steps = serve([[1, 2], [7]], params)
    assert first == (answers[0][:5], "stop", None)
    assert second == (answers[1], "length", None)
    assert [len(step.decodes) for step in steps] == [0, 2, 2, 2, 2, 2, *[1] * 14]


def test_requests_may_come_go_and_fork_between_steps() -> None:
    engine = engine_of()
    first = engine.add_request([1, 2], SamplingParams(max_tokens=9))
    engine.step()
    second = engine.add_request([5], SamplingParams(max_tokens=30))
    engine.step()
    engine.step()
    child = engine.fork(first, SamplingParams(max_tokens=12))
    assert engine._in_flight is None, "a fork starts from what is known"
    engine.step()
    assert engine._in_flight is not None and engine.abort(second)
    outputs = {}
    while engine.has_unfinished:
        outputs.update({output.request_id: output for output in engine.step()})
        engine.check_invariants()
    assert outputs[first].token_ids == expected_tokens([1, 2], 9)
    assert outputs[child].token_ids == expected_tokens([1, 2], 12)
    known = outputs[second].token_ids
    assert known == expected_tokens([5], 30)[: len(known)] and PENDING_TOKEN not in known
    assert engine.scheduler.blocks.allocator.num_used == 0


def test_a_launch_that_fails_does_not_touch_the_step_that_runs() -> None:
    model = HashModel()
    engine = engine_of(model, max_num_seqs=2)
    names = [engine.add_request([n, n + 1], SamplingParams(max_tokens=6)) for n in range(4)]
    engine.step()
    model.failures = 1
    ended = engine.step()
    engine.check_invariants()
    assert [output.request_id for output in ended] == names[:2]
    for number, output in enumerate(ended):
        assert output.token_ids == expected_tokens([number, number + 1], 6)[:2]
        assert output.error == "the model step failed: RuntimeError: injected failure"
    outputs = {}
    while engine.has_unfinished:
        outputs.update({output.request_id: output.token_ids for output in engine.step()})
    for number in (2, 3):
        assert outputs[names[number]] == expected_tokens([number, number + 1], 6)


def test_an_interrupt_while_a_step_is_in_flight_leaves_nothing_behind() -> None:
    class Interrupted(HashModel):
        calls = 0

        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            self.calls += 1
            if self.calls == 4:
                raise KeyboardInterrupt
            return super().forward(*args, **kwargs)

    engine = engine_of(Interrupted())
    with pytest.raises(KeyboardInterrupt):
        engine.generate([[1, 2, 3]], SamplingParams(max_tokens=9))
    engine.check_invariants()
    assert engine.scheduler.blocks.allocator.num_used == 0 and not engine.has_unfinished
    (output,) = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=5))
    assert output.token_ids == expected_tokens([1, 2, 3], 5)


# ---- what a GPU can do to an engine --------------------------------------------------------------


class Breaking(HashModel):
    """Fails from its fifth step on, as a GPU does after an illegal address."""

    calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.calls += 1
        if self.calls > 4:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "ahead"])
def test_a_lost_device_ends_every_request_and_refuses_new_ones(
    monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    monkeypatch.setattr(faults, "device_answers", lambda device: False)
    engine = engine_of(Breaking(), ahead=ahead, max_num_seqs=2)
    outputs = engine.generate([[n, n] for n in range(5)], SamplingParams(max_tokens=20))
    assert all(output.finish_reason == "error" for output in outputs)
    assert all("the device is lost" in str(output.error) for output in outputs)
    assert [len(output.token_ids) for output in outputs] == [4, 4, 0, 0, 0]
    assert outputs[1].token_ids == expected_tokens([1, 1], 4)
    engine.check_invariants()
    assert engine.scheduler.blocks.allocator.num_used == 0 and not engine.has_unfinished
    for refused in (lambda: engine.generate([[1]]), lambda: engine.add_request([1])):
        with pytest.raises(DeviceLostError, match=r"illegal memory access.*start a new process"):
            refused()
    assert engine.step() == []


def test_a_device_that_still_answers_is_not_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "device_answers", lambda device: True)
    engine = engine_of(Breaking(), max_num_seqs=1)
    first, second = engine.generate([[1], [2]], SamplingParams(max_tokens=9))
    assert "AcceleratorError" in str(first.error) and engine.lost is None
    assert second.finish_reason == "error"


@pytest.mark.parametrize(
    ("error", "is_device"),
    [
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), True),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), True),
        (RuntimeError("The size of tensor a must match"), False),
        (ValueError("CUDA error"), False),
    ],
)
def test_which_errors_are_the_devices(error: Exception, is_device: bool) -> None:
    assert faults.is_device_error(error) == is_device
    assert not faults.device_is_lost(error, torch.device("cpu"))


def test_running_out_of_memory_is_not_losing_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "device_answers", lambda device: False)
    error = torch.OutOfMemoryError("CUDA error: out of memory")
    assert not faults.device_is_lost(error, torch.device("cpu"))


def test_a_pool_that_does_not_fit_is_made_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    make = engine_parts.make_kv_cache

    def scarce(geometry: Any, num_blocks: int, *args: Any, **kwargs: Any) -> Any:
        asked.append(num_blocks)
        if num_blocks > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return make(geometry, num_blocks, *args, **kwargs)

    monkeypatch.setattr(engine_parts, "make_kv_cache", scarce)
    monkeypatch.setattr(engine_parts, "pool_size", lambda *args: 100)
    limit = 72
    engine = engine_of(num_blocks=None)
    assert asked == [100, 85, 70] and engine.cache.num_blocks == 70
    assert engine.scheduler.config.num_blocks == 70
    limit = 5
    with pytest.raises(
        CapacityError, match=r"a KV pool of 25 blocks do not fit .* lower num_blocks"
    ):
        engine_of(num_blocks=None)
    with pytest.raises(CapacityError, match="a KV pool of 60 blocks"):
        engine_of(num_blocks=60)
    assert asked[-1] == 60


def test_a_subclass_that_replaces_a_stage_is_not_overlapped() -> None:
    class Own(Engine):
        scheduler_type = type("OwnScheduler", (Scheduler,), {})

    config = EngineConfig(num_blocks=8, async_scheduling=True)
    with pytest.raises(EngineConfigError, match="OwnScheduler and ModelRunner do not expect"):
        Own(HashModel(), config)  # type: ignore[arg-type]
    assert not Own(HashModel(), EngineConfig(num_blocks=8))._overlaps  # type: ignore[arg-type]


def test_a_bar_shows_only_where_one_waits(capsys: pytest.CaptureFixture[str]) -> None:
    ticks = itertools.count()
    assert list(patiently([1, 2, 3], "warming up", lambda: 0.0)) == [1, 2, 3]
    assert capsys.readouterr().out == ""
    assert list(patiently(range(5), "warming up", lambda: float(next(ticks)))) == [0, 1, 2, 3, 4]
    assert capsys.readouterr().out != ""  # a bar, if a transient one
