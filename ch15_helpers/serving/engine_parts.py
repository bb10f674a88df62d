"""Builds what an engine consists of, as large as the device's memory allows."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from ch15_helpers.errors import CapacityError, EngineConfigError
from ch15_helpers.kv.cache import PagedKVCache
from ch15_helpers.kv.quantised import make_kv_cache
from ch15_helpers.model.transformer import Transformer
from ch15_helpers.serving.config import EngineConfig
from ch15_helpers.serving.graphs import StepGraphs, can_capture
from ch15_helpers.serving.memory import pool_size, recompute_cost_of
from ch15_helpers.serving.offload import Offload, tiered_offload
from ch15_helpers.serving.runner import ModelRunner
from ch15_helpers.serving.scheduler import Scheduler
from ch15_helpers.serving.warm_up import warm_up

logger = logging.getLogger(__name__)
_SMALLER = (1.0, 0.85, 0.7, 0.5, 0.25)


@dataclass(frozen=True)
class Parts:
    """See ``Engine``."""

    scheduler: Scheduler
    runner: ModelRunner
    cache: PagedKVCache
    host_cache: PagedKVCache | None
    offload: Offload | None


def build_parts(
    model: Transformer,
    config: EngineConfig,
    scheduler_type: type[Scheduler],
    runner_type: type[ModelRunner],
    clock: Callable[[], float],
) -> Parts:
    """Scheduler, pools and a warm runner. A pool that turns out too large is made smaller.

    Raises:
        CapacityError: it does not fit even so, or its size was asked for and does not fit.
        TierError: a tier cannot be built.
    """
    message = ""
    for num_blocks in _pool_sizes(model, config):
        try:
            return _build(model, config, num_blocks, scheduler_type, runner_type, clock)
        except torch.OutOfMemoryError as error:
            message = str(error).splitlines()[0]
            logger.warning("no memory for a pool of %d blocks: %s", num_blocks, message)
        # Outside the handler, where the traceback holds what was allocated.
        gc.collect()
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
    raise CapacityError(
        f"the weights, a step of {config.max_num_batched_tokens} tokens and a KV pool of "
        f"{num_blocks} blocks do not fit in the memory of {model.device} ({message}); lower "
        "num_blocks, max_num_batched_tokens or max_num_seqs, or free memory",
        blocks_needed=num_blocks,
    )


def overlaps(wanted: bool | Literal["auto"], scheduler: Scheduler, runner: ModelRunner) -> bool:
    """Whether the next step may be launched while one runs.

    Raises:
        EngineConfigError: it is asked for, and a subclass replaces what a step does.
    """
    plain = type(scheduler) is Scheduler and runner.is_plain
    if wanted == "auto":
        return plain and runner.cache.device.type == "cuda"
    if wanted and not plain:
        raise EngineConfigError(
            f"async_scheduling launches a step before the one before it has ended, which "
            f"{type(scheduler).__name__} and {type(runner).__name__} do not expect; leave it at "
            "'auto' or set it to False"
        )
    return wanted


def _pool_sizes(model: Transformer, config: EngineConfig) -> Iterator[int]:
    if config.num_blocks is not None:
        yield config.num_blocks
        return
    largest = pool_size(model.config, config, model.device, model.dtype)
    yield from dict.fromkeys(max(1, int(largest * part)) for part in _SMALLER)


def _build(
    model: Transformer,
    config: EngineConfig,
    num_blocks: int,
    scheduler_type: type[Scheduler],
    runner_type: type[ModelRunner],
    clock: Callable[[], float],
) -> Parts:
    model_len = model.config.max_position_embeddings
    cost = recompute_cost_of(model.config)
    scheduler = scheduler_type(config.scheduler_config(num_blocks, model_len, cost))
    cache = _pool(model, config, num_blocks, on_host=False)
    host_blocks = config.num_host_blocks
    host_cache = _pool(model, config, host_blocks, on_host=True) if host_blocks else None
    backend = config.attention_backend
    runner = runner_type(
        model, cache, scheduler.blocks, host_cache, backend, max_num_seqs=config.max_num_seqs
    )
    offload = None
    if config.tiers is not None:
        offload = tiered_offload(model, cache, scheduler, config.tiers, clock)
        runner.offload = offload
    if model.device.type == "cuda":
        if config.capture_decode and can_capture(model, backend):
            limit = scheduler.config.max_model_len or model_len
            runner.graphs = StepGraphs(model, cache, config.max_num_seqs, limit, runner.last_ids)
        warm_up(runner, config)
    return Parts(scheduler, runner, cache, host_cache, offload)


def _pool(model: Transformer, config: EngineConfig, num_blocks: int, on_host: bool) -> PagedKVCache:
    return make_kv_cache(
        model.config,
        num_blocks,
        config.block_size,
        dtype=model.dtype if config.kv_dtype is None else config.kv_dtype,
        device="cpu" if on_host else model.device,
        layout=config.kv_layout,
        pin_memory=on_host and model.device.type == "cuda",
    )
