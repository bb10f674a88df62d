"""Transport in one process: what lands, what does not, and when it is too late."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ch15_helpers.disagg.checksum import FOLD, LINE_WORDS, Checksum
from ch15_helpers.disagg.clock import VirtualClock
from ch15_helpers.disagg.fabric import Fabric, FabricWire
from ch15_helpers.disagg.faults import Fault, FaultyWire
from ch15_helpers.disagg.heads import head_routes, heads_of
from ch15_helpers.disagg.leases import LeaseTable
from ch15_helpers.disagg.link import LinkModel
from ch15_helpers.disagg.message import TAG_BYTES
from ch15_helpers.disagg.pool import BlockRef, Part, RegisteredPool, refs_of
from ch15_helpers.disagg.transfer import TransferState
from ch15_helpers.disagg.transport import BlockTransport
from ch15_helpers.disagg.wire import LocalHub, LocalWire, WireMessage
from ch15_helpers.errors import TransportError
from ch15_helpers.kv.quantised import make_kv_cache
from ch15_helpers.model.config import TINY

FAULTS: tuple[Fault, ...] = get_args(Fault)


def filled(num_blocks: int = 12, seed: int = 0, **options: Any) -> RegisteredPool:
    torch.manual_seed(seed)
    cache = make_kv_cache(TINY, num_blocks, 4, **options)
    cache.content.view(torch.uint8).random_(0, 120)
    return RegisteredPool(cache)


class Pair:
    """Rank 0 sends, rank 1 receives."""

    def __init__(self, source: RegisteredPool, target: RegisteredPool, **options: Any) -> None:
        self.clock = options.pop("clock", None) or VirtualClock()
        wrap = options.pop("wrap", lambda wire: wire)
        hub = LocalHub(2)
        options.setdefault("max_message_bytes", 3 * (source.row_bytes(source.whole) + 48))
        self.source = BlockTransport(wrap(hub.wire(0)), clock=self.clock, **options)
        self.target = BlockTransport(hub.wire(1), clock=self.clock, **options)
        self.source.register(source)
        self.target.register(target)

    def move(self, table: list[int], other: list[int], **options: Any) -> Any:
        receive = self.target.receive(refs_of(other, 7), source=0, channel=5, **options)
        send = self.source.send(refs_of(table, 7), to=1, channel=5)
        self.target.wait(receive)
        self.source.wait(send)
        self.source.check_invariants()
        self.target.check_invariants()
        assert send.state is TransferState.DONE
        return receive


# ---- what lands --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layout": "layer_major"},
        {"dtype": torch.bfloat16},
        {"dtype": "int8"},
        {"dtype": "fp8_e4m3"},
    ],
    ids=str,
)
def test_blocks_arrive_bit_for_bit(options: Any) -> None:
    source, target = filled(**options), filled(seed=1, **options)
    before = target.cache.content.clone()
    pair = Pair(source, target)
    table, other = [3, 0, 11, 5, 8, 2, 9], [1, 4, 2, 10, 0, 6, 7]
    receive = pair.move(table, other)
    assert receive.state is TransferState.DONE and receive.report.is_clean
    assert receive.ok == [True] * 7 and receive.to_recompute == []
    got = target.cache.content[other].contiguous()
    assert torch.equal(
        got.view(torch.uint8), source.cache.content[table].contiguous().view(torch.uint8)
    )
    rest = [block for block in range(12) if block not in other]
    assert torch.equal(
        target.cache.content[rest].contiguous().view(torch.uint8),
        before[rest].contiguous().view(torch.uint8),
    ), "blocks that nobody named were written"


def test_layouts_may_differ() -> None:
    source, target = filled(), filled(seed=1, layout="layer_major")
    Pair(source, target).move([3, 1], [0, 2])
    assert torch.equal(target.cache.pages[[0, 2]], source.cache.pages[[3, 1]])


@pytest.mark.parametrize("dtype", [torch.float32, "int8"])
def test_layers_travel_apart(dtype: Any) -> None:
    source, target = filled(dtype=dtype), filled(seed=1, dtype=dtype)
    before = target.cache.pages.clone()
    pair = Pair(source, target)
    pair.move([3, 1], [0, 2], part=None)
    target.cache.pages.copy_(before)
    part = Part((1, 2), source.heads)
    receive = pair.target.receive(refs_of([0, 2], 7), source=0, channel=6, part=part)
    pair.source.send(refs_of([3, 1], 7), to=1, channel=6, part=part)
    pair.target.wait(receive)
    assert torch.equal(target.cache.pages[[0, 2], 1], source.cache.pages[[3, 1], 1])
    assert torch.equal(target.cache.pages[:, 0], before[:, 0])


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found_and_never_land(fault: Fault) -> None:
    source, target = filled(), filled(seed=1)
    before = target.cache.pages.clone()
    table, other = [3, 0, 11, 5, 8], [1, 4, 2, 10, 0]
    pair = Pair(source, target, wrap=lambda wire: FaultyWire(wire, fault, row=1))
    receive = pair.move(table, other)
    report = receive.report
    assert not report.is_clean
    expected = {
        "corrupt": ({1}, set(), set(), set()),
        "exchange": (set(), {1, 2}, set(), set()),
        "reorder": (set(), set(), set(), set()),
        "drop": (set(), set(), {1}, set()),
        "duplicate": (set(), set(), {2}, {1}),
    }[fault]
    found = (report.corrupted, report.exchanged, report.missing, report.duplicated)
    assert found == expected
    assert report.num_out_of_order == (2 if fault == "reorder" else 0)
    bad = expected[0] | expected[1] | expected[2]
    assert set(receive.to_recompute) == bad
    for position, (mine, theirs) in enumerate(zip(other, table, strict=True)):
        right = before[mine] if position in bad else source.cache.pages[theirs]
        assert torch.equal(target.cache.pages[mine], right)


@pytest.mark.parametrize("fault", FAULTS)
def test_without_the_check_every_fault_lands(fault: Fault) -> None:
    source, target = filled(), filled(seed=1)
    table, other = [3, 0, 11, 5, 8], [1, 4, 2, 10, 0]
    wrap = lambda wire: FaultyWire(wire, fault, row=1)  # noqa: E731
    receive = Pair(source, target, wrap=wrap, verify=False).move(table, other)
    assert receive.ok == [True] * 5
    assert not torch.equal(target.cache.pages[other], source.cache.pages[table])


def test_other_sequences_and_other_parts_are_strangers() -> None:
    source, target = filled(), filled(seed=1)
    before = target.cache.pages.clone()
    pair = Pair(source, target)
    receive = pair.target.receive(refs_of([0, 2], 8), source=0, channel=5)
    pair.source.send(refs_of([3, 1], 7), to=1, channel=5)
    pair.target.wait(receive)
    assert receive.report.num_stray == 2 and receive.report.missing == {0, 1}
    first = pair.target.receive(
        refs_of([0], 7), source=0, channel=6, part=Part((0, 1), target.heads)
    )
    pair.source.send(refs_of([3], 7), to=1, channel=6, part=Part((1, 2), source.heads))
    pair.target.wait(first)
    assert first.report.num_stray == 1 and torch.equal(target.cache.pages, before)


def test_other_heads_are_strangers_too() -> None:
    source, target = filled(), filled(seed=1)
    before = target.cache.pages.clone()
    pair = Pair(source, target)
    layers = source.whole.layers
    receive = pair.target.receive(
        refs_of([0], 7), source=0, channel=6, part=Part(layers, (0, 1))
    )  # fmt: skip
    pair.source.send(refs_of([3], 7), to=1, channel=6, part=Part(layers, (1, 2)))
    pair.target.wait(receive)
    assert receive.report.num_stray == 1 and torch.equal(target.cache.pages, before)


class MislabellingWire(LocalWire):
    """Changes one bit of the logical index in the second tag of what it sends: 1 becomes 3."""

    def start(self, messages: Sequence[WireMessage]) -> None:
        for message in messages:
            if message.sending:
                message.seal()
                message.buffer[TAG_BYTES + 8] ^= 2
        super().start(messages)


def test_a_damaged_tag_is_not_believed() -> None:
    source, target = filled(), filled(seed=1)
    pair = Pair(source, target, wrap=lambda wire: MislabellingWire(wire.hub, wire.rank))
    receive = pair.move([3, 0, 11], [1, 4, 2])
    assert receive.report.num_stray == 1 and receive.to_recompute == [1]
    pair = Pair(source, target, wrap=lambda wire: MislabellingWire(wire.hub, wire.rank),
                max_message_bytes=2**20)  # fmt: skip
    receive = pair.move([3, 0, 11, 5, 8], [1, 4, 2, 10, 0])
    assert receive.to_recompute == [1] and not receive.report.duplicated
    assert torch.equal(target.cache.pages[10], source.cache.pages[5]), "block 1 came as block 3"


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_flipped_bit_and_any_swap_changes_the_digest(data: st.DataObject) -> None:
    num_words = data.draw(st.integers(2, 40))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    row = torch.randint(0, 256, (1, 8 * num_words), dtype=torch.uint8)
    checksum = Checksum(num_words)
    right = checksum(row)
    bit = data.draw(st.integers(0, 64 * num_words - 1))
    flipped = row.clone()
    flipped[0, bit // 8] ^= 1 << bit % 8
    assert checksum(flipped) != right
    first, second = data.draw(st.permutations(range(num_words)))[:2]
    words = row.view(torch.int64).clone()
    words[0, [first, second]] = words[0, [second, first]]
    if not torch.equal(words.view(torch.uint8), row):
        assert checksum(words.view(torch.uint8)) != right


@pytest.mark.parametrize("num_lines", [3, 4, 15, 16, 35])
def test_folded_rows_keep_what_a_digest_promises(num_lines: int) -> None:
    """Every flipped bit, every run that moved; the same by NumPy, by torch and by the formula."""
    count = num_lines * LINE_WORDS + 72
    torch.manual_seed(0)
    words = torch.randint(-(2**62), 2**62, (3, count))
    checksum = Checksum(count)
    right = checksum(words.view(torch.uint8))
    by_torch = torch.stack([checksum.portable(row[None])[0] for row in words])
    assert torch.equal(right, by_torch)
    lines = num_lines if num_lines >= 4 else 0
    columns, groups, rest = (each.tolist() for each in checksum.weights)
    weights = [columns[i % LINE_WORDS] * groups[i // LINE_WORDS // FOLD]
               for i in range(lines * LINE_WORDS)] + rest  # fmt: skip
    total = sum(w * x for w, x in zip(weights, words[1].tolist(), strict=True))
    assert (total - int(right[1])) % 2**64 == 0 and all(weight % 2 for weight in weights)
    for size in (8, 32, 64, 512, 1024, count // 2):  # words of a head, a token, a page, ...
        moved = words[0].clone()
        moved[:size], moved[-size:] = words[0][-size:], words[0][:size]
        assert checksum(moved[None].view(torch.uint8))[0] != right[0]
        shifted = words[0].roll(size)
        assert checksum(shifted[None].view(torch.uint8))[0] != right[0]
    for word in (0, 5, LINE_WORDS, count - 80, count - 1):
        for bit in (0, 31, 63):
            flipped = words[0].clone()
            flipped[word] ^= -(2**63) if bit == 63 else 1 << bit
            assert checksum(flipped[None].view(torch.uint8))[0] != right[0]


# ---- tensor parallelism ------------------------------------------------------------------------


def shards(pool: RegisteredPool, degree: int) -> list[RegisteredPool]:
    """What each of ``degree`` ranks would hold of a pool."""
    from dataclasses import replace

    total = TINY.num_key_value_heads
    result = []
    for rank in range(degree):
        low, high = heads_of(rank, degree, total)
        config = replace(TINY, num_key_value_heads=high - low)
        cache = make_kv_cache(config, pool.cache.num_blocks, 4)
        cache.pages.copy_(pool.cache.pages[:, :, :, :, low:high])
        result.append(RegisteredPool(cache, first_head=low))
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
@pytest.mark.parametrize("num_words", [1, 90, 5 * LINE_WORDS, 16 * LINE_WORDS + 7, 39_003])
def test_compiled_digests_are_those_of_numpy_bit_for_bit(
    num_words: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(num_words)
    wide = torch.randint(-(2**63), 2**63 - 1, (5, num_words + 3))
    rows = wide.view(dtype).view(torch.uint8)[:, : 8 * num_words]  # they lie apart
    digests = Checksum(num_words)(rows)
    monkeypatch.setattr("ch15_helpers.disagg.checksum.cpu_library", lambda: None)
    assert torch.equal(Checksum(num_words)(rows), digests)
    assert torch.equal(Checksum(num_words).portable(rows.contiguous().view(torch.int64)), digests)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 2)])
def test_degrees_of_tensor_parallelism_may_differ(before: int, after: int) -> None:
    pool, empty = filled(), filled(seed=1)
    sources, targets = shards(pool, before), shards(empty, after)
    hub, clock = LocalHub(before + after), VirtualClock()
    transports = [BlockTransport(hub.wire(rank), clock=clock) for rank in range(before + after)]
    for transport, shard in zip(transports, [*sources, *targets], strict=True):
        transport.register(shard)
    receives = []
    routes = list(head_routes(TINY.num_key_value_heads, before, after))
    for route in routes:
        part = Part((0, TINY.num_hidden_layers), route.heads)
        target = before + route.target
        receives.append(
            transports[target].receive(
                refs_of([4, 2], 1), source=route.source, channel=1, part=part
            )
        )
        transports[route.source].send(refs_of([9, 3], 1), to=target, channel=1, part=part)
    for receive, route in zip(receives, routes, strict=True):
        transports[before + route.target].wait(receive)
        assert receive.report.is_clean
    for shard in targets:
        low, high = shard.heads
        expected = pool.cache.pages[[9, 3]][:, :, :, :, low:high]
        assert torch.equal(shard.cache.pages[[4, 2]], expected)


def test_head_routes_cover_every_head_once() -> None:
    for total in (2, 4, 8, 12):
        for before in (d for d in range(1, total + 1) if total % d == 0):
            for after in (d for d in range(1, total + 1) if total % d == 0):
                seen = [h for r in head_routes(total, before, after) for h in range(*r.heads)]
                assert sorted(seen) == list(range(total))
    with pytest.raises(ValueError, match="must divide"):
        list(head_routes(3, 2, 1))


# ---- too late ----------------------------------------------------------------------------------


def test_late_data_never_reaches_a_block_that_was_given_away() -> None:
    source, target = filled(), filled(seed=1)
    pair = Pair(source, target)
    receive = pair.target.receive(refs_of([4, 2], 7), source=0, channel=5, timeout_s=1.0)
    pair.target.wait(receive)  # the virtual clock jumps to the deadline
    assert receive.state is TransferState.EXPIRED and pair.clock() == 1.0
    assert receive.report.missing == {0, 1}
    target.cache.pages[[4, 2]] = 42.0  # now they are somebody else's
    send = pair.source.send(refs_of([3, 1], 7), to=1, channel=5)
    pair.target.poll()
    pair.source.wait(send)
    assert (target.cache.pages[[4, 2]] == 42.0).all()
    assert pair.target.num_late == 1
    assert pair.move([3], [0]).report.is_clean, "the connection must go on"


def test_a_cancelled_receive_lands_nothing_and_a_cancelled_send_is_noticed() -> None:
    source, target = filled(), filled(seed=1)
    before = target.cache.pages.clone()
    pair = Pair(source, target)
    receive = pair.target.receive(refs_of([4, 2], 7), source=0, channel=5)
    assert pair.target.cancel(receive) and not pair.target.cancel(receive)
    pair.source.send(refs_of([3, 1], 7), to=1, channel=5)
    pair.target.poll()
    assert torch.equal(target.cache.pages, before)
    # More messages than the window: the rest come as empty shells.
    table = list(range(12))
    long = BlockTransport(pair.source.wire, clock=pair.clock, max_message_bytes=1)
    short = BlockTransport(pair.target.wire, clock=pair.clock, max_message_bytes=1)
    long.register(source)
    short.register(target)
    send = long.send(refs_of(table, 9), to=1, channel=9)
    long.cancel(send)
    receive = short.receive(refs_of(table, 9), source=0, channel=9)
    while not receive.done:
        long.poll()
        short.poll()
    window = pair.source.wire.window
    assert receive.report.landed == set(range(window))
    assert receive.report.missing == set(range(window, 12))


def test_nothing_lands_once_the_lease_is_over() -> None:
    source, target = filled(), filled(seed=1)
    before = target.cache.pages.clone()
    pair = Pair(source, target)
    leases = LeaseTable(pair.clock)
    lease = leases.grant("r", [4, 2], 5.0)
    receive = pair.target.receive(refs_of([4, 2], 7), source=0, channel=5, lease=lease)
    leases.release(lease)
    pair.source.send(refs_of([3, 1], 7), to=1, channel=5)
    pair.target.wait(receive)
    assert receive.state is TransferState.CANCELLED
    assert torch.equal(target.cache.pages, before)


def test_a_stuck_transfer_does_not_hold_up_the_others() -> None:
    source, target = filled(), filled(seed=1)
    pair = Pair(source, target, max_message_bytes=1)
    never = pair.target.receive(refs_of(list(range(10)), 1), source=0, channel=1, timeout_s=1.0)
    pair.target.wait(never)
    assert pair.move([3, 1], [0, 2]).report.is_clean


def test_a_closed_peer_ends_transfers_with_an_error() -> None:
    pair = Pair(filled(), filled(seed=1))
    receive = pair.target.receive(refs_of([4, 2], 7), source=0, channel=5)
    pair.source.close()
    pair.target.wait(receive)
    assert receive.state is TransferState.FAILED and "closed" in str(receive.error)
    late = pair.target.receive(refs_of([4, 2], 7), source=0, channel=6)
    pair.target.wait(late)
    assert late.state is TransferState.FAILED


def test_misuse_is_an_error() -> None:
    pair = Pair(filled(), filled(seed=1))
    with pytest.raises(TransportError, match="not a peer"):
        pair.source.send(refs_of([1], 1), to=0, channel=1)
    with pytest.raises(TransportError, match="channel"):
        pair.source.send(refs_of([1], 1), to=1, channel=-1)
    with pytest.raises(TransportError, match="twice"):
        pair.source.send([BlockRef(1, 1, 0), BlockRef(2, 1, 0)], to=1, channel=1)
    with pytest.raises(ValueError, match="block ids"):
        pair.source.send(refs_of([12], 1), to=1, channel=1)
    with pytest.raises(ValueError, match="not in this pool"):
        pair.source.send(refs_of([1], 1), to=1, channel=1, part=Part((0, 3), (0, 1)))
    unregistered = BlockTransport(pair.source.wire, clock=pair.clock)
    with pytest.raises(TransportError, match="register"):
        unregistered.send(refs_of([1], 1), to=1, channel=1)
    nothing = pair.source.send([], to=1, channel=3)
    assert nothing.state is TransferState.DONE


# ---- leases ------------------------------------------------------------------------------------


def test_leases_expire_renew_and_never_come_back() -> None:
    clock, ended = VirtualClock(), []
    leases = LeaseTable(clock, on_end=ended.append)
    first = leases.grant("a", [1, 2], 1.0)
    second = leases.grant("b", [3], 2.0)
    with pytest.raises(ValueError, match="leased to 'a'"):
        leases.grant("c", [2], 1.0)
    clock.advance_to(0.9)
    assert leases.renew(first, 3.0)
    clock.advance_to(2.0)
    assert leases.expire() == [second] and ended == [second]
    assert not leases.renew(second, 9.0) and not leases.release(second)
    again = leases.grant("b", [3], 1.0)
    assert again.generation > second.generation and not second.holds(clock())
    assert leases.holder(3) is again and leases.holder(7) is None
    leases.check_invariants()
    assert leases.release(first) and len(leases) == 1


def test_random_use_of_leases_keeps_the_books() -> None:
    dice, clock = random.Random(4), VirtualClock()
    ended: list[int] = []
    leases = LeaseTable(clock, on_end=lambda lease: ended.append(lease.generation))
    granted = []
    for _ in range(400):
        free = [block for block in range(20) if leases.holder(block) is None]
        action = dice.random()
        if action < 0.4 and free:
            blocks = dice.sample(free, dice.randint(1, len(free)))
            granted.append(leases.grant(len(granted), blocks, dice.uniform(0.1, 3.0)))
        elif action < 0.6 and granted:
            leases.release(dice.choice(granted))
        elif action < 0.8 and granted:
            leases.renew(dice.choice(granted), dice.uniform(0.1, 3.0))
        else:
            clock.advance_to(clock() + dice.random())
            leases.expire()
        leases.check_invariants()
    clock.advance_to(1e9)
    leases.expire()
    assert sorted(ended) == list(range(len(granted))), "each ends exactly once"


# ---- the modelled network ----------------------------------------------------------------------


def test_a_modelled_transfer_takes_the_modelled_time() -> None:
    source, target = filled(), filled(seed=1)
    clock = VirtualClock()
    link = LinkModel(latency_s=0.5, bandwidth_GBps=1e-6)  # 1000 bytes a second
    fabric = Fabric(link, clock)
    hub = LocalHub(2)
    ends = [BlockTransport(FabricWire(hub.wire(r), fabric), clock=clock,
                           default_timeout_s=1e9) for r in range(2)]  # fmt: skip
    ends[0].register(source)
    ends[1].register(target)
    receive = ends[1].receive(refs_of([4, 2], 7), source=0, channel=5)
    ends[0].send(refs_of([3, 1], 7), to=1, channel=5)
    ends[1].wait(receive)
    assert receive.report.is_clean
    assert clock() == pytest.approx(0.5 + receive.num_bytes / 1000)
    assert torch.equal(target.cache.pages[[4, 2]], source.cache.pages[[3, 1]])
    # A transfer that the model says is too slow expires, and what arrives later is dropped.
    target.cache.pages[[4, 2]] = 42.0
    late = ends[1].receive(refs_of([4, 2], 8), source=0, channel=6, timeout_s=1.0)
    ends[0].send(refs_of([3, 1], 8), to=1, channel=6)
    ends[1].wait(late)
    assert late.state is TransferState.EXPIRED
    clock.advance_to(1e6)
    ends[1].poll()
    assert ends[1].num_late == 1 and (target.cache.pages[[4, 2]] == 42.0).all()


def test_lost_messages_are_found_missing_or_sent_again() -> None:
    for retransmit_s in (None, 2.0):
        source, target = filled(), filled(seed=1)
        clock, hub = VirtualClock(), LocalHub(2)
        link = LinkModel(0.1, 1.0, loss=0.5, retransmit_s=retransmit_s)
        fabric = Fabric(link, clock, seed=3)
        ends = [BlockTransport(FabricWire(hub.wire(r), fabric), clock=clock,
                               default_timeout_s=1e9, max_message_bytes=1)
                for r in range(2)]  # fmt: skip
        ends[0].register(source)
        ends[1].register(target)
        table = list(range(12))
        receive = ends[1].receive(refs_of(table, 7), source=0, channel=5)
        ends[0].send(refs_of(table, 7), to=1, channel=5)
        ends[1].wait(receive)
        lost = {i for i, d in enumerate(fabric.deliveries) if d.lost}
        assert receive.report.missing == lost
        assert bool(lost) == (retransmit_s is None)
        if retransmit_s is not None:
            assert max(d.num_losses for d in fabric.deliveries) >= 1
            assert clock() > 2.0
