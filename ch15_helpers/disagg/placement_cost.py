"""What a pass costs when a model is cut over devices: memory, arithmetic, communication.

Compute and bytes are counted as in a roofline (Williams et al., 2009), divided by how the model is
cut; collectives by the usual alpha-beta counts (Thakur et al., 2005). Time comes from measured
rates, or from a fitted ``StepTimeModel`` whose parts are scaled by the same counts.
Communication is never taken to overlap, so the model is rather too slow than too fast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from ch15_helpers.disagg.link import LinkModel
from ch15_helpers.disagg.placement_topology import Topology
from ch15_helpers.errors import PlacementError
from ch15_helpers.model.config import ModelConfig
from ch15_helpers.serving.step_time import FEW_ROWS, MANY_ROWS, StepTimeModel


@dataclass(frozen=True)
class DeviceRates:
    """One device, at rates that it reaches.

    Attributes:
        read_GBps: device memory. tflops: matrix products in the model's type.
        overhead_s: of a pass, whatever it does: launches, scheduling.
        memory_bytes: that weights and KV cache may take together.
    """

    read_GBps: float
    tflops: float
    memory_bytes: float
    overhead_s: float = 0.0

    def __post_init__(self) -> None:
        if not (self.read_GBps > 0 and self.tflops > 0 and self.memory_bytes > 0):
            raise PlacementError(f"{self}: rates and memory must be positive")
        if not self.overhead_s >= 0:
            raise PlacementError(f"{self}: overhead_s must not be negative")


@dataclass(frozen=True, order=True)
class Cut:
    """How one copy of the model lies on devices.

    Attributes:
        tp: tensor parallel: slices of each matrix, neighbours.
        pp: pipeline stages. cp: parts of a sequence's tokens.
        ep: devices that the experts of a layer are spread over; 1 slices them by ``tp``. Where it
            is larger than ``tp * cp``, the attention is there ``ep / (tp * cp)`` times, each for
            its own requests.
    """

    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1

    @property
    def stage_devices(self) -> int:
        """Devices of one pipeline stage."""
        return max(self.tp * self.cp, self.ep)

    @property
    def num_devices(self) -> int:
        """Devices of the whole copy."""
        return self.pp * self.stage_devices

    @property
    def groups(self) -> int:
        """Attention groups of a stage, each with its own requests."""
        return self.stage_devices // (self.tp * self.cp)

    def problem(self, config: ModelConfig) -> str | None:
        """Why the model cannot be cut so; None if it can."""
        if min(self.tp, self.pp, self.cp, self.ep) < 1:
            return "every degree must be at least 1"
        if config.num_key_value_heads % self.tp:
            return f"tp={self.tp} does not divide {config.num_key_value_heads} KV heads"
        if config.num_hidden_layers % self.pp:
            return f"pp={self.pp} does not divide {config.num_hidden_layers} layers"
        if self.ep > 1:
            if not config.is_moe or config.num_experts % self.ep:
                return f"ep={self.ep} does not divide {config.num_experts} experts"
            if self.ep % (self.tp * self.cp):
                return f"ep={self.ep} is not a multiple of tp * cp"
        return None

    def __str__(self) -> str:
        names = ("tp", "pp", "cp", "ep")
        parts = [f"{n.upper()}{getattr(self, n)}" for n in names if getattr(self, n) > 1]
        return " ".join(parts) or "one device"


@dataclass(frozen=True)
class PassCost:
    """Seconds of one pass, by cause.

    Attributes:
        memory_s: reading weights and KV cache. compute_s: arithmetic.
        communication_s: collectives and sends. overhead_s: fixed.
        additive: whether memory and compute follow each other (a fitted step time) or the
            larger one counts (a roofline).
    """

    memory_s: float
    compute_s: float
    communication_s: float
    overhead_s: float
    additive: bool = False

    @property
    def total_s(self) -> float:
        """Seconds of the pass."""
        both = (self.memory_s, self.compute_s)
        work_s = sum(both) if self.additive else max(both)
        return work_s + self.communication_s + self.overhead_s

    @property
    def bound_by(self) -> str:
        """The largest part, in a word."""
        parts = {
            "memory": self.memory_s,
            "compute": self.compute_s,
            "communication": self.communication_s,
            "overhead": self.overhead_s,
        }
        return max(parts, key=lambda name: parts[name])


@dataclass(frozen=True)
class ModelCosts:
    """Costs of one model on one kind of device.

    Attributes:
        dtype_bytes: of weights, cache and activations.
        step_time: measured step times of the uncut model; None takes the device's rates.
    """

    config: ModelConfig
    device: DeviceRates
    topology: Topology
    dtype_bytes: int = 2
    step_time: StepTimeModel | None = None

    @cached_property
    def attention_weights(self) -> int:
        """Matrix elements of one layer's attention."""
        c = self.config
        width = c.head_dim * (2 * c.num_attention_heads + 2 * c.num_key_value_heads)
        return c.hidden_size * width

    @cached_property
    def expert_weights(self) -> int:
        """Matrix elements of one expert, or of the dense feed-forward block."""
        c = self.config
        return 3 * c.hidden_size * (c.moe_intermediate_size if c.is_moe else c.intermediate_size)

    @cached_property
    def kv_token_bytes(self) -> int:
        """Bytes of one token's keys and values over all layers."""
        return self.config.kv_bytes_per_token(self.dtype_bytes)

    def weight_bytes(self, cut: Cut) -> float:
        """Bytes of weights on the fullest device: the output head or the embedding included."""
        c = self.config
        spread = cut.ep if cut.ep > 1 else cut.tp
        router = c.num_experts * c.hidden_size
        layer = (
            self.attention_weights / cut.tp
            + max(1, c.num_experts) * self.expert_weights / spread
            + router
        )
        ends = c.vocab_size * c.hidden_size / cut.tp
        one_stage_holds_both = cut.pp == 1 and not c.tie_word_embeddings
        ends *= 2 if one_stage_holds_both else 1
        return (layer * c.num_hidden_layers / cut.pp + ends) * self.dtype_bytes

    def kv_tokens(self, cut: Cut) -> int:
        """Cached tokens that one copy of the model has room for; 0 where weights do not fit."""
        room = self.device.memory_bytes - self.weight_bytes(cut)
        tokens = room / (self.kv_token_bytes / (cut.tp * cut.pp * cut.cp))
        return max(0, int(tokens)) * cut.groups

    def prefill(self, cut: Cut, tokens: int) -> PassCost:
        """One prompt through one stage of the pipeline.

        With several attention groups each prefills a prompt of its own; the cost is that of a round
        in which all do.
        """
        pairs = tokens * (tokens + 1) // 2
        together = cut.groups
        return self._stage(cut, together * tokens, together * pairs, together * tokens, None)

    def decode(self, cut: Cut, batch: float, context: float) -> PassCost:
        """One token for each of ``batch`` sequences of ``context`` tokens, through one stage."""
        return self._stage(cut, batch, batch * context, batch * context, batch)

    def _stage(
        self, cut: Cut, tokens: float, pairs: float, context: float, sampled: float | None
    ) -> PassCost:
        """``tokens`` tokens of one copy through a stage; ``sampled`` is None for prompts."""
        prompts = sampled is None
        rows = float(cut.groups) if sampled is None else sampled
        flops, weights, kv = self._work(cut, tokens, pairs, context, rows)
        communication_s = self._communication_s(cut, tokens, prompts)
        m = self.step_time
        if m is None:
            memory_s = (weights + kv) / (self.device.read_GBps * 1e9)
            compute_s = flops / (self.device.tflops * 1e12)
            return PassCost(memory_s, compute_s, communication_s, self.device.overhead_s)
        all_flops, all_weights, all_kv = self._work(Cut(), tokens, pairs, context, rows)
        memory_s = m.constant_s * weights / all_weights
        if not prompts:
            memory_s += m.context_token_s * context * kv / all_kv
        compute_s = _rows_s(m, tokens, pairs, prompts) * flops / all_flops
        return PassCost(memory_s, compute_s, communication_s, 0.0, additive=True)

    def _work(
        self, cut: Cut, tokens: float, pairs: float, context: float, sampled: float
    ) -> tuple[float, float, float]:
        """(FLOP, weight bytes, KV bytes) of the busiest device of the last stage."""
        c = self.config
        layers, devices = c.num_hidden_layers / cut.pp, cut.stage_devices
        active = max(1, c.num_experts_per_tok)
        per_token = self.attention_weights + active * self.expert_weights
        per_token += c.num_experts * c.hidden_size
        q_width = c.num_attention_heads * c.head_dim
        head = c.vocab_size * c.hidden_size
        flops = layers * (2.0 * per_token * tokens + 4.0 * pairs * q_width) / devices
        flops += 2.0 * head * sampled / devices
        touched = _touched(c, tokens)
        spread = cut.ep if cut.ep > 1 else cut.tp
        layer = self.attention_weights / cut.tp + touched * self.expert_weights / spread
        layer += c.num_experts * c.hidden_size
        weights = (layers * layer + head / cut.tp) * self.dtype_bytes
        kv = context * self.kv_token_bytes / cut.pp / devices
        return flops, weights, kv

    def _communication_s(self, cut: Cut, tokens: float, is_prefill: bool) -> float:
        """Collectives of one stage's layers, and the send to the next stage."""
        c, width = self.config, self.dtype_bytes
        layers = c.num_hidden_layers / cut.pp
        rows = tokens / (cut.groups * cut.cp if is_prefill else cut.groups)
        row_bytes = rows * c.hidden_size * width
        per_layer = 0.0
        if cut.tp > 1:
            link = self.topology.level_for(cut.tp).link
            reductions = 1 if cut.ep > 1 else 2
            per_layer += reductions * all_reduce_s(link, cut.tp, row_bytes)
        if cut.cp > 1:
            link = self.topology.level_for(cut.tp * cut.cp).link
            if is_prefill:  # keys and values travel once round the ring
                kv = rows * self.kv_token_bytes / c.num_hidden_layers / cut.tp
                per_layer += (cut.cp - 1) * (link.latency_s + link.wire_s(math.ceil(kv)))
            else:  # parts of the attention are put together
                q_width = c.num_attention_heads * c.head_dim
                per_layer += all_reduce_s(link, cut.cp, rows * q_width * width / cut.tp)
        if cut.ep > 1:
            link = self.topology.level_for(cut.stage_devices).link
            mine = tokens / cut.stage_devices * c.num_experts_per_tok * c.hidden_size * width
            per_layer += 2 * all_to_all_s(link, cut.ep, mine)
        send_s = 0.0
        if cut.pp > 1:
            link = self.topology.level_for(cut.num_devices).link
            send_s = link.transfer_s(math.ceil(row_bytes / cut.tp))
        return layers * per_layer + send_s


def all_reduce_s(link: LinkModel, ranks: int, num_bytes: float) -> float:
    """Ring for the bytes, a tree there and back for the latency: the best of both."""
    wire_s = link.wire_s(math.ceil(2 * (ranks - 1) / ranks * num_bytes))
    return 2 * math.ceil(math.log2(ranks)) * link.latency_s + wire_s


def all_to_all_s(link: LinkModel, ranks: int, num_bytes: float) -> float:
    """Each rank sends ``num_bytes``, in equal parts to all, its own part staying."""
    wire_s = link.wire_s(math.ceil((ranks - 1) / ranks * num_bytes))
    return math.ceil(math.log2(ranks)) * link.latency_s + wire_s


def _rows_s(model: StepTimeModel, tokens: float, pairs: float, is_prefill: bool) -> float:
    """The part of a fitted step time that grows with tokens, for any number of them."""
    rows_s = model.few_row_s * min(tokens, FEW_ROWS)
    rows_s += model.many_row_s * max(0.0, tokens - MANY_ROWS)
    if not is_prefill:
        return rows_s + model.decode_s * tokens
    return rows_s + model.prefill_token_s * tokens + model.prefill_pair_s * pairs + model.chunk_s


def _touched(config: ModelConfig, tokens: float) -> float:
    """Distinct experts of a layer that a pass reads, were routing uniform."""
    if not config.is_moe:
        return 1.0
    share = config.num_experts_per_tok / config.num_experts
    return float(config.num_experts * (1.0 - (1.0 - share) ** tokens))
