"""Starting replica processes from Python, and making sure that none is left.

``launch_replicas`` runs the torchrun command of ``replicas`` and listens; each engine connects to
it, says who it is (a secret in the environment proves that it is ours), loads its model and is
ready. The caller is their router. However it ends, so do they: an engine stops when its
connection closes, which the kernel sees to even if the caller is killed.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, Protocol

from ch15_helpers.errors import ReplicaError
from ch15_helpers.serving.channel import Channel, Message
from ch15_helpers.serving.replica_spec import ReplicaSpec

ADDRESS_VARIABLE, TOKEN_VARIABLE = "CH15_ROUTER", "CH15_ROUTER_TOKEN"
_LOG_TAIL = 2000


@dataclass
class Link:
    """A replica as its router sees it.

    Attributes:
        rank: number of the replica. pid: of the engine's process.
        channel: to the engine.
        device: where it runs. num_blocks: size of its KV pool.
        address: where other replicas reach it; empty where they do not.
        heard_s: when it was last heard of, on ``time.monotonic``.
        gone: why it is gone for good; None while it is connected.
    """

    rank: int
    pid: int
    channel: Channel
    device: str = ""
    num_blocks: int = 0
    address: str = ""
    heard_s: float = 0.0
    gone: str | None = None


class Starter(Protocol):
    """What is asked of the process, or group of processes, that ranks run in; a Popen has it."""

    @property
    def returncode(self) -> int | None: ...

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def terminate(self) -> None: ...

    def kill(self) -> None: ...


class Launched:
    """Replica processes that this process started, connected and loaded.

    Attributes:
        store: what must live as long as they do; unused here.
    """

    def __init__(self, links: Sequence[Link], process: Starter, log: IO[bytes]):
        self.links = list(links)
        self.store: Any = None
        self._process = process
        self._log = log

    def log_tail(self) -> str:
        """The end of what the processes wrote to their outputs."""
        return _tail(self._log)

    def close(self, patience_s: float = 5.0) -> None:
        """Ask the replicas to stop, then make sure; afterwards none of the processes is there."""
        for link in self.links:
            link.channel.send({"op": "stop"})
            link.channel.close()
        try:
            self._process.wait(patience_s)
        except subprocess.TimeoutExpired:
            for link in self.links:
                _kill(link.pid)
        _end(self._process)
        self._log.close()


def launch_replicas(
    spec: ReplicaSpec, num_replicas: int, *, timeout_s: float = 120.0, threads: int | None = None
) -> Launched:
    """Start replicas with torchrun on this machine, and wait until all have loaded their model.

    Args:
        spec: what each runs.
        num_replicas: one process each; with ``device="cuda"`` at most the number of GPUs.
        timeout_s: for all of it. Loading SmolLM2 takes seconds, a large model on a GPU a minute.
        threads: of each replica on a CPU; None divides the cores among them.

    Raises:
        ReplicaError: a replica could not start (with its reason), or not in time. None is left.
    """
    if num_replicas < 1:
        raise ReplicaError(f"num_replicas is {num_replicas}; there must be at least one")

    def start(environment: Mapping[str, str], log: IO[bytes]) -> Starter:
        return subprocess.Popen(
            torchrun_command(spec, num_replicas),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    return launch_ranks(start, num_replicas, timeout_s=timeout_s, threads=threads)


def launch_ranks(
    start: Callable[[Mapping[str, str], IO[bytes]], Starter],
    num_ranks: int,
    *,
    timeout_s: float,
    threads: int | None,
) -> Launched:
    """Start ranks that connect to this process, and wait until all are ready.

    Args:
        start: gets the environment, which says how to connect, and the file for the outputs.
        timeout_s, threads, errors: see ``launch_replicas``.
    """
    token = secrets.token_hex(16)
    log = tempfile.TemporaryFile()  # noqa: SIM115  # closed by Launched
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host, port = listener.getsockname()[:2]
        threads = threads or max(1, (os.cpu_count() or 1) // num_ranks)
        environment = {
            **os.environ,
            ADDRESS_VARIABLE: f"{host}:{port}",
            TOKEN_VARIABLE: token,
            "OMP_NUM_THREADS": str(threads),
        }
        process = start(environment, log)
        links: list[Link] = []
        try:
            accept_replicas(listener, num_ranks, token, links, timeout_s, process)
        except BaseException as error:
            for link in links:
                _kill(link.pid)
            _end(process)
            text = _tail(log)
            log.close()
            if isinstance(error, ReplicaError) and text:
                raise ReplicaError(f"{error}\nThe processes wrote:\n{text}") from None
            raise
    return Launched(links, process, log)


def torchrun_command(spec: ReplicaSpec, num_replicas: int) -> list[str]:
    """The command line that ``launch_replicas`` runs."""
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc_per_node", str(num_replicas)),
        *("-m", "ch15_helpers.serving.replicas", "--spec", json.dumps(spec.to_dict())),
    ]


def accept_replicas(
    listener: socket.socket,
    num_replicas: int,
    token: str,
    links: list[Link],
    timeout_s: float,
    process: Starter | None = None,
) -> None:
    """Wait until each rank has connected and is ready; ``links`` gets them in order of rank.

    Args:
        token: a connection that does not know it is closed.
        process: what started the ranks; its end is noticed before the timeout.

    Raises:
        ReplicaError: see ``launch_replicas``.
    """
    deadline_s = time.monotonic() + timeout_s
    strangers: list[Channel] = []
    while len(links) < num_replicas or not all(link.device for link in links):
        if time.monotonic() > deadline_s:
            ready = sum(bool(link.device) for link in links)
            raise ReplicaError(f"{ready} of {num_replicas} replicas were ready in {timeout_s:g} s")
        if process is not None and process.poll() is not None:
            status = process.returncode
            raise ReplicaError(f"the processes ended with status {status} while starting")
        waiting: list[Any] = [listener, *strangers, *(link.channel for link in links)]
        readable = select.select(waiting, [], [], 0.2)[0]
        if listener in readable:
            strangers.append(Channel(listener.accept()[0]))
        for link in links:
            _hear(link)
        strangers = [each for each in strangers if not _greet(each, token, links)]
    for channel in strangers:
        channel.close()
    links.sort(key=lambda link: link.rank)


def _note(link: Link, messages: Sequence[Message]) -> None:
    for message in messages:
        link.heard_s = time.monotonic()
        if message["op"] == "failed":
            raise ReplicaError(f"replica {link.rank} could not start: {message['error']}")
        if message["op"] == "ready":
            link.device, link.num_blocks = message["device"], message["num_blocks"]
            link.address = message.get("address", "")


def _hear(link: Link) -> None:
    _note(link, link.channel.receive())
    if link.channel.closed:
        raise ReplicaError(f"replica {link.rank} (pid {link.pid}) ended while starting")


def _greet(channel: Channel, token: str, links: list[Link]) -> bool:
    """Whether a connection has made itself known, or is to be forgotten."""
    messages: list[Message] = []
    try:
        messages = channel.receive()
    except ReplicaError:
        channel.close()
    if channel.closed and not messages:
        return True
    if not messages:
        return False
    hello = messages[0]
    if hello["op"] != "hello" or not hmac.compare_digest(str(hello.get("token")), token):
        channel.close()
        return True
    link = Link(int(hello["rank"]), int(hello["pid"]), channel, heard_s=time.monotonic())
    links.append(link)
    _note(link, messages[1:])
    return True


def _tail(log: IO[bytes]) -> str:
    log.seek(0, os.SEEK_END)
    log.seek(max(0, log.tell() - _LOG_TAIL))
    return log.read().decode(errors="replace").strip()


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _end(process: Starter) -> None:
    """Have the processes end (torchrun: its ranks, too); after a while, kill them."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
