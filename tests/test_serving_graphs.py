"""What captured steps are made of, as far as it can be checked without a GPU."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ch15_helpers.kv.cache import PagedKVCache
from ch15_helpers.model.config import LLAMA3_8B, SMOLLM2_135M
from ch15_helpers.serving.batch_builder import BatchBuilder, HostBatch, Uploader
from ch15_helpers.serving.graph_buffers import GraphBuffers, StepShape
from ch15_helpers.serving.graphs import StepGraphs, in_pieces, ladder, prompt_ladder
from ch15_helpers.serving.last_ids import LastIds, fill_in
from ch15_helpers.serving.request import PENDING_TOKEN, Request
from ch15_helpers.serving.scheduler import Scheduler, SchedulerConfig
from ch15_helpers.serving.step import Step

CPU = torch.device("cpu")


def mixed_batch(seed: int, model_len: int = 512) -> HostBatch:
    """Decodes and chunks as a scheduler makes them."""
    rng = random.Random(seed)
    scheduler = Scheduler(SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=70))
    for number in range(6):
        prompt = [rng.randrange(90) for _ in range(rng.randint(1, 90))]
        scheduler.add(Request(f"{number}", prompt, max_tokens_of(20)))
    step = Step()
    for _ in range(rng.randint(2, 4)):
        step = scheduler.schedule(0.0)
        scheduler.update(step, [rng.randrange(90) for _ in step.sampled], 0.0)
    step = scheduler.schedule(0.0)
    return BatchBuilder(16).build(step, scheduler.blocks.tables)


def max_tokens_of(count: int):
    from ch15_helpers import SamplingParams

    return SamplingParams(max_tokens=count)


def test_ladders() -> None:
    assert ladder(8) == [1, 2, 4, 8] and ladder(1) == [1] and ladder(70)[-3:] == [56, 64, 70]
    assert prompt_ladder(SMOLLM2_135M, 300) == [16, 24, 32, 48, 64, 96, 128, 192, 256, 300]
    # With weights this large computing soon takes longer than launching.
    assert prompt_ladder(LLAMA3_8B, 8192)[-1] == 512


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("query_len", [1, 7, 21])
def test_pieces_attend_as_the_whole(tiny, seed: int, query_len: int) -> None:
    """The same logits: pieces see what their own last query sees."""
    whole = mixed_batch(seed)
    pieces = in_pieces(whole, query_len)
    assert max(pieces.query_lens) <= query_len and sum(pieces.query_lens) == len(whole.token_ids)
    logits = []
    for batch in (whole, pieces):
        pages = torch.zeros(1024, 2, 2, 16, tiny.config.num_key_value_heads, tiny.config.head_dim)
        torch.manual_seed(0)
        pages.normal_()
        logits.append(tiny.forward(*_inputs(batch, pages)))
    assert torch.allclose(logits[0], logits[1], atol=1e-4)


def _inputs(batch: HostBatch, pages: torch.Tensor):
    token_ids, positions, metadata = Uploader(CPU).upload(batch)
    return token_ids, positions, pages, metadata


@pytest.mark.parametrize("seed", range(4))
def test_padding_writes_nothing_and_sees_nothing(seed: int) -> None:
    batch = in_pieces(mixed_batch(seed), 21)
    tokens, seqs, rows = len(batch.token_ids), len(batch.context_lens), len(batch.logits_indices)
    buffers = GraphBuffers(StepShape(tokens + 9, seqs + 4, rows + 3, 21), 40, CPU)
    for _ in range(2):  # what an earlier, larger batch left behind is gone
        buffers.host.fill_(77)
        buffers.fill(batch)
    assert buffers.token_ids[:tokens].tolist() == batch.token_ids.tolist()
    assert buffers.slots[:tokens].tolist() == batch.slot_mapping.tolist()
    assert buffers.slots[tokens:].eq(-1).all() and buffers.token_ids[tokens:].eq(0).all()
    assert buffers.context_lens[seqs:].eq(0).all()
    starts = buffers.query_starts.tolist()
    assert starts[: seqs + 1] == batch.query_starts.tolist()
    assert starts[seqs + 1 :] == [tokens + n for n in (1, 2, 3, 4)]
    width = batch.block_tables.shape[1]
    assert np.array_equal(buffers.tables[:seqs, :width].numpy(), batch.block_tables)


def test_ids_of_the_last_step_are_found_on_the_device() -> None:
    requests = [Request(f"{n}", [n]) for n in range(4)]
    last = LastIds(8, CPU)
    launched = last.remember(requests[:3], torch.tensor([50, -1, 52]))
    assert launched.tokens() == [50, -1, 52]
    assert last.rows(requests[::-1]).tolist() == [0, 2, 1, 0]
    assert last.rows(requests[:3]).tolist() == [0, 1, 2]
    tokens = torch.tensor([7, -1 - 2, -1 - 0, -1 - 1])
    assert fill_in(tokens, last.ids).tolist() == [7, 52, 50, 0]  # an invalid one is any id


def test_the_builder_refers_to_pending_tokens() -> None:
    scheduler = Scheduler(SchedulerConfig(max_num_seqs=4, num_blocks=40))
    for number in range(3):
        scheduler.add(Request(f"{number}", [number, 5], max_tokens_of(9)))
    first = scheduler.schedule(0.0)
    scheduler.advance(first)
    step = scheduler.schedule(0.0)
    assert [r.output_token_ids for r in step.decodes] == [[PENDING_TOKEN]] * 3
    last = LastIds(4, CPU)
    last.remember(first.sampled, torch.tensor([10, 11, 12]))
    batch = BatchBuilder(16).build(step, scheduler.blocks.tables, last.rows)
    assert batch.has_pending and batch.token_ids.tolist() == [-1, -2, -3]
    assert fill_in(torch.from_numpy(batch.token_ids), last.ids).tolist() == [10, 11, 12]
    scheduler.resolve(first, [10, 11, 12], 1.0)
    scheduler.check_invariants()
    known = BatchBuilder(16).build(step, scheduler.blocks.tables, last.rows)
    assert not known.has_pending and known.token_ids.tolist() == [10, 11, 12]


def graphs_of(model, monkeypatch: pytest.MonkeyPatch, room: int = 10**9) -> StepGraphs:
    """Graphs whose capture is only noted; steps of more than ``room`` tokens do not fit."""

    def capture_one(self, shape: StepShape):
        if shape.tokens > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return SimpleNamespace(graph=SimpleNamespace(pool=lambda: None))

    monkeypatch.setattr(StepGraphs, "_capture_one", capture_one)
    cache = PagedKVCache(model.config, 64, 16)
    graphs = StepGraphs(model, cache, 8, 512, LastIds(8, CPU))
    graphs.capture(graphs.prompt_shapes(256) + graphs.decode_shapes())
    return graphs


def test_what_has_no_room_is_left_out_of_the_ladder(
    tiny, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    graphs = graphs_of(tiny, monkeypatch)
    assert graphs.sizes == [1, 2, 4, 8] and graphs.prompt_sizes[-1] == 256
    small = graphs_of(tiny, monkeypatch, room=48)
    assert small.sizes == [1, 2, 4, 8] and small.prompt_sizes == [16, 24, 32, 48]
    assert "no memory to capture steps of 256 tokens" in caplog.text
    none = graphs_of(tiny, monkeypatch, room=0)
    assert none.sizes == [] and none.run(mixed_batch(0)) is None


@pytest.mark.parametrize("seed", range(6))
def test_a_batch_gets_the_smallest_step_that_holds_it(
    tiny, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    graphs, batch = graphs_of(tiny, monkeypatch), mixed_batch(seed)
    shape, pieces = graphs._fit(batch)
    assert shape is not None and shape.tokens >= len(batch.token_ids)
    smaller = [size for size in graphs.prompt_sizes if size < shape.tokens]
    assert all(size < len(batch.token_ids) for size in smaller)
    assert len(pieces.query_lens) <= shape.seqs and len(batch.logits_indices) <= shape.rows
    assert (shape.query_len == 0) == batch.is_decode
    graphs._max_context = int(pieces.context_lens.sum()) - 1  # attention would read too much
    assert (graphs._fit(batch)[0] is None) == (not batch.is_decode)
