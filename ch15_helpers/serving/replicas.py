"""Launching replicas with torchrun, so that the death of one leaves the others alone.

``torchrun --nproc_per_node N -m ch15_helpers.serving.replicas --model smollm2`` starts N ranks.
torchrun ends *all* its workers when one fails, which is right for training and wrong for serving.
So a rank is only a keeper: it starts the engine (``replica_worker``) as its child, waits for it,
and exits with 0 whatever became of it. What a death means is the router's business. If torchrun
or a keeper itself is killed, the kernel takes the engines with it, and the router sees all of them
gone.

Two uses, one protocol:

- started by hand, rank 0 is the router too: it publishes its address in torchrun's own store,
  serves a few prompts on all replicas and prints the answers as JSON lines;
- started by ``launch_replicas`` (a notebook, a test), the caller is the router, and its address is
  in the environment.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence

from ch15_helpers.serving.replica_launch import (
    ADDRESS_VARIABLE,
    TOKEN_VARIABLE,
    Link,
    accept_replicas,
)
from ch15_helpers.serving.replica_spec import ReplicaSpec

_STORE_KEY = "ch15/router"


def start_engine(spec: ReplicaSpec, host: str, port: int, token: str) -> subprocess.Popen[bytes]:
    """Start the engine of this rank, which connects to the router; it dies with this process."""
    order = {
        "spec": spec.to_dict(),
        "host": host,
        "port": port,
        "token": token,
        "rank": int(os.environ["RANK"]),
        "local_rank": int(os.environ["LOCAL_RANK"]),
        "keeper_pid": os.getpid(),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "ch15_helpers.serving.replica_worker"],
        env={**os.environ, "CH15_REPLICA": json.dumps(order)},
    )


def keep(engine: subprocess.Popen[bytes]) -> int:
    """Wait for this rank's engine; returns 0 even if it was killed, see the module."""

    def terminate(_signal: int, _frame: object) -> None:
        engine.kill()

    signal.signal(signal.SIGTERM, terminate)
    status = engine.wait()
    if status:
        print(f"replica {os.environ['RANK']} ended with status {status}", file=sys.stderr)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of a rank under torchrun."""
    options = _options(arguments)
    if "RANK" not in os.environ:
        raise SystemExit(
            "start it with torchrun --nproc_per_node N -m ch15_helpers.serving.replicas"
        )
    if ADDRESS_VARIABLE in os.environ:
        where, _, number = os.environ[ADDRESS_VARIABLE].rpartition(":")
        return keep(start_engine(options.spec, where, int(number), os.environ[TOKEN_VARIABLE]))
    listener, host, port, token = rendezvous(os.environ)
    engine = start_engine(options.spec, host, port, token)
    if listener is not None:
        route_by_hand(options, listener, token)
    return keep(engine)


def route_by_hand(options: argparse.Namespace, listener: socket.socket, token: str) -> None:
    """Rank 0 without a caller: serve prompts on all replicas, print the answers as JSON lines."""
    from ch15_helpers.serving.replica_pool import ReplicaPool
    from ch15_helpers.serving.request import SamplingParams

    links: list[Link] = []
    with listener:
        accept_replicas(listener, int(os.environ["WORLD_SIZE"]), token, links, timeout_s=300.0)
    prompts = [[1 + (number + k) % 97 for k in range(24)] for number in range(options.requests)]
    with ReplicaPool(links, options.spec, options.policy) as pool:
        params = SamplingParams(max_tokens=options.max_tokens, ignore_eos=True)
        for output in pool.serve(prompts, params):
            answer = {
                "request": output.request_id,
                "replica": output.replica,
                "tokens": output.token_ids,
                "error": output.error,
            }
            print(json.dumps(answer), flush=True)


def rendezvous(environment: Mapping[str, str]) -> tuple[socket.socket | None, str, int, str]:
    """Agree on the router's address through torchrun's store: (listener on rank 0, host, port,
    token)."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    master = environment["MASTER_ADDR"]
    store = TCPStore(master, int(environment["MASTER_PORT"]), is_master=False)
    listener = None
    if environment["RANK"] == "0":
        listener = socket.create_server((master, 0))
        address = [*listener.getsockname()[:2], secrets.token_hex(16)]
        store.set(_STORE_KEY, json.dumps(address))
    host, port, token = json.loads(store.get(_STORE_KEY))
    return listener, host, port, token


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m ch15_helpers.serving.replicas")
    parser.add_argument("--spec", help="JSON of a ReplicaSpec; instead of the next four")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--engine", default="{}", help="JSON of EngineConfig fields")
    parser.add_argument("--policy", default="kv_aware")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=8)
    options = parser.parse_args(arguments)
    if options.spec:
        options.spec = ReplicaSpec.from_dict(json.loads(options.spec))
    else:
        engine = json.loads(options.engine)
        options.spec = ReplicaSpec(options.model, options.device, options.dtype, engine)
    return options


if __name__ == "__main__":
    raise SystemExit(main())
