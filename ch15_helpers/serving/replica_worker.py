"""One replica: an engine in a process of its own that serves what a router sends it.

Start it through ``replicas``. Messages to it: ``submit`` (attempt, prompt, params), ``abort``
(attempts), ``reset`` (a fresh cache), ``damage`` (scramble the cache, for tests that must fail) and
``stop``. Messages from it: ``hello``, ``ready`` or ``failed``, then ``first`` at an attempt's first
token, ``done`` at its end, and ``beat`` between steps as a sign of life. It ends when the
connection does, so it cannot outlive its router.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from typing import Any

from ch15_helpers.model.transformer import Transformer
from ch15_helpers.serving.channel import Channel, Message
from ch15_helpers.serving.engine import Engine, StepRecord
from ch15_helpers.serving.replica_spec import ReplicaSpec
from ch15_helpers.serving.request import RequestOutput, SamplingParams

_PR_SET_PDEATHSIG = 1


class ReplicaServer:
    """Runs an engine for the router at the other end of a channel."""

    def __init__(self, engine: Engine, channel: Channel, *, beat_s: float = 0.5) -> None:
        """Serve an idle engine.

        Args:
            beat_s: how often to give a sign of life; a step that takes longer delays it.
        """
        self.channel = channel
        self._beat_s = beat_s
        self._beaten_s = 0.0
        self._stopped = False
        self._num_steps = self._num_prompt_tokens = 0
        self._busy_s = 0.0
        self._use(engine)

    def run(self) -> None:
        """Serve until told to stop, or until the router is gone."""
        while not self._stopped:
            timeout_s = 0.0 if self.engine.has_unfinished else self._beat_s
            for message in self.channel.receive(timeout_s):
                self._handle(message)
            if self.channel.closed:
                return
            if self.engine.has_unfinished:
                for output in self.engine.step():
                    if output.finish_reason != "abort":
                        self.channel.send(self._done(output))
            self._beat()

    def _handle(self, message: Message) -> None:
        operation = message["op"]
        if operation == "submit":
            self._submit(message)
        elif operation == "abort":
            for attempt in message["attempts"]:
                self.engine.abort(str(attempt))
        elif operation == "reset":
            self._reset()
        elif operation == "damage":
            for block in range(self.engine.cache.num_blocks):
                self.engine.cache.corrupt_block(block, "scramble")
        elif operation == "stop":
            self._stopped = True

    def _reset(self) -> None:
        """Forget the cache. An idle engine stays: its captured steps take seconds to make again."""
        prefix = self.engine.scheduler.residency.prefix
        if self.engine.has_unfinished or self.engine.offload is not None:
            self._use(Engine(self.engine.model, self.engine.config))
        elif prefix is not None:
            prefix.clear()

    def _submit(self, message: Message) -> None:
        attempt = message["attempt"]
        try:
            params = SamplingParams(**message["params"])
            self.engine.add_request(message["prompt"], params, request_id=str(attempt))
        except (ValueError, TypeError) as error:
            # This request is wrong; the others are not.
            answer = {"op": "done", "attempt": attempt, "token_ids": [], "finish_reason": "error"}
            self.channel.send(answer | {"error": str(error), "cached": 0} | self._totals())

    def _use(self, engine: Engine) -> None:
        self.engine = engine
        engine.on_step = self._on_step

    def _on_step(self, record: StepRecord) -> None:
        self._num_steps += 1
        self._busy_s += record.end_s - record.start_s
        for chunk in record.step.chunks:
            self._num_prompt_tokens += chunk.num_tokens
            if chunk.is_last and len(chunk.request.output_token_ids) == 1:
                self.channel.send({"op": "first", "attempt": int(chunk.request.request_id)})

    def _done(self, output: RequestOutput) -> Message:
        return {
            "op": "done",
            "attempt": int(output.request_id),
            "token_ids": output.token_ids,
            "finish_reason": output.finish_reason,
            "error": output.error,
            "cached": output.metrics.num_cached_tokens,
        } | self._totals()

    def _totals(self) -> dict[str, Any]:
        return {
            "steps": self._num_steps,
            "prompt_tokens": self._num_prompt_tokens,
            "busy_s": self._busy_s,
        }

    def _beat(self) -> None:
        now_s = time.monotonic()
        # A router that does not read needs no more of them.
        if now_s - self._beaten_s >= self._beat_s and not self.channel.num_unsent_bytes:
            self._beaten_s = now_s
            self.channel.send({"op": "beat"})


def load_on_rank(source: str, device: str, dtype: str, local_rank: int) -> Transformer:
    """The model of one rank: on GPU number ``local_rank``, or on the CPU.

    Args:
        device, dtype: as in a specification: "cpu" or "cuda"; "auto" or a torch type's name.

    Raises:
        HardwareError: there are fewer GPUs than ranks. Two ranks never share one.
    """
    import torch

    from ch15_helpers.errors import HardwareError
    from ch15_helpers.model.loading import load_model

    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise HardwareError(
                f"rank {local_rank} has no GPU of its own: there are {torch.cuda.device_count()}; "
                "start as many ranks as GPUs, or use device 'cpu'"
            )
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(local_rank)
    return load_model(
        source, device=device, dtype=None if dtype == "auto" else getattr(torch, dtype)
    )


def build_engine(spec: ReplicaSpec, local_rank: int) -> Engine:
    """The engine of one replica; errors as for ``load_on_rank``."""
    import torch

    torch.set_grad_enabled(False)
    model = load_on_rank(spec.model, spec.device, spec.dtype, local_rank)
    return Engine(model, spec.engine_config())


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent ends (Linux; elsewhere nothing)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:  # it ended before we asked
            raise SystemExit("the parent is gone")


def main() -> None:
    """Entry point of the process: connect, load, serve. Everything comes from the environment."""
    order = json.loads(os.environ["CH15_REPLICA"])
    die_with_parent(order["keeper_pid"])
    spec = ReplicaSpec.from_dict(order["spec"])
    channel = Channel.connect(order["host"], order["port"])
    hello = {"op": "hello", "token": order["token"], "rank": order["rank"], "pid": os.getpid()}
    channel.send(hello)
    try:
        engine = build_engine(spec, order["local_rank"])
    except Exception as error:
        channel.send({"op": "failed", "error": f"{type(error).__name__}: {error}"})
        raise
    device, num_blocks = str(engine.model.device), engine.cache.num_blocks
    channel.send({"op": "ready", "device": device, "num_blocks": num_blocks})
    ReplicaServer(engine, channel, beat_s=spec.beat_s).run()


if __name__ == "__main__":
    main()
