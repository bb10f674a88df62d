"""A study over real processes: rows are right, links are as counted, errors are told."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from ch15_helpers.errors import MoEError
from ch15_helpers.moe.expert_parallel import ExpertParallelConfig
from ch15_helpers.moe.launch import launch_study, read_answers
from ch15_helpers.moe.placement import ExpertPlacement
from ch15_helpers.moe.study import LayerStudy, Version
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
