"""Who may touch a block until when: leases with deadlines and generations.

A prefill rank leases the blocks of a prompt to the rank that fetches them; a decode rank leases
the blocks that it expects data in. Blocks are given back when the lease is released or expires,
whichever comes first, and a lease never becomes valid again, even when the same blocks are leased
to somebody else: that is how late data is told from current data (Gray and Cheriton, SOSP 1989).
While a wire may still write to the blocks itself, the lease is pinned: it can end, but the blocks
are not given back before the last pin is gone.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from ch15_helpers.disagg.clock import Clock


@dataclass(eq=False, slots=True)
class Lease:
    """A right to some blocks.

    Attributes:
        owner: what it is for, e.g. a request id.
        blocks: physical ids.
        generation: unique and rising within one table.
        deadline_s: when it ends by itself.
        active: whether it still holds.
        pins: how many messages may still be written to its blocks.
    """

    owner: Hashable
    blocks: tuple[int, ...]
    generation: int
    deadline_s: float
    active: bool = True
    pins: int = 0
    give_back: Callable[[Lease], None] | None = None

    def pin(self) -> None:
        """Keep the blocks from being given back, even if the lease ends."""
        self.pins += 1

    def unpin(self) -> None:
        """Undo one ``pin``; with the last one the blocks of an ended lease are given back."""
        assert self.pins, "a lease was unpinned too often"
        self.pins -= 1
        if not self.pins and not self.active and self.give_back is not None:
            self.give_back(self)

    def holds(self, now_s: float) -> bool:
        """Whether it is neither released nor past its deadline."""
        return self.active and now_s < self.deadline_s


class LeaseTable:
    """All leases on one pool; no block is leased twice at a time."""

    def __init__(self, clock: Clock, on_end: Callable[[Lease], None] | None = None) -> None:
        """``on_end`` is called once for each lease, when its blocks may be used for others."""
        self._clock = clock
        self._on_end = on_end
        self._active: dict[int, Lease] = {}
        self._holder: dict[int, Lease] = {}
        self._by_deadline: list[tuple[float, int]] = []
        self._num_granted = 0

    def __len__(self) -> int:
        return len(self._active)

    def grant(self, owner: Hashable, blocks: Sequence[int], duration_s: float) -> Lease:
        """Lease blocks from now on.

        Raises:
            ValueError: a block is leased already, or the duration is not positive.
        """
        if not duration_s > 0:
            raise ValueError(f"duration_s must be positive, got {duration_s}")
        taken = [block for block in blocks if block in self._holder]
        if taken:
            raise ValueError(
                f"blocks {taken} are leased to {self._holder[taken[0]].owner!r}; release that first"
            )
        lease = Lease(owner, tuple(blocks), self._num_granted, self._clock() + duration_s)
        lease.give_back = self._give_back
        self._num_granted += 1
        self._active[lease.generation] = lease
        self._holder.update(dict.fromkeys(blocks, lease))
        heapq.heappush(self._by_deadline, (lease.deadline_s, lease.generation))
        return lease

    def renew(self, lease: Lease, duration_s: float) -> bool:
        """Move the deadline to ``duration_s`` from now; False when the lease is over."""
        self.expire()
        if lease.active:
            lease.deadline_s = self._clock() + duration_s
            heapq.heappush(self._by_deadline, (lease.deadline_s, lease.generation))
        return lease.active

    def release(self, lease: Lease) -> bool:
        """End a lease; False when it was over already."""
        if not lease.active:
            return False
        lease.active = False
        del self._active[lease.generation]
        if not lease.pins:
            self._give_back(lease)
        return True

    def expire(self) -> list[Lease]:
        """End all leases whose deadline has passed, and return them."""
        ended, now_s = [], self._clock()
        while self._by_deadline and self._by_deadline[0][0] <= now_s:
            lease = self._active.get(heapq.heappop(self._by_deadline)[1])
            if lease is not None and lease.deadline_s <= now_s:  # not renewed since
                self.release(lease)
                ended.append(lease)
        return ended

    def _give_back(self, lease: Lease) -> None:
        for block in lease.blocks:
            del self._holder[block]
        if self._on_end is not None:
            self._on_end(lease)

    def holder(self, block: int) -> Lease | None:
        """The lease on a block, if there is one, ended ones that are pinned included."""
        return self._holder.get(block)

    def check_invariants(self) -> None:
        """Raise AssertionError when leases and blocks disagree."""
        leases = {*self._active.values(), *self._holder.values()}
        held = {block: lease for lease in leases for block in lease.blocks}
        assert held == self._holder, "a block's holder is wrong"
        assert sum(len(lease.blocks) for lease in leases) == len(held), "two holders"
        for lease in leases - set(self._active.values()):
            assert lease.pins, "an ended lease keeps its blocks"
            assert not lease.active, "a lease is not listed"
        assert all(lease.active for lease in self._active.values()), "an ended lease is listed"
        queued = set(self._by_deadline)
        for generation, lease in self._active.items():
            assert (lease.deadline_s, generation) in queued, f"{lease.owner!r} never expires"
