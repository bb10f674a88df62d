"""Starts prefill and decode ranks: ``torchrun --nproc_per_node N -m ch15_helpers.disagg.launch``.

Three ways, one protocol. Under torchrun each rank is a keeper of an engine process (see
``serving.replicas``: torchrun ends everybody when one fails, which is wrong for serving), and rank
0 is the coordinator, too. Under mpirun the engine is the MPI process itself, and the coordinator a
thread of rank 0. ``launch_cluster``, for notebooks and tests, starts the engines directly.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import IO, Any

from ch15_helpers.disagg.connect import MEDIA
from ch15_helpers.disagg.link import LINKS
from ch15_helpers.disagg.pipeline import DisaggCluster
from ch15_helpers.disagg.results import DisaggRun
from ch15_helpers.disagg.spec import DisaggSpec, even_split
from ch15_helpers.disagg.wire_mpi import load_mpi, under_mpirun
from ch15_helpers.errors import TransportError
from ch15_helpers.serving.replica_launch import (
    ADDRESS_VARIABLE,
    TOKEN_VARIABLE,
    Launched,
    Link,
    accept_replicas,
    launch_ranks,
)
from ch15_helpers.serving.replicas import keep, rendezvous
from ch15_helpers.serving.request import SamplingParams

_START_S = 300.0


class Processes:
    """Several processes as one, as far as starting and ending them goes."""

    def __init__(self, members: Sequence[subprocess.Popen[bytes]]) -> None:
        self._members = list(members)

    @property
    def returncode(self) -> int | None:
        """None while any of them runs; otherwise the worst status."""
        codes = [member.returncode for member in self._members]
        return None if None in codes else max((c or 0 for c in codes), key=abs)

    def poll(self) -> int | None:
        """See ``subprocess.Popen``."""
        for member in self._members:
            member.poll()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """See ``subprocess.Popen``; the timeout is for each."""
        for member in self._members:
            member.wait(timeout)
        return self.returncode or 0

    def terminate(self) -> None:
        """See ``subprocess.Popen``."""
        for member in self._members:
            member.terminate()

    def kill(self) -> None:
        """See ``subprocess.Popen``."""
        for member in self._members:
            member.kill()


def launch_cluster(
    spec: DisaggSpec, *, timeout_s: float = 120.0, threads: int | None = None
) -> DisaggCluster:
    """See ``DisaggCluster.launch``."""
    if spec.transport == "mpi":
        raise TransportError("MPI ranks are started by mpirun: make mpi-decode NP=2")
    store = _new_store("127.0.0.1")
    token = ""

    def start(environment: Mapping[str, str], log: IO[bytes]) -> Processes:
        nonlocal token
        token = environment[TOKEN_VARIABLE]
        host, _, port = environment[ADDRESS_VARIABLE].rpartition(":")
        meeting = {"host": host, "port": int(port), "token": token}
        orders = [
            _order(spec, rank, rank, meeting, ("127.0.0.1", store.port))
            for rank in range(spec.num_ranks)
        ]
        return Processes([start_rank(order, environment, log) for order in orders])

    launched = launch_ranks(start, spec.num_ranks, timeout_s=timeout_s, threads=threads)
    return DisaggCluster(launched.links, spec, token, _with_store(launched, store))


def _with_store(launched: Launched, store: Any) -> Launched:
    launched.store = store  # kept as long as the ranks are
    return launched


def _new_store(host: str) -> Any:
    """Where ranks find each other; it belongs to nobody who may be killed in a test."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    return TCPStore(host, 0, is_master=True, wait_for_workers=False)


def _order(
    spec: DisaggSpec, rank: int, local_rank: int, meeting: Mapping[str, Any], store: Any
) -> dict[str, Any]:
    place = {"rank": rank, "local_rank": local_rank, "store": list(store)}
    return {"spec": spec.to_dict(), "keeper_pid": os.getpid(), **place, **meeting}


def start_rank(
    order: Mapping[str, Any], environment: Mapping[str, str], log: IO[bytes] | None = None
) -> subprocess.Popen[bytes]:
    """Start one engine process, which connects to the coordinator; it dies with this process."""
    streams: dict[str, Any] = {}
    if log is not None:
        streams = {"stdout": log, "stderr": subprocess.STDOUT}
    return subprocess.Popen(
        [sys.executable, "-m", "ch15_helpers.disagg.worker"],
        # A stream that waits for a peer must not share a queue with one that computes.
        env={"CUDA_DEVICE_MAX_CONNECTIONS": "32", **environment, "CH15_RANK": json.dumps(order)},
        stdin=subprocess.DEVNULL,
        **streams,
    )


# ---- the command line ------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of a rank under torchrun or mpirun."""
    options = _options(arguments)
    if under_mpirun():
        return _under_mpirun(options)
    if "RANK" not in os.environ:
        raise SystemExit(
            "start it with torchrun --nproc_per_node N -m ch15_helpers.disagg.launch, or with "
            "mpirun (make mpi-decode); from Python use DisaggCluster.launch"
        )
    return _under_torchrun(options)


def _under_torchrun(options: argparse.Namespace) -> int:
    world_size = int(os.environ["WORLD_SIZE"])
    spec = _spec(options, world_size)
    listener, host, port, token = rendezvous(os.environ)
    meeting = {"host": host, "port": port, "token": token}
    own = _meeting_store(os.environ, listener is not None)
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    order = _order(spec, rank, local_rank, meeting, own[1])
    engine = start_rank(order, os.environ)
    if listener is not None:
        coordinate(options, spec, listener, token)
    return keep(engine)


def _meeting_store(environment: Mapping[str, str], is_first: bool) -> tuple[Any, tuple[str, int]]:
    """A store that rank 0's keeper keeps, and its address, agreed on through torchrun's."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    master = environment["MASTER_ADDR"]
    shared = TCPStore(master, int(environment["MASTER_PORT"]), is_master=False)
    own = None
    if is_first:
        own = _new_store(master)
        shared.set("ch15/disagg", str(own.port))
    return own, (master, int(shared.get("ch15/disagg")))


def _under_mpirun(options: argparse.Namespace) -> int:
    from ch15_helpers.disagg.worker import serve

    world = load_mpi().COMM_WORLD
    rank = world.Get_rank()
    spec = _spec(options, world.Get_size())
    one_host = os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == str(world.Get_size())
    own_host = "127.0.0.1" if one_host else socket.gethostbyname(socket.gethostname())
    listener = socket.create_server((own_host, 0)) if rank == 0 else None
    address: Any = None
    if listener is not None:
        address = [*listener.getsockname()[:2], secrets.token_hex(16)]
    host, port, token = world.bcast(address)
    order = _order(spec, rank, rank, {"host": host, "port": port, "token": token}, ("", 0))
    problems: list[BaseException] = []
    if listener is not None:

        def run() -> None:
            try:
                coordinate(options, spec, listener, token)
            except BaseException as error:
                problems.append(error)
                traceback.print_exc()

        threading.Thread(target=run, daemon=True).start()
    serve(order)  # until the coordinator is done, well or not
    sys.stdout.flush()
    world.Barrier()
    load_mpi().Finalize()
    # Threads of the medium may still wait; the interpreter's own exit would, too.
    os._exit(1 if problems else 0)


def coordinate(
    options: argparse.Namespace, spec: DisaggSpec, listener: socket.socket, token: str
) -> None:
    """Serve some prompts, print the answers as JSON lines and a summary."""
    links: list[Link] = []
    with listener:
        accept_replicas(listener, spec.num_ranks, token, links, timeout_s=_START_S)
    length = options.prompt_tokens
    prompts = [
        [1 + (7 * number + k) % 97 for k in range(length)] for number in range(options.requests)
    ]
    params = SamplingParams(max_tokens=options.max_tokens, ignore_eos=True)
    with DisaggCluster(links, spec, token) as cluster:
        run = cluster.run(
            prompts, params, overlap=options.overlap, network=options.simulate_network
        )
        cluster.check_drained()
        report(run, spec)


def report(run: DisaggRun, spec: DisaggSpec) -> None:
    """Print a run: one JSON line a request, and one for all."""
    for output in run.outputs:
        answer = {
            "request": output.request_id,
            "prefill_rank": output.prefill_rank,
            "decode_rank": output.decode_rank,
            "tokens": output.token_ids,
            "error": output.error,
        }
        print(json.dumps(answer), flush=True)
    handovers = run.handovers
    count = max(1, len(handovers))
    summary = {
        "transport": spec.transport,
        "kind": run.kind,
        "tokens": sum(len(output.token_ids) for output in run.outputs),
        "duration_s": round(run.duration_s, 4),
        "MB_handed_over": round(sum(each.num_bytes for each in handovers) / 1e6, 3),
        "mean_orchestration_ms": round(1e3 * sum(h.orchestration_s for h in handovers) / count, 3),
        "mean_exposed_ms": round(1e3 * sum(h.exposed_s for h in handovers) / count, 3),
    }
    print(json.dumps(summary), flush=True)


def _spec(options: argparse.Namespace, world_size: int) -> DisaggSpec:
    num_prefill, num_decode = even_split(world_size, options.prefill, options.decode)
    spec = DisaggSpec.from_dict(json.loads(options.spec)) if options.spec else DisaggSpec()
    engine = {**spec.engine, **json.loads(options.engine)}
    return replace(
        spec,
        model=options.model,
        num_prefill=num_prefill,
        num_decode=num_decode,
        device=options.device,
        dtype=options.dtype,
        engine=engine,
        transport="mpi" if under_mpirun() else options.transport,
        speculate=options.speculate,
    )


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m ch15_helpers.disagg.launch")
    parser.add_argument("--prefill", type=int, help="prefill ranks (default: half)")
    parser.add_argument("--decode", type=int, help="decode ranks (default: the others)")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--transport", default="gloo", choices=MEDIA, help="mpi under mpirun only")
    parser.add_argument("--simulate-network", choices=tuple(LINKS), help="around the transport")
    parser.add_argument("--speculate", choices=("ngram", "layer_skip"))
    parser.add_argument("--engine", default="{}", help="JSON of EngineConfig fields")
    parser.add_argument("--spec", help="JSON of further DisaggSpec fields")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--layer-wise", dest="overlap", action="store_true", default=True)
    how.add_argument("--whole", dest="overlap", action="store_false")
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=16)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
