"""What a disaggregated system runs, as plain data that travels as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import product
from typing import Any, Literal, get_args

from ch15_helpers.disagg.connect import MEDIA, Medium
from ch15_helpers.disagg.link import LINKS, LinkModel
from ch15_helpers.errors import TransportError
from ch15_helpers.serving.config import EngineConfig
from ch15_helpers.serving.replica_spec import Plain

Role = Literal["prefill", "decode"]
Speculation = Literal["ngram", "layer_skip"]


@dataclass(frozen=True)
class DisaggSpec:
    """P prefill ranks, then D decode ranks; all have the same weights.

    Attributes:
        model: source for ``load_model``.
        num_prefill, num_decode: P and D.
        device: ``cpu``, or ``cuda`` for the GPU with the number of the local rank.
        dtype: name of a torch dtype, or ``auto``.
        engine: fields of EngineConfig, for both sides; ``prefill_engine`` and ``decode_engine``
            override them on one side.
        transport: medium of the KV blocks.
        verify: whether blocks are checked; see BlockTransport.
        max_message_bytes: see BlockTransport.
        layers_per_part: layers of the last part when the handover overlaps the prefill; those
            before it are larger, see ``overlap.part_ends``.
        handover_timeout_s: how long a rank waits for the other side of a handover.
        request_timeout_s: after which a request ends with an error.
        silence_s: after which a rank that says nothing counts as dead; longer than any step.
        max_attempts: placements of one request before it is given up.
        speculate: proposer on the decode side, or None. draft_length: tokens it drafts.
        draft_layers: first layers that ``layer_skip`` drafts with; 0 is half of them.
        policy: name of a routing policy, on both sides.
        beat_s: how often a rank gives a sign of life between steps.

    Raises:
        TransportError: a value makes no sense, or EngineConfig has no such field.
    """

    model: str = "smollm2"
    num_prefill: int = 1
    num_decode: int = 1
    device: str = "cpu"
    dtype: str = "float32"
    engine: Mapping[str, Plain] = field(default_factory=dict)
    prefill_engine: Mapping[str, Plain] = field(default_factory=dict)
    decode_engine: Mapping[str, Plain] = field(default_factory=dict)
    transport: Medium = "gloo"
    verify: bool = True
    max_message_bytes: int | None = None
    layers_per_part: int = 3
    handover_timeout_s: float = 10.0
    request_timeout_s: float = 60.0
    silence_s: float = 30.0
    max_attempts: int = 3
    speculate: Speculation | None = None
    draft_length: int = 4
    draft_layers: int = 0
    policy: str = "least_outstanding_tokens"
    beat_s: float = 0.5

    def __post_init__(self) -> None:
        self._expect(self.device in ("cpu", "cuda"), "device", "'cpu' or 'cuda'")
        self._expect(self.transport in MEDIA, "transport", f"one of {', '.join(MEDIA)}")
        nccl_on_cpu = self.transport == "nccl" and self.device != "cuda"
        self._expect(not nccl_on_cpu, "transport", "'gloo' on a CPU: NCCL moves GPU memory")
        for name in ("num_prefill", "num_decode", "layers_per_part", "max_attempts"):
            self._expect(getattr(self, name) >= 1, name, "at least 1")
        for name in ("handover_timeout_s", "request_timeout_s", "silence_s", "beat_s"):
            self._expect(getattr(self, name) > 0, name, "positive")
        known = (None, *get_args(Speculation))
        self._expect(self.speculate in known, "speculate", f"one of {known}")
        have = {each.name for each in fields(EngineConfig)}
        for name in ("engine", "prefill_engine", "decode_engine"):
            unknown = set(getattr(self, name)) - have
            self._expect(not unknown, name, f"fields of EngineConfig, which are {sorted(have)}")

    def _expect(self, good: bool, name: str, expected: str) -> None:
        if not good:
            raise TransportError(f"{name} is {getattr(self, name)!r}; it must be {expected}")

    @property
    def num_ranks(self) -> int:
        """Engine processes."""
        return self.num_prefill + self.num_decode

    @property
    def directions(self) -> list[tuple[int, int]]:
        """(source, target) of what travels: each prefill rank sends to each decode rank."""
        return list(product(range(self.num_prefill), range(self.num_prefill, self.num_ranks)))

    def role(self, rank: int) -> Role:
        """Prefill ranks come first."""
        return "prefill" if rank < self.num_prefill else "decode"

    def engine_config(self, role: Role) -> EngineConfig:
        """The configuration of the engines of one side."""
        own = self.prefill_engine if role == "prefill" else self.decode_engine
        config = EngineConfig(**{**self.engine, **own})  # type: ignore[arg-type]
        # A prefill rank decodes nothing, so that there is nothing to capture.
        return replace(config, capture_decode=False) if role == "prefill" else config

    def to_dict(self) -> dict[str, Any]:
        """For JSON; ``from_dict`` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DisaggSpec:
        """Inverse of ``to_dict``."""
        return cls(**values)


def even_split(num_ranks: int, num_prefill: int | None, num_decode: int | None) -> tuple[int, int]:
    """How many ranks prefill and how many decode: half and half unless said otherwise.

    Raises:
        TransportError: the numbers do not fit, or an odd number cannot be halved.
    """
    if num_prefill is None and num_decode is None:
        if num_ranks < 2 or num_ranks % 2:
            raise TransportError(
                f"{num_ranks} ranks cannot be split half and half; start an even number, or say "
                "how many prefill and how many decode"
            )
        return num_ranks // 2, num_ranks // 2
    prefill = num_ranks - (num_decode or 0) if num_prefill is None else num_prefill
    decode = num_ranks - prefill if num_decode is None else num_decode
    if prefill < 1 or decode < 1 or prefill + decode != num_ranks:
        raise TransportError(
            f"{prefill} prefill and {decode} decode ranks do not make {num_ranks}; each side "
            "needs at least one"
        )
    return prefill, decode


def resolve_network(network: str | LinkModel | None) -> LinkModel | None:
    """A link by name or as it is. Raises TransportError for an unknown name."""
    if network is None or isinstance(network, LinkModel):
        return network
    if network not in LINKS:
        raise TransportError(f"there is no link {network!r}; choose from {', '.join(LINKS)}")
    return LINKS[network]
