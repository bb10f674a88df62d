"""A study over real processes: rows are right, links are as counted, errors are told."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from ch15_helpers.errors import MoEError
from ch15_helpers.moe.captured import CapturedCall
from ch15_helpers.moe.drift_study import DriftStudy
from ch15_helpers.moe.expert_parallel import ExpertParallelConfig
from ch15_helpers.moe.launch import (
    drift_rows,
    launch_studies,
    launch_study,
    layer_rows,
    model_rows,
    read_answers,
    stack_rows,
)
from ch15_helpers.moe.model_study import ModelStudy, ModelVersion
from ch15_helpers.moe.modelled_link import ModelledLink
from ch15_helpers.moe.placement import ExpertPlacement
from ch15_helpers.moe.rebalance import serve_under_drift
from ch15_helpers.moe.stack_study import StackStudy, StackVersion
from ch15_helpers.moe.study import LayerStudy, Version, make_link
from ch15_helpers.moe.topics import route_topics
from ch15_helpers.moe.traffic import count_links

STUDY = LayerStudy(
    num_ranks=2,
    num_experts=6,
    top_k=3,
    hidden=64,
    inner=32,
    shared_inner=48,
    skew=0.5,
    iterations=2,
    tokens=((5, 0), (40, 33)),
    versions=(
        Version("pairs", ExpertParallelConfig(deduplicate=False)),
        Version("plain"),
        Version("overlapped", overlap=True),
        Version("chunks", overlap=True, num_chunks=2),
        Version("fp8", ExpertParallelConfig(True, torch.bfloat16), overlap=True),
        Version(
            "nodes",
            ExpertParallelConfig(ranks_per_node=1, nearest_replica=True),
            slots=((0, 1, 2, 3), (3, 4, 5, 0)),
        ),
    ),
)


def test_rows_of_a_study_on_two_processes():
    rows = launch_study(STUDY)
    assert [(r.version, r.tokens) for r in rows] == [
        (v.name, sizes) for sizes in STUDY.tokens for v in STUDY.versions
    ]
    for row in rows:
        version = next(v for v in STUDY.versions if v.name == row.version)
        assert row.error < (3e-2 if version.name == "fp8" else 1e-6)
        assert len(row.samples_s) == 2 and min(row.samples_s) > 0
        assert min(dataclasses.astuple(row.phases)) > 0
        batches = [STUDY.batch(STUDY.tokens.index(row.tokens), rank)[2] for rank in range(2)]
        slots = version.slots
        placement = ExpertPlacement(6, slots) if slots else ExpertPlacement.even(6, 2)
        counted = count_links(batches, placement, version.config, 64, torch.float32, 3)
        # Counts of all chunks travel in one message.
        if version.num_chunks == 1:
            assert row.links == counted
        else:
            assert {k: n for k, n in row.links.items() if k[0] != "counts"} == {
                k: n for k, n in counted.items() if k[0] != "counts"
            }
    by_name = {row.version: sum(row.links.values()) for row in rows[len(STUDY.versions) :]}
    assert by_name["pairs"] > by_name["plain"] > by_name["fp8"]


def test_a_study_survives_json_and_names_what_is_wrong():
    assert LayerStudy.from_dict(json.loads(json.dumps(STUDY.to_dict()))) == STUDY
    with pytest.raises(MoEError, match="distinct names"):
        dataclasses.replace(STUDY, versions=(Version("a"), Version("a")))
    with pytest.raises(MoEError, match="each of 2 ranks"):
        dataclasses.replace(STUDY, tokens=((1, 2, 3),))
    with pytest.raises(MoEError, match="expected float32"):
        dataclasses.replace(STUDY, dtype="float64")


def test_a_rank_that_fails_is_named_with_what_it_wrote(tmp_path):
    broken = dataclasses.replace(STUDY, versions=(Version("short", slots=((0, 1, 2), (3, 4, 4))),))
    with pytest.raises(MoEError, match=r"rank \d ended with 1 and wrote:(.|\n)*missing \[5\]"):
        launch_study(broken)
    with pytest.raises(MoEError, match="did not finish in 0 s"):
        launch_study(STUDY, timeout_s=0.0)
    with pytest.raises(MoEError, match="rank 0 did not answer"):
        read_answers(tmp_path, 1)


def test_three_studies_on_one_start_of_the_processes():
    slow = (1e-3, 0.05)
    layer = dataclasses.replace(
        STUDY,
        tokens=((64, 64),),
        versions=(
            Version("plain"),
            Version("bare", bare=True),
            Version("held", link=slow),
            Version("shifted", shift=True),
        ),
    )
    model = ModelStudy(
        num_ranks=2, source="random:TINY_MOE", prompts=2, length=9, new_tokens=4, iterations=1,
        versions=(
            ModelVersion("plain"), ModelVersion("two", 2, overlap=True, link=(1e-3, 1.0)),
            ModelVersion("shifted", shift=True),
        ),
    )  # fmt: skip
    drift = DriftStudy(
        num_ranks=2, num_experts=8, top_k=2, hidden=32, inner=16, slots_per_rank=6, tokens=200,
        num_batches=12, interval=4, window=4, skew=1.2, shift_at=6,
    )  # fmt: skip
    ways = (StackVersion("whole"), StackVersion("two", 2, overlap=True))
    stack = StackStudy(
        2, "TINY_MOE", 2, ways, ((2, 5), (3, 1)), shared_inner=16, dtype="float32", device="cpu",
        iterations=2,
    )  # fmt: skip
    parts = launch_studies([layer, model, drift, stack])
    stacked = stack_rows(parts[3])
    assert [(r.version, r.sequences, r.length) for r in stacked] == [
        (way.name, *point) for point in stack.points for way in ways
    ]
    assert max(row.error for row in stacked) < 1e-5
    assert min(min(row.samples_s) for row in stacked) > 0
    plain, bare, held, shifted = layer_rows(parts[0])
    assert bare.links == plain.links == held.links
    assert max(plain.error, held.error) < 1e-6 < 0.1 < shifted.error
    # Three messages at least, each with its latency; the larger ones with their bytes.
    away = [sum(n for link, n in held.links.items() if link[1] == rank) for rank in range(2)]
    assert min(held.samples_s) > 3 * slow[0] + min(away) / 2 / (slow[1] * 1e9)
    same = {row.version: row.same_tokens for row in model_rows(parts[1])}
    assert same == {"plain": True, "two": True, "shifted": False}
    fixed, moved = drift_rows(parts[2])
    assert (fixed.stalls_s, fixed.moved_bytes, len(moved.stalls_s)) == ((), 0, 2)
    assert moved.moved_bytes % (3 * 32 * 16 * 4) == 0 < moved.moved_bytes
    assert max(fixed.error, moved.error) < 1e-6
    modelled = serve_under_drift(
        drift.counts(), 2, 6, interval=4, window=4, s_per_pair=1e-6, bytes_per_expert=6144,
        port_GBps=1.0,
    )  # fmt: skip
    assert modelled.max_over_mean == pytest.approx(moved.max_over_mean)
    assert modelled.moved_bytes == moved.moved_bytes
    assert sum(moved.max_over_mean) < sum(fixed.max_over_mean)


def test_what_studies_cannot_do_is_refused():
    for study in (ModelStudy(2, "m", (ModelVersion("a", link=(0.1, 2.0)),)),
                  DriftStudy(2, 8, 2, 32, 16, 5, 10, 4, 2, 2)):  # fmt: skip
        assert type(study).from_dict(json.loads(json.dumps(study.to_dict()))) == study
    with pytest.raises(MoEError, match="one level"):
        Version("a", ExpertParallelConfig(ranks_per_node=1), bare=True)
    with pytest.raises(MoEError, match="holds up the host"):
        dataclasses.replace(STUDY, device="cuda", versions=(Version("a", link=(0.0, 1.0)),))
    with pytest.raises(MoEError, match="one of each"):
        launch_studies([STUDY, dataclasses.replace(STUDY, device="cuda")])
    with pytest.raises(MoEError, match="between 1 and 4"):
        ModelStudy(2, "m", (ModelVersion("a", batches=5),))
    with pytest.raises(MoEError, match="positive rates"):
        ModelledLink(0.0, 0.0)


def test_a_modelled_link_takes_its_latency_and_the_fuller_direction():
    link = ModelledLink(latency_s=2.0, port_GBps=1.0)
    assert link.cost_s(0, [0, 1], [9, 3_000_000_000], [9, 1_000_000_000]) == (2.0, 3.0)
    assert link.cost_s(0, [0, 1], [5, 0], [5, 0]) == (0.0, 0.0)
    nodes = make_link((2.0, 1.0, 2, 0.5, 10.0))
    far, near = 1_000_000_000, 40_000_000_000
    # The ports work at once: inside 4 s, between nodes 2 s for the two ranks over there.
    assert nodes.cost_s(1, range(4), [near, 0, far, far], [0] * 4) == (2.0, 4.0)
    assert nodes.cost_s(1, [0, 1], [near, 7], [0, 7]) == (0.5, 4.0)


def test_experts_of_a_topic_work_together():
    weights, ids = route_topics(500, 12, 3, 4, mixed=0.0, seed=1)
    assert ((ids % 4) == (ids[:, :1] % 4)).all()
    assert ids.sort(-1).values.diff(dim=-1).min() > 0
    assert torch.allclose(weights.sum(-1), torch.ones(500))
    assert torch.equal(ids, route_topics(500, 12, 3, 4, mixed=0.0, seed=1)[1])
    mixed = route_topics(500, 12, 3, 4, mixed=0.2, seed=1)[1]
    alone = ((mixed % 4) == (mixed[:, :1] % 4)).all(-1).float().mean()
    assert 0.78 < alone < 0.9
    with pytest.raises(MoEError, match="topics of 3 experts"):
        route_topics(5, 12, 4, 4)


def test_what_a_gpu_must_do_is_not_asked_of_cpus():
    fixed = ExpertParallelConfig(max_tokens=8)
    with pytest.raises(MoEError, match="messages of a fixed size"):
        Version("graph", captured=True)
    with pytest.raises(MoEError, match="ranks on GPUs"):
        dataclasses.replace(STUDY, versions=(Version("graph", fixed, captured=True),))
    with pytest.raises(MoEError, match="ranks on GPUs"):
        StackStudy(2, "TINY_MOE", 1, (StackVersion("graph", captured=True),), ((1, 1),),
                   device="cpu")  # fmt: skip
    with pytest.raises(MoEError, match="2 sequences or more"):
        StackStudy(2, "TINY_MOE", 1, (StackVersion("two", 2),), ((1, 1),))
    with pytest.raises(MoEError, match="expected a CUDA device"):
        CapturedCall(torch.neg, torch.zeros(1))
