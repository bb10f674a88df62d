"""One rank of some studies: ``python -m ch15_helpers.moe.worker STUDIES.json FOLDER``."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ch15_helpers.moe.drift_study import DriftStudy, run_drift_study
from ch15_helpers.moe.model_study import ModelStudy, run_model_study
from ch15_helpers.moe.stack_study import StackStudy, run_stack_study
from ch15_helpers.moe.study import LayerStudy, StudyRow, run_study

_PATIENCE = timedelta(minutes=2)  # for ranks that never come


def main(spec: str, folder: str) -> None:
    """Join the group, run the studies in order, and write ``rankN.json`` into ``folder``."""
    entries = json.loads(Path(spec).read_text(encoding="utf-8"))
    rank, device = int(os.environ["RANK"]), torch.device("cpu")
    if entries[0]["fields"]["device"] == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    options = None
    if device.type == "cuda":
        # A transfer's few blocks go before those of a product that became ready with it.
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=os.environ.get("CH15_MOE_MEET", "env://"),
        rank=rank,
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=_PATIENCE,
        pg_options=options,
    )
    with torch.inference_mode():
        answers = [_run(entry["kind"], entry["fields"], rank, device) for entry in entries]
    Path(folder, f"rank{rank}.json").write_text(json.dumps(answers), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def _run(
    kind: str, fields: dict[str, Any], rank: int, device: torch.device
) -> list[dict[str, Any]]:
    """Rows of one study as plain data."""
    if kind == "LayerStudy":
        return [_plain(row) for row in run_study(LayerStudy.from_dict(fields), rank, device)]
    if kind == "ModelStudy":
        models = run_model_study(ModelStudy.from_dict(fields), rank, device)
        return [dataclasses.asdict(row) for row in models]
    if kind == "StackStudy":
        stacks = run_stack_study(StackStudy.from_dict(fields), rank, device)
        return [dataclasses.asdict(row) for row in stacks]
    drifts = run_drift_study(DriftStudy.from_dict(fields), rank, device)
    return [dataclasses.asdict(row) for row in drifts]


def _plain(row: StudyRow) -> dict[str, Any]:
    fields = dataclasses.asdict(dataclasses.replace(row, links=type(row.links)()))
    fields["links"] = [[*link, count] for link, count in row.links.items()]
    return fields


if __name__ == "__main__":
    main(*sys.argv[1:])
