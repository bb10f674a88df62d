"""Blocks gathered, digested and named on a GPU: bit for bit what the host's code does."""

from __future__ import annotations

import time

import pytest
import torch

from ch15_helpers.disagg.checksum import FOLD, LINE_WORDS, Checksum
from ch15_helpers.disagg.message import packed_range, write_tags
from ch15_helpers.disagg.pool import BlockRef, Part, RegisteredPool, refs_of
from ch15_helpers.disagg.transport import BlockTransport
from ch15_helpers.disagg.wire import LocalHub
from ch15_helpers.kv.cache import PagedKVCache
from ch15_helpers.model.config import TINY

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(
    ("words", "offset", "block"),
    [
        (40, 8, 64),
        (2500, 0, 2500),
        (4 * LINE_WORDS + 3, 16, 4 * LINE_WORDS + 50),
        (33 * LINE_WORDS + 16, 0, 34 * LINE_WORDS),
    ],
)
def test_rows_digests_and_tags_are_those_of_the_host(words: int, offset: int, block: int) -> None:
    from ch15_helpers.kernels.digest_rows_triton import rows_triton, tags_triton

    generator = torch.Generator().manual_seed(words)
    pages = torch.randint(-(2**63), 2**63 - 1, (7, block), generator=generator)
    refs = [BlockRef(b, 9 + i, 2**40 + i) for i, b in enumerate((3, 0, 6, 5, 2))]
    wanted = pages[[ref.block for ref in refs], offset : offset + words]
    digests = Checksum(words)(wanted.contiguous().view(torch.uint8))
    part = Part((2, 5), (0, 8))
    wanted_tags = torch.zeros(5, 48, dtype=torch.uint8)
    write_tags(wanted_tags, refs, part, digests)

    checksum = Checksum(words, "cuda")
    shape = LINE_WORDS, FOLD, checksum.num_lines
    names = [int(packed_range(part.layers)), int(packed_range(part.heads))]
    about = torch.tensor([[r.block, r.sequence, r.index, *names] for r in refs], device="cuda")
    rows = torch.zeros(5, words, dtype=torch.int64, device="cuda")
    partials = rows_triton(
        rows, checksum.weights, shape, mode=1, pages=pages.cuda(), about=about, offset=offset
    )
    tags = torch.zeros(5, 6, dtype=torch.int64, device="cuda")
    tags_triton(tags, partials, about, digest=True)
    back = torch.zeros_like(pages).cuda()
    rows_triton(
        rows, checksum.weights, shape, mode=2, pages=back, about=about, offset=offset, digest=False
    )
    assert torch.equal(back[about[:, 0], offset : offset + words].cpu(), wanted)
    assert back.count_nonzero() == wanted.count_nonzero()
    assert torch.equal(rows.cpu(), wanted)
    assert torch.equal(partials.sum(1).cpu(), digests)
    assert torch.equal(rows_triton(rows, checksum.weights, shape).sum(1).cpu(), digests)
    assert torch.equal(tags.cpu(), wanted_tags.view(torch.int64))


@pytest.mark.parametrize("layers", [(0, TINY.num_hidden_layers), (1, 2)])
def test_blocks_cross_a_hub_on_the_gpu(layers: tuple[int, int]) -> None:
    hub = LocalHub(2, "cuda")
    caches = [PagedKVCache(TINY, 12, 4, device="cuda") for _ in range(2)]
    caches[0].pages.normal_()
    ends = [BlockTransport(hub.wire(rank), clock=time.perf_counter) for rank in range(2)]
    for end, cache in zip(ends, caches, strict=True):
        end.register(RegisteredPool(cache))
    part = Part(layers, (0, TINY.num_key_value_heads))
    receive = ends[1].receive(refs_of([4, 9, 0], 1), source=0, channel=1, part=part)
    ends[0].send(refs_of([2, 3, 7], 1), to=1, channel=1, part=part)
    ends[1].wait(receive)
    first, last = layers
    assert receive.report.is_clean
    sent = caches[0].pages[[2, 3, 7], first:last]
    assert torch.equal(caches[1].pages[[4, 9, 0], first:last], sent)
    assert caches[1].pages.count_nonzero() == sent.count_nonzero()
