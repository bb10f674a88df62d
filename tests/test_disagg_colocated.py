"""Two pools on one device: the same tokens, decode steps between layers, faults found, no leaks."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from typing import Any, get_args

import pytest

from ch15_helpers import Engine, EngineConfig, SamplingParams
from ch15_helpers.disagg.clock import VirtualClock
from ch15_helpers.disagg.colocated import SplitPools
from ch15_helpers.disagg.fabric import Fabric, FabricWire
from ch15_helpers.disagg.faults import Fault, FaultyWire
from ch15_helpers.disagg.link import LinkModel
from ch15_helpers.model.transformer import Transformer
from ch15_helpers.serving.engine import StepRecord

CONFIG = EngineConfig(block_size=8, num_blocks=32, watermark=0.0)
PROMPTS = [[(37 * i * i + 11 * i + 5 * n) % 250 for i in range(61 - 9 * n)] for n in range(3)]
GREEDY = SamplingParams(max_tokens=10, ignore_eos=True)
FAULTS: tuple[Fault, ...] = get_args(Fault)


def split(model: Transformer, **options: Any) -> SplitPools:
    decode = options.pop("decode", CONFIG)
    return SplitPools(model, CONFIG, decode, **options)


def tokens_of(outputs: list[Any]) -> list[list[int]]:
    return [output.token_ids for output in outputs]


@pytest.fixture(scope="module")
def monolithic(tiny: Transformer) -> list[list[int]]:
    return tokens_of(Engine(tiny, CONFIG).generate(PROMPTS, GREEDY))


@pytest.mark.parametrize("slice_work", [1, 61, None])
@pytest.mark.parametrize("decode_between", [False, True])
def test_tokens_are_those_of_one_engine(
    tiny: Transformer,
    monolithic: list[list[int]],
    slice_work: int | None,
    decode_between: bool,
) -> None:
    pools = split(tiny, slice_work=slice_work, decode_between=decode_between)
    assert tokens_of(pools.generate(PROMPTS, GREEDY)) == monolithic
    pools.check_invariants()
    for engine in (pools.prefill, pools.decode):
        assert engine.scheduler.blocks.allocator.num_used == 0
    layers = tiny.config.num_hidden_layers
    for handover, prompt in zip(pools.handovers, PROMPTS, strict=True):
        blocks = -(-len(prompt) // 8)
        at_once = layers if slice_work is None else max(1, slice_work // len(prompt))
        slices = -(-layers // at_once)
        content = blocks * 8 * tiny.config.kv_bytes_per_token(4)
        assert handover.num_blocks == blocks and handover.num_transfers == slices
        assert handover.num_bytes == content + 48 * blocks * slices
        assert handover.wait_s is not None and handover.first_step_s is not None


def test_sampled_tokens_are_those_of_one_engine(tiny: Transformer) -> None:
    params = SamplingParams(max_tokens=8, temperature=0.9, top_p=0.95, ignore_eos=True)
    expected = tokens_of(Engine(tiny, CONFIG).generate(PROMPTS, params))
    assert tokens_of(split(tiny).generate(PROMPTS, params)) == expected
    assert tokens_of(split(tiny).generate(PROMPTS, replace(params, seed=7))) != expected


def test_running_requests_advance_while_a_prompt_is_computed(tiny: Transformer) -> None:
    steps: list[tuple[int, ...]] = []

    def note(record: StepRecord) -> None:
        steps.append(tuple(len(request.output_token_ids) for request in record.step.decodes))

    for between in (False, True):
        pools = split(tiny, slice_work=1, decode_between=between, on_step=note)
        pools.add_request(PROMPTS[0], GREEDY, "talker")
        pools.step()
        pools.add_request(PROMPTS[1], GREEDY, "newcomer")
        steps.clear()
        pools.step()  # the newcomer's prompt
        assert len(steps) == (tiny.config.num_hidden_layers if between else 0)
        assert {len(step) for step in steps} <= {1}, "the newcomer decoded before it had a token"


@pytest.mark.parametrize("fault", FAULTS)
def test_the_check_saves_the_tokens(
    tiny: Transformer, monolithic: list[list[int]], fault: Fault
) -> None:
    def wrap(wire: Any) -> Any:
        return FaultyWire(wire, fault, row=6)  # of the first prompt: block 7 is partly full

    pools = split(tiny, slice_work=1, wrap=wrap)
    assert tokens_of(pools.generate(PROMPTS[:1], GREEDY)) == monolithic[:1]
    assert (pools.handovers[0].num_recomputed > 0) == (fault != "reorder")
    careless = split(tiny, slice_work=1, wrap=wrap, verify=False)
    (output,) = careless.generate(PROMPTS[:1], GREEDY)
    assert output.error is None or "not finite" in output.error, "the step failed"
    assert output.token_ids != monolithic[0]


def test_a_full_decode_pool_holds_prompts_back(
    tiny: Transformer, monolithic: list[list[int]]
) -> None:
    pools = split(tiny, decode=replace(CONFIG, num_blocks=10))
    names = [pools.add_request(prompt, GREEDY) for prompt in PROMPTS]
    ended: dict[str, Any] = {}
    most = 0
    while pools.has_unfinished:
        ended |= {output.request_id: output for output in pools.step()}
        most = max(most, pools.decode.scheduler.num_running)
        pools.check_invariants()
    assert most == 1, "two of these prompts do not fit at a time"
    assert [ended[name].token_ids for name in names] == monolithic


def test_what_cannot_be_served_ends_alone(tiny: Transformer, monolithic: list[list[int]]) -> None:
    too_long = list(range(250)) * 2
    outputs = split(tiny).generate([too_long, PROMPTS[1]], GREEDY)
    assert outputs[0].finish_reason == "error" and "KV blocks" in (outputs[0].error or "")
    assert outputs[1].token_ids == monolithic[1]
    small = SplitPools(tiny, replace(CONFIG, num_blocks=4), CONFIG)  # the prefill side's pool
    outputs = small.generate([PROMPTS[0], [1, 2, 3]], GREEDY)
    assert outputs[0].finish_reason == "error" and outputs[1].finish_reason == "length"
    small.check_invariants()
    assert small.decode.scheduler.blocks.allocator.num_used == 0


def test_one_token_needs_no_decode_step(tiny: Transformer, monolithic: list[list[int]]) -> None:
    pools = split(tiny)
    outputs = pools.generate(PROMPTS, SamplingParams(max_tokens=1))
    assert tokens_of(outputs) == [tokens[:1] for tokens in monolithic]
    assert pools.decode.num_steps == 0


def test_a_prompt_of_one_token_is_handed_over(tiny: Transformer) -> None:
    expected = tokens_of(Engine(tiny, CONFIG).generate([[5], [6]], GREEDY))
    pools = split(tiny)
    assert tokens_of(pools.generate([[5], [6]], GREEDY)) == expected
    assert [handover.num_blocks for handover in pools.handovers] == [1, 1]


def test_times_are_on_the_clock_that_was_given(tiny: Transformer) -> None:
    ticks = count()
    pools = split(tiny, clock=lambda: float(next(ticks)))
    (output,) = pools.generate(PROMPTS[:1], GREEDY)
    metrics = output.metrics
    assert metrics.ttft_s is not None and metrics.ttft_s >= 1 and metrics.ttft_s % 1 == 0
    assert len(metrics.itl_s) == 9
    handover = pools.handovers[0]
    assert handover.orchestration_s >= 1 and handover.transfer_s >= handover.place_s >= 1


def test_a_modelled_network_is_the_only_time_on_a_virtual_clock(
    tiny: Transformer, monolithic: list[list[int]]
) -> None:
    clock, link = VirtualClock(), LinkModel(latency_s=1e-3, bandwidth_GBps=0.01)
    fabric = Fabric(link, clock)
    pools = split(tiny, clock=clock, wrap=lambda wire: FabricWire(wire, fabric))
    (output,) = pools.generate(PROMPTS[:1], GREEDY)
    handover = pools.handovers[0]
    expected_s = handover.num_transfers * 1e-3 + handover.num_bytes / 1e7
    assert output.token_ids == monolithic[0]
    assert handover.transfer_s == pytest.approx(expected_s)
    assert output.metrics.ttft_s == pytest.approx(expected_s)
    assert handover.orchestration_s == handover.wait_s == 0


def test_pools_that_do_not_fit_together_are_errors(tiny: Transformer) -> None:
    with pytest.raises(ValueError, match="block_size is 8 on the prefill side and 16"):
        split(tiny, decode=replace(CONFIG, block_size=16))
    with pytest.raises(ValueError, match="enable_prefix_caching=False"):
        split(tiny, decode=replace(CONFIG, enable_prefix_caching=True))
