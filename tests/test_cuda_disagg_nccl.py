"""Two GPUs and NCCL: blocks arrive, damage is found, and the death of a peer hangs nobody."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_disagg_faults import once
from test_disagg_processes import launch

from ch15_helpers import Engine, EngineConfig, SamplingParams, load_model
from ch15_helpers.disagg.measure import measure_transport
from ch15_helpers.disagg.pipeline import DisaggCluster
from ch15_helpers.disagg.results import DisaggRun
from ch15_helpers.disagg.spec import DisaggSpec

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs two CUDA devices"),
]
SPEC = DisaggSpec(
    "random:TINY",
    device="cuda",
    transport="nccl",
    engine={"num_blocks": 512, "max_num_batched_tokens": 256},
    layers_per_part=1,
    handover_timeout_s=1.0,
    request_timeout_s=20.0,
    max_attempts=2,
    beat_s=0.05,
)
PROMPTS = [[1 + (7 * number + k) % 300 for k in range(200 + 9 * number)] for number in range(6)]
ANSWER = SamplingParams(max_tokens=40, ignore_eos=True)


def test_two_gpus_exchange_blocks_and_give_up_in_time(tmp_path: Path) -> None:
    found = launch("nccl", "tour", tmp_path)
    both = {"clean": True, "equal": True, "kept": True, "channels": True}
    assert found[0] == both
    # Messages between two ranks keep their order: what follows a late one waits for it.
    assert found[1] == {**both, "expired": "expired", "untouched": True, "late": 1, "after": True}


def test_a_corrupted_block_is_found(tmp_path: Path) -> None:
    assert launch("nccl", "damaged", tmp_path)[1] == {"recompute": [2], "state": "done"}


def test_a_peer_that_died_is_given_up(tmp_path: Path) -> None:
    found = launch("nccl", "orphaned", tmp_path)[1]
    # A short send is over once NCCL has it in a buffer of its own; a receive waits for ever.
    assert found["before"] == [True] and found["waited"][1] == "pending"
    assert found["after"][1:] == ["failed"] * 2 and "rank 0 is gone" in found["reason"]
    assert found["pool"]


def test_the_checked_transport_is_nearly_as_fast_as_plain_sends() -> None:
    times = measure_transport("nccl", num_blocks=128, rounds=5)
    assert times.fraction > 0.7, times


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    """Tokens of a single engine in this process."""
    engine = Engine(
        load_model("random:TINY", device="cuda:0", dtype=torch.float32),
        EngineConfig(num_blocks=512),
    )
    return [output.token_ids for output in engine.generate(PROMPTS, ANSWER)]


@pytest.fixture(scope="module")
def pair() -> Iterator[DisaggCluster]:
    """One rank of each side, which survive all."""
    with DisaggCluster.launch(SPEC) as cluster:
        yield cluster


def tokens(run: DisaggRun) -> list[list[int]]:
    assert [output.error for output in run.outputs] == [None] * len(PROMPTS)
    return [output.token_ids for output in run.outputs]


def test_tokens_are_those_of_one_engine(pair: DisaggCluster, expected: list[list[int]]) -> None:
    for overlap in (False, True):
        run = pair.run(PROMPTS, ANSWER, overlap=overlap)
        assert tokens(run) == expected
        pair.check_drained()


@pytest.mark.parametrize("fault", ["corrupt", "exchange"])
def test_damaged_parts_are_computed_again(
    pair: DisaggCluster, expected: list[list[int]], fault: str
) -> None:
    pair.fault(0, fault)
    run = pair.run(PROMPTS, ANSWER)
    assert tokens(run) == expected and run.ranks[1].num_recomputed > 0
    pair.check_drained()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_lost_completion_starts_the_handover_anew(
    pair: DisaggCluster, expected: list[list[int]], rank: int
) -> None:
    pair.fault(rank, "drop_completion")
    run = pair.run(PROMPTS, ANSWER)
    assert tokens(run) == expected and run.ranks[rank].num_lost == 1
    pair.mend(rank)
    pair.check_drained()


def test_a_link_that_stalls_ends_in_an_error_and_goes_on_when_mended(
    pair: DisaggCluster, expected: list[list[int]]
) -> None:
    pair.fault(0, "stall", count=100)
    stuck = pair.run(PROMPTS[:1], ANSWER)
    assert "2 attempts failed" in str(stuck.outputs[0].error)
    pair.mend(0)
    assert tokens(pair.run(PROMPTS, ANSWER)) == expected
    pair.check_drained()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_dies_and_the_other_one_does_not_hang(rank: int) -> None:
    role = SPEC.role(rank)
    with DisaggCluster.launch(SPEC) as cluster:
        if rank == 0:  # its bytes never come: the decode rank has a receive under way
            cluster.fault(0, "stall", count=100)
            hook = once(lambda c: c.num_started > 0, lambda: cluster.kill(0))
        else:
            hook = once(lambda c: c.num_started > 0, lambda: cluster.kill(1))
        began_s = time.monotonic()
        run = cluster.run(PROMPTS, ANSWER, on_poll=hook)
        assert time.monotonic() - began_s < SPEC.request_timeout_s
        errors = [str(output.error) for output in run.outputs if output.error]
        assert errors and all(f"{role} rank {rank}" in error for error in errors)
        assert not cluster.num_open
        cluster.check_drained()  # the survivor answers, and its pool is empty
