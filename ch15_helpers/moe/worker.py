"""One rank of a study: ``python -m ch15_helpers.moe.worker STUDY.json FOLDER``, see ``launch``."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from ch15_helpers.moe.study import LayerStudy, run_study

_PATIENCE = timedelta(minutes=2)  # for ranks that never come


def main(spec: str, folder: str) -> None:
    """Join the group, run the study, and write ``rankN.json`` into ``folder``."""
    study = LayerStudy.from_dict(json.loads(Path(spec).read_text(encoding="utf-8")))
    rank, device = int(os.environ["RANK"]), torch.device("cpu")
    if study.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=os.environ.get("CH15_MOE_MEET", "env://"),
        rank=rank,
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=_PATIENCE,
    )
    with torch.inference_mode():
        rows = run_study(study, rank, device)
    answer = []
    for row in rows:
        fields = dataclasses.asdict(dataclasses.replace(row, links=type(row.links)()))
        fields["links"] = [[*link, count] for link, count in row.links.items()]
        answer.append(fields)
    Path(folder, f"rank{rank}.json").write_text(json.dumps(answer), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
