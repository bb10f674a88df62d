"""One prefill or decode rank: connect to the coordinator, load the model, meet the others, serve.

Started by ``launch``, which gives the order in the environment, or, under mpirun, called there.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Mapping
from typing import Any

import torch

from ch15_helpers.disagg.connect import Joined, Place, connect
from ch15_helpers.disagg.decode import decode_engine
from ch15_helpers.disagg.decode_rank import DecodeServer
from ch15_helpers.disagg.prefill import PrefillServer
from ch15_helpers.disagg.rank import RankServer
from ch15_helpers.disagg.spec import DisaggSpec
from ch15_helpers.disagg.stages import PrefillEngine
from ch15_helpers.serving.channel import Channel
from ch15_helpers.serving.engine import Engine
from ch15_helpers.serving.replica_worker import die_with_parent, load_on_rank

_MEET_S = 120.0


def serve(order: Mapping[str, Any]) -> None:
    """Be a rank until told to stop, or until the coordinator is gone."""
    spec, rank = DisaggSpec.from_dict(order["spec"]), order["rank"]
    channel = Channel.connect(order["host"], order["port"])
    token = order["token"]
    channel.send({"op": "hello", "token": token, "rank": rank, "pid": os.getpid()})
    try:
        server = _server(spec, order, channel)
    except Exception as error:
        channel.send({"op": "failed", "error": f"{type(error).__name__}: {error}"})
        raise
    server.run()


def _server(spec: DisaggSpec, order: Mapping[str, Any], channel: Channel) -> RankServer:
    torch.set_grad_enabled(False)
    rank = order["rank"]
    model = load_on_rank(spec.model, spec.device, spec.dtype, order["local_rank"])
    joined = _meet(spec, order)
    about = {"op": "ready", "device": str(model.device)}
    if spec.role(rank) == "prefill":
        engine: Engine = PrefillEngine(model, spec.engine_config("prefill"), clock=time.monotonic)
        server: RankServer = PrefillServer(rank, spec, engine, joined.wire, channel)
    else:
        listener = socket.create_server((channel.local_host, 0))
        engine = decode_engine(model, spec, clock=time.monotonic)
        server = DecodeServer(
            rank, spec, engine, joined.wire, channel, listener=listener, token=order["token"]
        )
        host, port = listener.getsockname()[:2]
        about["address"] = f"{host}:{port}"
    channel.send({**about, "num_blocks": engine.cache.num_blocks})
    return server


def _meet(spec: DisaggSpec, order: Mapping[str, Any]) -> Joined:
    host, port = order["store"]
    store = (host, port) if port else None
    place = Place(order["rank"], spec.num_ranks, store=store, local_rank=order["local_rank"])
    return connect(spec.transport, place, timeout_s=_MEET_S, pairs=spec.directions)


def main() -> None:
    """Entry point of the process."""
    order = json.loads(os.environ["CH15_RANK"])
    die_with_parent(order["keeper_pid"])
    status = 0
    try:
        serve(order)
    except BaseException:
        traceback.print_exc()
        status = 1
    # NIXL may crash in the interpreter's exit, and threads that wait for a peer abort it.
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
