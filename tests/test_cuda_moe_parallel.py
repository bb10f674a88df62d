"""Expert parallelism over NCCL, one GPU for each rank, with as many as there are (up to four)."""

from __future__ import annotations

import pytest
import torch

from ch15_helpers.moe.expert_parallel import ExpertParallelConfig
from ch15_helpers.moe.launch import launch_study
from ch15_helpers.moe.placement import ExpertPlacement
from ch15_helpers.moe.study import LayerStudy, Version
from ch15_helpers.moe.traffic import count_links

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_version_is_the_one_rank_layer(dtype: str) -> None:
    ranks = 1 << (min(4, torch.cuda.device_count()).bit_length() - 1)
    fixed = ExpertParallelConfig(max_tokens=750)
    study = LayerStudy(
        num_ranks=ranks,
        num_experts=32,
        top_k=4,
        hidden=512,
        inner=256,
        shared_inner=256,
        skew=0.6,
        dtype=dtype,
        device="cuda",
        iterations=2,
        tokens=((1,) * ranks, (0,) * (ranks - 1) + (7,), tuple(700 + r for r in range(ranks))),
        versions=(
            Version("pairs", ExpertParallelConfig(deduplicate=False)),
            Version("plain"),
            Version("chunks", overlap=True, num_chunks=2),
            Version("fp8", ExpertParallelConfig(True, torch.bfloat16), overlap=True),
            Version("fixed", fixed),
            Version("nodes", ExpertParallelConfig(ranks_per_node=max(1, ranks // 2))),
            Version("graph", fixed, overlap=True, captured=True),
            Version("graph of chunks", fixed, True, 2, captured=True),
        ),
    )
    placement = ExpertPlacement.even(32, ranks)
    for row in launch_study(study):
        version = next(v for v in study.versions if v.name == row.version)
        point = study.tokens.index(row.tokens)
        rough = dtype == "bfloat16" or row.version == "fp8"
        assert row.error < (5e-2 if rough else 2e-3), row
        experts = [study.batch(point, rank)[2] for rank in range(ranks)]
        config, kind = version.config, getattr(torch, dtype)
        counted = count_links(experts, placement, config, 512, kind, 4)
        for counts in (row.links, counted):
            for link in [link for link in counts if link[0].startswith("counts")]:
                del counts[link]
        assert row.links == counted
