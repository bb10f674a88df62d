"""Copies, the wire's rows, experts on one rank, and the model of overlap: no processes needed."""

from __future__ import annotations

import pytest
import torch
from moe_workers import dense_float64, error_of
from torch.utils._python_dispatch import TorchDispatchMode

from ch15_helpers.errors import MoEError
from ch15_helpers.kernels.moe_fp8 import FP8, quantise_blocks
from ch15_helpers.moe.dispatch import Exchange, make_copies, sum_copies
from ch15_helpers.moe.expert_parallel import ExpertParallelConfig
from ch15_helpers.moe.experts import (
    ExpertWeights,
    SharedExpert,
    experts_loop,
    experts_sorted,
)
from ch15_helpers.moe.overlap import moe_steps, run_in_turn, run_one_by_one
from ch15_helpers.moe.overlap_model import PhaseTimes, crossover, overlapped_s, two_batch_gain
from ch15_helpers.moe.placement import ExpertPlacement, SlotChooser
from ch15_helpers.moe.routing import SyntheticRouter, drop_over_capacity
from ch15_helpers.moe.wire import WireFormat, dequantise_rows, quantise_rows


def make(tokens, experts, top_k, hidden=40, inner=24, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    weights = ExpertWeights(
        normal(experts, 2 * inner, hidden) / hidden**0.5, normal(experts, hidden, inner)
    )
    routing = SyntheticRouter(experts, top_k, skew=1.0, seed=seed).route(tokens)
    return weights, normal(tokens, hidden), *routing


@pytest.mark.parametrize("run", [experts_loop, experts_sorted, lambda x, w, *r: w(x, *r)])
@pytest.mark.parametrize("shape", [(0, 6, 2), (1, 6, 2), (50, 9, 3), (300, 4, 4), (7, 1, 1)])
def test_each_way_to_run_experts_matches_the_reference(run, shape):
    all_experts, x, weights, ids = make(*shape)
    if shape[0] == 50:
        ids[::3, 1] = -1
        ids[1::3, 0] = 9
    out = run(x, all_experts, weights, ids)
    assert error_of(out, dense_float64(all_experts, x, weights, ids)) < 1e-6


@pytest.mark.parametrize("dedup", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_copies_hold_every_pair_once_and_go_home(dedup, seed):
    size, homes = 3, 5
    weights, slots = SyntheticRouter(size * homes, 4, skew=0.7, seed=seed).route(23)
    slots[::4, 2] = -1
    copies = make_copies(slots, weights, size, homes, dedup)
    total = int(copies.counts.sum())
    found, first = [], 0
    for home, count in enumerate(copies.counts.tolist()):
        tokens = copies.tokens[first : first + count].tolist()
        assert tokens == sorted(tokens)
        assert not dedup or len(set(tokens)) == count
        for row in range(first, first + count):
            for slot, weight in zip(copies.slots[row], copies.weights[row], strict=True):
                if slot >= 0:
                    found.append((int(copies.tokens[row]), home * size + int(slot), float(weight)))
        first += count
    expected = [
        (token, int(slots[token, j]), float(weights[token, j]))
        for token in range(23)
        for j in range(4)
        if slots[token, j] >= 0
    ]
    assert sorted(found) == sorted(expected)
    rows = torch.randn(total, 8)
    sums = sum_copies(rows, copies, torch.float32)
    for token in range(23):
        mine = copies.tokens[:total] == token
        assert torch.allclose(sums[token], rows[mine].sum(0), atol=1e-6)


@pytest.mark.parametrize("tokens", [0, 1, 23])
def test_fixed_messages_hold_the_same_copies(tokens):
    weights, slots = SyntheticRouter(15, 4, skew=0.7, seed=2).route(tokens)
    slots[::4, 2] = -1
    plain = make_copies(slots, weights, 3, 5, True)
    fixed = make_copies(slots, weights, 3, 5, True, fixed_rows=25)
    assert fixed.tokens.shape == (125,)
    total = int(plain.counts.sum())
    for name in ("tokens", "slots", "weights"):
        assert torch.equal(getattr(fixed, name)[fixed.valid], getattr(plain, name)[:total])
    assert (fixed.slots[~fixed.valid] == -1).all()
    chosen = plain.positions >= 0
    assert torch.equal(fixed.positions >= 0, chosen)
    rows = torch.zeros(125, dtype=torch.int64)
    rows[fixed.valid] = torch.arange(total)
    assert torch.equal(rows[fixed.positions[chosen]], plain.positions[chosen])


def test_tables_do_not_grow_with_experts_times_tokens():
    """Doubling the experts of a large layer adds nothing that depends on the tokens."""
    weights, slots = SyntheticRouter(64, 4).route(512)
    sizes = []
    for homes in (8, 64):
        copies = make_copies(slots, weights, 64 // homes, homes, True)
        sizes.append(sum(t.numel() for t in vars(copies).values() if t is not None))
    assert sizes[1] - sizes[0] == 64 - 8
    assert sizes[0] <= 512 * 4 * (1 + 1 + 4 + 4) + 8


class Largest(TorchDispatchMode):
    """Most numbers that any operation's result has."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("dedup", [True, False])
def test_no_operation_on_the_way_makes_a_table_of_tokens_and_experts(dedup):
    tokens, experts, top_k = 256, 2048, 4
    weights, ids = SyntheticRouter(experts, top_k).route(tokens)
    homes = [(e, (e + 1) % experts) for e in range(experts)]
    choose = SlotChooser(ExpertPlacement(experts, tuple(homes)), rank=0)
    with Largest() as seen:
        slots = choose(drop_over_capacity(ids, experts, 2))
        make_copies(slots, weights, 2 * experts // 64, 64, dedup)
    assert seen.numel <= max(tokens * top_k * top_k, 2 * experts + 1)


class FakeParallel:
    """Notes the order of the phases; results are twice the input."""

    def __init__(self, log):
        self.log = log

    def start_dispatch(self, x, trip):
        self.log.append("dispatch")
        return x

    def compute(self, arrived, dtype):
        self.log.append("experts")
        return 2 * arrived

    def start_combine(self, results, trip):
        self.log.append("combine")
        return results

    def finish(self, returned, trip, dtype):
        self.log.append("finish")
        return returned


class FakeShared:
    def __init__(self, log):
        self.log = log

    def first(self, x):
        self.log.append("first")
        return x

    def second(self, inner):
        self.log.append("second")
        return inner


def test_the_shared_expert_and_the_other_batch_work_while_tokens_travel():
    log = []
    parallel, shared, x = FakeParallel(log), FakeShared(log), torch.ones(2, 3)
    (out,) = run_in_turn([moe_steps(parallel, x, None, shared)])
    assert torch.equal(out, 3 * x)
    assert log == ["dispatch", "first", "experts", "combine", "second", "finish"]
    log.clear()
    run_in_turn([moe_steps(parallel, x, None) for _ in range(2)])
    assert log == ["dispatch"] * 2 + ["experts", "combine"] * 2 + ["finish"] * 2


@pytest.mark.parametrize("hidden", [30, 128, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8])
def test_rows_come_back_as_they_were(hidden, dtype):
    wire = WireFormat(hidden, dtype, entries=3)
    assert wire.row_bytes % 32 == 0
    rows = torch.randn(9, hidden).to(torch.float32 if dtype == FP8 else dtype)
    slots, weights = torch.randint(-1, 5, (9, 3)), torch.rand(9, 3)
    packed = wire.encode(rows.flip(0), torch.arange(9).flip(0), slots, weights)
    assert packed.shape == (9, wire.row_bytes)
    got, ids, factors = wire.decode(packed, rows.dtype)
    assert torch.equal(ids, slots) and torch.equal(factors, weights)
    if dtype == FP8:
        assert torch.equal(got, dequantise_rows(*quantise_rows(rows), 128, torch.float32))
    else:
        assert torch.equal(got, rows)
    none = torch.zeros(0, dtype=torch.int64)
    assert wire.encode(rows, none, slots[:0], weights[:0]).shape == (0, wire.row_bytes)


def test_bytes_of_a_row_are_what_the_text_says():
    assert WireFormat(2048, torch.bfloat16, 8).row_bytes == 4160
    assert WireFormat(2048, FP8, 8).row_bytes == 2176


@pytest.mark.parametrize("magnitude", [1e-30, 1e-3, 1.0, 448.0, 1e30])
def test_fp8_rows_are_near_and_encoding_again_changes_no_bit(magnitude):
    rows = torch.randn(50, 200, generator=torch.Generator().manual_seed(1)) * magnitude
    values, scales = quantise_rows(rows)
    once = dequantise_rows(values, scales, 128, torch.float32)
    bound = rows.abs() / 16 + scales.repeat_interleave(128, 1)[:, :200] / 512
    assert ((once - rows).abs() <= bound).all()
    assert (torch.frexp(scales).mantissa == 0.5).all()
    brain = dequantise_rows(values, scales, 128, torch.bfloat16)
    assert torch.equal(brain.float(), once)
    again = dequantise_rows(*quantise_rows(once), 128, torch.float32)
    assert torch.equal(again, once)


def test_fp8_rows_keep_zeros_and_bad_numbers_to_themselves():
    rows = torch.randn(4, 160)
    rows[1], rows[2, 3], rows[3, 150] = 0.0, float("nan"), float("inf")
    out = dequantise_rows(*quantise_rows(rows), 128, torch.float32)
    assert out[0].isfinite().all() and torch.equal(out[1], rows[1])
    assert out[2, :128].isnan().all() and out[2, 128:].isfinite().all()
    assert out[3, :128].isfinite().all() and out[3, 128:].isnan().all()


def test_fp8_experts_are_cut_out_and_used():
    all_experts, x, weights, ids = make(20, 4, 2)
    gate_up, up_scales = quantise_blocks(all_experts.gate_up.view(4, 2, 24, 40))
    down, down_scales = quantise_blocks(all_experts.down)
    small = ExpertWeights(gate_up.flatten(1, 2), down, (up_scales, down_scales))
    assert small.bytes_per_expert == 3 * 24 * 40 + 4 * 3
    placement = ExpertPlacement.even(4, 2, 3)
    out = sum(
        small.of_rank(placement, rank)(
            x, weights, torch.where(ids // 2 == rank, ids - 2 * rank, -1)
        )
        for rank in range(2)
    )
    assert error_of(out, small(x, weights, ids).double()) < 1e-6


def test_the_shared_expert_is_its_two_halves():
    shared = SharedExpert(torch.randn(12, 8), torch.randn(8, 6))
    x = torch.randn(5, 8)
    assert torch.equal(shared(x), shared.second(shared.first(x)))


def test_driving_in_turn_changes_the_order_and_nothing_else():
    log = []

    def steps(name, count):
        for step in range(count):
            log.append((name, step))
            yield
        return torch.tensor(count)

    assert run_in_turn([steps("a", 2), steps("b", 3)])[1] == 3
    assert log == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("b", 2)]
    log.clear()
    run_one_by_one([steps("a", 2), steps("b", 1)])
    assert log == [("a", 0), ("a", 1), ("b", 0)]


def test_the_model_of_overlap_by_hand():
    one = PhaseTimes(dispatch_s=4, experts_s=5, combine_s=4, shared_s=3, before_s=2)
    assert one.total_s == 18
    # before 2, dispatch 4 (beside 2 of shared), experts 5, combine 4 (beside 1 of shared).
    assert overlapped_s([one]) == 15
    half = PhaseTimes(dispatch_s=2, experts_s=3, combine_s=2)
    # A out 0-2, B out 2-4; A works 2-5, B 5-8; A back 5-7, B back 8-10.
    assert overlapped_s([half, half]) == 10
    busy = PhaseTimes(dispatch_s=2, experts_s=3, combine_s=2, before_s=2)
    # The next layer's first work of A fits beside B's way back.
    assert (overlapped_s([busy, busy]), overlapped_s([busy, busy], num_layers=2)) == (12, 22)


def test_two_batches_win_when_large_and_lose_when_small():
    def phases(tokens):
        floor, each = 50.0, 1.0  # weights to read, then work by the token
        return PhaseTimes(each * tokens, max(floor, each * tokens), each * tokens)

    assert two_batch_gain(phases, 8) < 1
    assert two_batch_gain(phases, 1000) > 1.2
    where = crossover(phases, [8, 16, 32, 64, 128, 256, 1024])
    assert where is not None and 16 < where <= 256
    assert crossover(phases, [2, 4]) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity_factor": 0.0}, "capacity_factor"),
        ({"capacity_factor": float("nan")}, "capacity_factor"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 8, "deduplicate": False}, "bounds the copies"),
        ({"ranks_per_node": 0}, "ranks_per_node"),
        ({"nearest_replica": True}, "what is near"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(options, message):
    with pytest.raises(MoEError, match=message):
        ExpertParallelConfig(**options)


def test_errors_say_what_to_do():
    with pytest.raises(MoEError, match="torchrun"):
        Exchange()
    with pytest.raises(MoEError, match="expected gate_up"):
        ExpertWeights(torch.zeros(2, 6, 4), torch.zeros(2, 4, 5))
    all_experts = ExpertWeights(torch.zeros(2, 6, 4), torch.zeros(2, 4, 3))
    with pytest.raises(MoEError, match="2 experts are given"):
        all_experts.of_rank(ExpertPlacement.even(4, 2), 0)
