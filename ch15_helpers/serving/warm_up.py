"""Compiles and captures all that an engine's steps may run, before the first request comes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import TypeVar

import torch
from rich.progress import Progress
from torch import Tensor

from ch15_helpers.kernels.batch import BatchMetadata
from ch15_helpers.serving.config import EngineConfig
from ch15_helpers.serving.runner import ModelRunner

T = TypeVar("T")
_PATIENCE_S = 2.0


def warm_up(runner: ModelRunner, config: EngineConfig) -> None:
    """Run eager steps of every kind, the largest one first, and capture what is to be captured.

    Raises:
        OutOfMemoryError: the largest step does not fit beside the weights and the pool.
    """
    graphs = runner.graphs
    jobs: list[Callable[[], object]] = [
        partial(run_padding, runner, lens, contexts) for lens, contexts in eager_batches(config)
    ]
    if graphs is not None:
        shapes = graphs.decode_shapes()
        if config.capture_prompts and runner.captures_prompts:
            shapes = graphs.prompt_shapes(config.max_num_batched_tokens) + shapes
        jobs += [partial(graphs.capture, [shape]) for shape in shapes]
    for job in patiently(jobs, "warming up"):
        job()
    if runner.cache.device.type == "cuda":
        torch.cuda.synchronize(runner.cache.device)


def eager_batches(config: EngineConfig) -> list[tuple[list[int], list[int]]]:
    """(query lengths, context lengths) of batches that between them run every kernel.

    Attention is compiled once for up to 64 sequences and again for each power of two beyond;
    long and short prompts, alone and beside decodes, and short chunks of long contexts take
    kernels of their own.
    """
    most = config.max_num_batched_tokens
    seqs = [1] + [1 << n for n in range(7, config.max_num_seqs.bit_length() + 1)]
    batches = [([most], [most])]
    for length in (2, min(24, most), min(320, most)):
        batches += [([length], [length]), ([1, length], [1, length])]
    batches += [([min(24, most)], [4096]), ([1, min(24, most)], [1, 4096])]
    for count in seqs:
        batches += [([1] * count, [1] * count), ([2] * count, [2] * count)]
        if count > 1:
            batches.append(([1] * (count - 1) + [min(320, most)],) * 2)
    return batches


@torch.inference_mode()
def run_padding(
    runner: ModelRunner, query_lens: Sequence[int], context_lens: Sequence[int]
) -> None:
    """Run a batch that writes nothing to the cache, and reads block 0 again and again."""
    size = runner.cache.block_size
    limit = runner.model.config.max_position_embeddings
    query_lens = [min(length, limit) for length in query_lens]
    context_lens = [min(length, limit) for length in context_lens]
    new = partial(torch.full, device=runner.cache.device)
    starts = torch.tensor([0, *accumulate(query_lens)], dtype=torch.int32)
    blocks = -(-max(context_lens) // size)
    tokens: Tensor = new((int(starts[-1]),), 0)
    batch = BatchMetadata(
        query_starts=starts.to(runner.cache.device),
        context_lens=torch.tensor(context_lens, dtype=torch.int32).to(runner.cache.device),
        block_tables=new((len(query_lens), blocks), 0, dtype=torch.int32),
        slot_mapping=new((len(tokens),), -1),
        logits_indices=new((1,), 0),
        max_query_len=max(query_lens),
        max_context_len=max(context_lens),
        query_lens_host=tuple(query_lens),
        context_lens_host=tuple(context_lens),
    )
    runner._execute(tokens, tokens, batch)


def patiently(
    items: Iterable[T],
    description: str,
    clock: Callable[[], float] = time.monotonic,
    patience_s: float = _PATIENCE_S,
) -> Iterator[T]:
    """Iterate, and show a progress bar once it has taken ``patience_s``."""
    todo = list(items)
    start_s, bar = clock(), Progress(transient=True)
    task = bar.add_task(description, total=len(todo))
    shown = False
    try:
        for item in todo:
            if not shown and clock() - start_s > patience_s:
                bar.start()
                shown = True
            yield item
            bar.advance(task)
    finally:
        if shown:
            bar.stop()
