"""Configuration of the scheduler and of the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # the scheduler and the simulator run without torch
    import torch

    from ch15_helpers.kv.cache import Layout
    from ch15_helpers.kv.policies import EvictionPolicy, RecomputeCost
    from ch15_helpers.kv.tier_config import TierConfig
    from ch15_helpers.serving.policy import Policy

Preemption = Literal["recompute", "swap"]


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of one scheduler.

    Attributes:
        max_num_seqs: most requests that hold KV blocks at once.
        max_num_batched_tokens: token budget of a step, decodes included.
        block_size, num_blocks: geometry of the device pool.
        num_host_blocks: size of the host pool that swapping uses.
        enable_chunked_prefill: split prompts over steps. Without it a prompt is computed in one
            step; the budget then limits how many more join, but never the first.
        watermark: fraction of blocks that admission leaves free for running requests to grow.
        preemption: ``recompute`` or ``swap`` (which recomputes when the host pool is full).
        max_model_len: most tokens of prompt and output together; None is no limit.
        policy: name for ``make_policy``, or a Policy.
        enable_prefix_caching: keep computed blocks by content and reuse equal prefixes.
        eviction_policy: which cached block goes first: a name for ``make_eviction_policy``, or
            an EvictionPolicy (which then serves this scheduler alone).
        recompute_cost: what a cached block saves, for the ``cost_aware`` policy; None counts
            tokens alone.
    """

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    block_size: int = 16
    num_blocks: int = 1024
    num_host_blocks: int = 0
    enable_chunked_prefill: bool = True
    watermark: float = 0.01
    preemption: Preemption = "recompute"
    max_model_len: int | None = None
    policy: str | Policy = "fcfs"
    enable_prefix_caching: bool = False
    eviction_policy: str | EvictionPolicy = "lru"
    recompute_cost: RecomputeCost | None = None

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size", "num_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_host_blocks < 0:
            raise ValueError(f"num_host_blocks must not be negative, got {self.num_host_blocks}")
        if not 0 <= self.watermark < 1:
            raise ValueError(f"watermark must be in [0, 1), got {self.watermark}")
        if self.preemption not in ("recompute", "swap"):
            raise ValueError(f"preemption must be recompute or swap, got {self.preemption!r}")


@dataclass(frozen=True)
class EngineConfig:
    """How an Engine serves. Fields that SchedulerConfig has too mean the same there.

    Attributes:
        num_blocks: device pool; None sizes it from free memory (see ``pool_size``).
        num_host_blocks: host pool for ``preemption="swap"``, pinned when the model is on CUDA.
        attention_backend: ``auto``, ``reference``, ``sdpa`` or ``triton``.
        kv_dtype: element type of the cache: None is the model's; ``"fp8_e4m3"`` and ``"int8"``
            are quantised, with a scale for each block and head.
        kv_layout: ``block_major`` or ``layer_major``.
        seed: base of the seeds of requests that bring none.
        gpu_memory_utilization: fraction of the device's memory that weights, activations and the
            pool may take together.
        max_model_len: context limit; None is the model's ``max_position_embeddings``.
        capture_decode: replay decode steps as CUDA graphs where ``can_capture`` allows it.
        capture_prompts: and steps with prompts that take longer to launch than to compute.
        async_scheduling: decide the next step while this one runs (see ``Lookahead``); ``auto`` is
            on for CUDA, where no subclass replaces a stage of a step.
        recompute_cost: None takes the model's arithmetic (see ``recompute_cost_of``).
        tiers: where evicted blocks of the prefix cache go; None drops them.
    """

    block_size: int = 16
    num_blocks: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    enable_chunked_prefill: bool = True
    watermark: float = 0.01
    preemption: Preemption = "recompute"
    num_host_blocks: int = 0
    attention_backend: str = "auto"
    kv_dtype: torch.dtype | str | None = None
    kv_layout: Layout = "block_major"
    seed: int = 0
    gpu_memory_utilization: float = 0.9
    max_model_len: int | None = None
    policy: str | Policy = "fcfs"
    capture_decode: bool = True
    capture_prompts: bool = True
    async_scheduling: bool | Literal["auto"] = "auto"
    enable_prefix_caching: bool = False
    eviction_policy: str | EvictionPolicy = "lru"
    recompute_cost: RecomputeCost | None = None
    tiers: TierConfig | None = None

    def scheduler_config(
        self, num_blocks: int, model_len: int, cost: RecomputeCost | None = None
    ) -> SchedulerConfig:
        """The scheduler's share, once the pool's size is known.

        Args:
            num_blocks: blocks of the device pool.
            model_len: the model's own context limit in tokens.
            cost: of recomputing a block, where the configuration does not say.
        """
        limit = model_len if self.max_model_len is None else min(self.max_model_len, model_len)
        return SchedulerConfig(
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            block_size=self.block_size,
            num_blocks=num_blocks,
            num_host_blocks=self.num_host_blocks,
            enable_chunked_prefill=self.enable_chunked_prefill,
            watermark=self.watermark,
            preemption=self.preemption,
            max_model_len=limit,
            policy=self.policy,
            enable_prefix_caching=self.enable_prefix_caching,
            eviction_policy=self.eviction_policy,
            recompute_cost=cost if self.recompute_cost is None else self.recompute_cost,
        )
