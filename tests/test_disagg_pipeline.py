"""Prefill and decode ranks in real processes: the tokens of one engine, whatever the split."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from ch15_helpers import Engine, EngineConfig, SamplingParams, load_model
from ch15_helpers.disagg.link import LinkModel
from ch15_helpers.disagg.overlap import (
    ModelledOverlap,
    Pace,
    even_parts,
    modelled_overlap,
    overlap_report,
    part_ends,
)
from ch15_helpers.disagg.pipeline import DisaggCluster
from ch15_helpers.disagg.results import DisaggRun, union_s
from ch15_helpers.disagg.spec import DisaggSpec, even_split, resolve_network
from ch15_helpers.disagg.wire_nixl import why_no_nixl
from ch15_helpers.errors import InvalidRequestError, TransportError
from ch15_helpers.serving.workload import Workload, WorkloadRequest

ENGINE = {"num_blocks": 40, "max_num_batched_tokens": 48}
SPEC = DisaggSpec("random:TINY", engine=ENGINE, layers_per_part=1, beat_s=0.05)
PROMPTS = [[1 + (7 * number + k) % 300 for k in range(5 + 23 * number)] for number in range(6)]
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=12, ignore_eos=True, temperature=1.0)


def reference(params: SamplingParams) -> list[list[int]]:
    """Tokens of a single engine in this process."""
    engine = Engine(load_model("random:TINY", device="cpu"), EngineConfig(num_blocks=256))
    return [output.token_ids for output in engine.generate(PROMPTS, params)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[DisaggCluster]:
    """One prefill and one decode rank that no test kills."""
    with DisaggCluster.launch(SPEC, threads=1) as cluster:
        yield cluster


def tokens(run: DisaggRun) -> list[list[int]]:
    return [output.token_ids for output in run.outputs]


def no_errors(run: DisaggRun) -> bool:
    return not any(output.error for output in run.outputs)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_tokens_are_those_of_one_engine(
    cluster: DisaggCluster, overlap: bool, params: SamplingParams
) -> None:
    run = cluster.run(PROMPTS, params, overlap=overlap)
    assert tokens(run) == reference(params)
    assert no_errors(run) and run.kind == "measured" and not run.num_replaced
    cluster.check_drained()
    prefill, decode = run.ranks
    total = sum(map(len, PROMPTS))
    assert (prefill.role, decode.role) == ("prefill", "decode")
    assert prefill.num_tokens == total  # each prompt once
    assert decode.num_tokens == sum(len(output.token_ids) - 1 for output in run.outputs)
    assert prefill.num_bytes == decode.num_bytes > 0
    assert prefill.num_parts == decode.num_parts >= len(PROMPTS) * (2 if overlap else 1)
    assert decode.num_handovers == prefill.num_handovers == len(PROMPTS)
    assert decode.max_batch > 1  # decodes of several requests in one step


@pytest.mark.parametrize("num_batched", [4096, 256])  # prompts in one step: their parts are planned
def test_parts_that_are_not_sent_after_all_keep_no_block(num_batched: int) -> None:
    """A first token that ends its request: what waits for parts of it learns that none come."""
    prompts = [[1 + (5 * number + 3 * k) % 400 for k in range(520 + number)] for number in range(4)]
    engine = Engine(load_model("random:TINY", device="cpu"), EngineConfig(num_blocks=256))
    first = engine.generate(prompts, SamplingParams(max_tokens=1))
    ends = [SamplingParams(max_tokens=9, stop_token_ids=(out.token_ids[0],)) for out in first]
    options = {"num_blocks": 160, "max_num_batched_tokens": num_batched}
    spec = DisaggSpec.from_dict({**SPEC.to_dict(), "engine": options})
    with DisaggCluster.launch(spec, threads=1) as cluster:
        for overlap in (False, True):
            run = cluster.run(prompts, ends, overlap=overlap)
            assert tokens(run) == [out.token_ids for out in first]
            cluster.check_drained()
        run = cluster.run(prompts, GREEDY)
        assert no_errors(run) and len(run.handovers) == len(prompts)
        # Parts that are planned have no message of their own: reserve, grant and final are all.
        counts = {each.num_messages for each in run.handovers}
        assert counts == {3} if num_batched == 4096 else min(counts) > 3


def test_a_handover_is_taken_apart(cluster: DisaggCluster) -> None:
    for overlap in (True, False):
        run = cluster.run(PROMPTS, GREEDY, overlap=overlap, max_open=1)
        assert len(run.handovers) == len(PROMPTS)
        for output, handover in zip(run.outputs, run.handovers, strict=True):
            assert handover.prompt_tokens == len(output.prompt_token_ids)
            assert handover.num_parts == len(handover.spans)
            assert handover.num_bytes == sum(span[2] for span in handover.spans)
            # Parts leave after they are computed, and in whole runs after the first token.
            earliest = 0.0 if overlap else handover.prefill_s
            assert all(start >= max(ready, earliest) for start, _, _, ready in handover.spans)
            # The pieces add up to the time between the first two tokens.
            gap_s = output.metrics.itl_s[0]
            assert handover.handover_s == pytest.approx(gap_s, abs=1e-6)
            assert handover.bytes_s == union_s(handover.spans) > 0
            assert handover.orchestration_s > 0 and handover.metadata_bytes > 0
            assert (output.prefill_rank, output.decode_rank) == (0, 1)
            assert sum(stop - start for start, stop in handover.prefill_steps) > 0


def test_the_first_token_may_end_a_request(cluster: DisaggCluster) -> None:
    first = reference(GREEDY)[0][0]
    one = SamplingParams(max_tokens=1, ignore_eos=True)
    stop = SamplingParams(max_tokens=9, ignore_eos=True, stop_token_ids=(first,))
    run = cluster.run([PROMPTS[0]] * 2, [one, stop])
    assert tokens(run) == [[first], [first]]
    assert [output.finish_reason for output in run.outputs] == ["length", "stop"]
    assert not run.handovers
    cluster.check_drained()


def test_what_can_never_fit_fails_alone(cluster: DisaggCluster) -> None:
    run = cluster.run([[5] * 16 * 41, PROMPTS[1], [10**9]], GREEDY)
    assert "KV blocks" in str(run.outputs[0].error)
    assert run.outputs[1].token_ids == reference(GREEDY)[1]
    assert "token id" in str(run.outputs[2].error)
    cluster.check_drained()
    with pytest.raises(InvalidRequestError, match="arrivals"):
        cluster.run(PROMPTS, GREEDY, arrivals_s=[0.0])


def test_a_modelled_network_and_a_workload(cluster: DisaggCluster) -> None:
    requests = tuple(WorkloadRequest(0.02 * i, 40 + 9 * i, 4) for i in range(4))
    workload = Workload("four", requests, seed=3)
    slow = LinkModel(latency_s=0.08, bandwidth_GBps=1.0)
    run = cluster.run(workload, network=slow, overlap=False)
    assert no_errors(run) and run.kind == "modelled" and run.network == slow
    assert [len(output.token_ids) for output in run.outputs] == [4] * 4
    assert all(handover.exposed_s >= 0.08 for handover in run.handovers)
    assert list(run.arrivals_s) == pytest.approx([0.0, 0.02, 0.04, 0.06])
    layered = cluster.run(workload, network=slow, overlap=True)
    report = overlap_report(run, layered)
    assert report.exposed_s >= 0 and report.bytes_s >= 0.08
    with pytest.raises(ValueError, match="without overlap"):
        overlap_report(layered, run)
    plain = cluster.run(workload)
    assert plain.kind == "measured" and tokens(plain) == tokens(run) == tokens(layered)


def test_damage_shows(cluster: DisaggCluster) -> None:
    """The same-tokens check can fail: scrambled pages change the tokens."""

    def damage(cluster: DisaggCluster) -> None:
        if cluster.num_decoding:
            cluster.damage(1)

    params = SamplingParams(max_tokens=200, ignore_eos=True)
    clean = cluster.run(PROMPTS[3:], params)
    broken = cluster.run(PROMPTS[3:], params, on_poll=damage)
    assert tokens(broken) != tokens(clean)


def test_an_interrupted_run_leaves_nothing_behind(cluster: DisaggCluster) -> None:
    def interrupt(cluster: DisaggCluster) -> None:
        if cluster.num_started:
            raise KeyboardInterrupt

    params = SamplingParams(max_tokens=300, ignore_eos=True)
    with pytest.raises(KeyboardInterrupt):
        cluster.run(PROMPTS, params, on_poll=interrupt)
    assert tokens(cluster.run(PROMPTS, GREEDY)) == reference(GREEDY)
    cluster.check_drained()


@pytest.mark.parametrize("fault", ["corrupt", "exchange"])
def test_damaged_parts_are_computed_again(cluster: DisaggCluster, fault: str) -> None:
    cluster.fault(0, fault, count=1)
    run = cluster.run(PROMPTS[4:], GREEDY, overlap=False)
    assert tokens(run) == reference(GREEDY)[4:]
    assert run.ranks[1].num_recomputed == (1 if fault == "corrupt" else 2)
    cluster.check_drained()


@pytest.fixture(scope="module")
def crowded() -> Iterator[DisaggCluster]:
    """Two prefill ranks, one decode rank with room for about two requests; n-gram speculation."""
    spec = DisaggSpec(
        "random:TINY",
        num_prefill=2,
        engine={**ENGINE, "enable_prefix_caching": False},
        prefill_engine={"enable_prefix_caching": True},
        decode_engine={"num_blocks": 20},
        speculate="ngram",
    )
    with DisaggCluster.launch(spec, threads=1) as cluster:
        yield cluster


def test_a_full_decode_pool_makes_prefill_wait(crowded: DisaggCluster) -> None:
    run = crowded.run(PROMPTS * 2, GREEDY)
    assert tokens(run) == reference(GREEDY) * 2
    assert {output.prefill_rank for output in run.outputs} == {0, 1}
    assert run.ranks[2].peak_blocks <= 20 and run.ranks[2].backpressure_s > 0
    assert max(handover.blocked_s for handover in run.handovers) > 0
    crowded.check_drained()


def test_speculation_on_the_decode_side(crowded: DisaggCluster) -> None:
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    repeating = [[11, 12, 13, 14] * 10, [21, 22, 23] * 9]
    engine = Engine(load_model("random:TINY", device="cpu"), EngineConfig(num_blocks=256))
    expected = [output.token_ids for output in engine.generate(repeating, params)]
    run = crowded.run(repeating, params)
    assert tokens(run) == expected
    decode = run.ranks[2]
    assert decode.num_drafted >= decode.num_accepted > 0
    # Whether both answers share steps is a matter of when they arrive; accepted drafts save some.
    assert 59 - decode.num_accepted <= decode.num_steps < 2 * 59
    plain = crowded.run(repeating, params, draft_length=0)
    assert tokens(plain) == expected and not plain.ranks[2].num_drafted
    assert 59 <= plain.ranks[2].num_steps <= 2 * 59
    crowded.check_drained()


@pytest.mark.skipif(why_no_nixl() is not None, reason=str(why_no_nixl()))
def test_one_prefill_and_two_decode_ranks_over_nixl() -> None:
    spec = DisaggSpec(
        "random:TINY",
        num_decode=2,
        engine=ENGINE,
        transport="nixl",
        speculate="layer_skip",
        policy="round_robin",
    )
    with DisaggCluster.launch(spec, threads=1) as cluster:
        run = cluster.run(PROMPTS, GREEDY)
        assert tokens(run) == reference(GREEDY)
        assert {output.decode_rank for output in run.outputs} == {1, 2}
        assert sum(rank.num_drafted for rank in run.ranks) > 0
        cluster.check_drained()


@pytest.mark.parametrize(("layers", "size"), [(30, 3), (2, 1), (1, 1), (7, 10), (30, 1), (5, 2)])
def test_parts_cover_all_layers_and_get_smaller(layers: int, size: int) -> None:
    ends = part_ends(layers, size)
    sizes = [last - first for first, last in itertools.pairwise([0, *ends])]
    assert sum(sizes) == layers and min(sizes) >= 1
    assert sizes[-1] == min(size, layers)
    assert max(sizes) <= max(size, -(-layers // 2))
    assert len(sizes) <= layers.bit_length() + 1


@pytest.mark.parametrize(("ratio", "num_parts"), [(1.0, 4), (2.5, 3), (8.0, 2), (40.0, 2)])
def test_a_faster_link_gets_fewer_parts_that_hide_as_well(ratio: float, num_parts: int) -> None:
    """On a link twice as fast, which is what ``Pace`` asks for, each arrives before the next."""
    ends = part_ends(30, 3, ratio)
    assert ends[-1] == 30 and ends[-2] == 27 and len(ends) == num_parts
    for first, last, following in zip([0, *ends], ends, ends[1:], strict=False):
        assert (last - first) / (2 * ratio) <= following - last + 1


def test_the_ratio_comes_from_what_was_seen() -> None:
    pace = Pace()
    assert pace.ratio(256, 10_000) == 1.0, "nothing is known"
    pace.computed(256, 29, 0.29)  # 10 ms a layer
    for seconds in (4e-3, 1e-3, 9e-3):  # waiting for the thread included
        pace.sent(1_000_000, seconds)
    assert pace.ratio(256, 1_000_000) == pytest.approx(5.0), "10 ms over twice 1 ms"
    assert pace.ratio(512, 1_000_000) == pytest.approx(10.0)
    assert pace.ratio(256, 400_000_000) == 1.0, "a slow link: halves"
    for _ in range(8):
        pace.sent(1_000_000, 5e-3)
    assert pace.ratio(256, 1_000_000) == pytest.approx(1.0), "the link has become slower"
    pace.forget_link()
    assert pace.ratio(256, 10) == 1.0


def test_what_can_hide_is_modelled() -> None:
    def overlap(bandwidth_GBps: float) -> ModelledOverlap:
        sizes, ready_s = even_parts(12_000_000, 2, 30, 3, prefill_s=0.4)
        assert sum(sizes) == pytest.approx(12_000_000, rel=1e-6)
        return modelled_overlap(sizes, ready_s, 0.4, LinkModel(1e-5, bandwidth_GBps))

    # A fast link: all but the last part of the last of two chunks, 3 of 30 layers.
    assert overlap(1.0).hidden_share == pytest.approx(1 - 3 / 30 / 2, abs=0.01)
    exposed_s = [overlap(rate).exposed_s for rate in (10.0, 1.0, 0.1, 0.03, 0.01)]
    assert exposed_s == sorted(exposed_s)
    # A link that is busy from the first chunk's end on, twice as long as that.
    slow = overlap(12e-3 / 0.8)
    assert slow.exposed_s == pytest.approx(0.2 + 0.8 - 0.4, abs=1e-3)


def test_ranks_are_split_and_nonsense_is_refused() -> None:
    assert even_split(4, None, None) == (2, 2)
    assert even_split(5, 1, None) == (1, 4)
    assert even_split(5, None, 2) == (3, 2)
    for arguments in [(3, None, None), (4, 4, None), (4, 1, 1)]:
        with pytest.raises(TransportError):
            even_split(*arguments)
    with pytest.raises(TransportError, match="fields of EngineConfig"):
        DisaggSpec(engine={"blocks": 3})
    with pytest.raises(TransportError, match="NCCL"):
        DisaggSpec(transport="nccl")
    with pytest.raises(TransportError, match="there is no link"):
        resolve_network("token-ring")
    with pytest.raises(TransportError, match="mpirun"):
        DisaggCluster.launch(DisaggSpec(transport="mpi"))
    assert DisaggSpec.from_dict(SPEC.to_dict()) == SPEC
