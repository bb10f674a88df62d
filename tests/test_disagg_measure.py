"""The measurement runs alone, under torchrun on two nodes, and under mpirun; and what it must show.

Bandwidths are not asserted here: other processes share the machine's cores while tests run.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys

import pytest

from ch15_helpers.disagg.connect import Place, place_from_environment
from ch15_helpers.disagg.measure import handover_cost, measure_transport, orchestration_s
from ch15_helpers.disagg.spec import DisaggSpec
from ch15_helpers.errors import TransportError

MODULE = ["-m", "ch15_helpers.disagg.measure", "--rounds", "1", "--blocks", "3"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment() -> dict[str, str]:
    """Ours, without what another launcher may have left in it."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return {**kept, "OMP_NUM_THREADS": "1"}


def check(text: str) -> None:
    """The report has every line, with numbers that make sense."""
    for what in ("plain send and recv", "transport, checked", "transport, unchecked"):
        found = re.search(rf"{what} +([0-9.]+) GB/s", text)
        assert found, text
        assert float(found[1]) > 0
    assert "fitted link" in text and "orchestration" in text


def test_orchestration_takes_less_than_two_milliseconds_a_request() -> None:
    assert min(orchestration_s(rounds=15) for _ in range(3)) < 2e-3


def test_handovers_between_ranks_are_measured() -> None:
    """In one part and in several; how much hides is not asserted: this model is too small."""
    spec = DisaggSpec("random:TINY", engine={"num_blocks": 64}, layers_per_part=1)
    cost = handover_cost(spec, prompt_tokens=40, num_requests=3)
    assert 0 < cost.whole_s < 0.1 and 0 < cost.layered_s < 0.1
    assert cost.num_parts >= 2 and cost.hidden_share <= 1


def test_two_processes_are_measured() -> None:
    times = measure_transport("gloo", num_blocks=3, rounds=1)
    assert times.num_bytes == 3 * 737_280
    assert times.transport_GBps > 0 and times.unverified_GBps > 0 and times.fraction > 0
    assert times.unverified_fraction == times.unverified_GBps / times.plain_GBps
    assert [size // 737_280 for size, _ in times.samples] == [1, 2, 3]
    with pytest.raises(TransportError, match="medium must be one of"):
        measure_transport("carrier pigeon", rounds=1)  # type: ignore[arg-type]


def test_two_nodes_of_torchrun() -> None:
    """The form for many machines, ``torchrun --nnodes``, with both nodes on this one."""
    port = str(free_port())
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", node,
             "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", port, *MODULE],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(),
        )
        for node in ("0", "1")
    ]  # fmt: skip
    outputs = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    check("".join(outputs))


def why_no_mpi() -> str | None:
    if shutil.which("mpirun") is None:
        return "there is no mpirun (Debian: openmpi-bin)"
    if importlib.util.find_spec("mpi4py") is None:
        return "mpi4py is not installed"
    return None


@pytest.mark.skipif(why_no_mpi() is not None, reason=str(why_no_mpi()))
def test_two_processes_of_mpirun() -> None:
    ucx = ["--mca", "pml", "ucx", "--mca", "osc", "ucx", "--mca", "pml_ucx_tls", "any",
           "--mca", "pml_ucx_devices", "any", "-x", "UCX_TLS=sm,self"]  # fmt: skip
    command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-np", "2"]
    command += [*ucx, sys.executable, *MODULE, "--medium", "mpi"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=environment(), check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    check(done.stdout)


def test_a_place_comes_from_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
    ):
        monkeypatch.delenv(name, raising=False)
    assert place_from_environment() is None
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert place_from_environment() == Place(3, 4, local_rank=3)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert place_from_environment() == Place(3, 4, local_rank=1)
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert place_from_environment() == Place(1, 2)
