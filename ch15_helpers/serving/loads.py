"""How much work each replica has, as a router counts it: tokens promised and not delivered."""

from __future__ import annotations

import heapq


class Loads:
    """Outstanding tokens of each replica; finds the least loaded one in O(log n).

    Attributes:
        outstanding: tokens (prompt and output) of the open attempts of each replica.
        assigned: tokens that each replica was ever given; it breaks ties, so that idle replicas
            take turns.
        alive: which ones may get work. living: their numbers, in order.
    """

    def __init__(self, num_replicas: int) -> None:
        if num_replicas < 1:
            raise ValueError(f"there must be at least one replica, got {num_replicas}")
        self.outstanding = [0] * num_replicas
        self.assigned = [0] * num_replicas
        self.alive = [True] * num_replicas
        self.living = list(range(num_replicas))
        self._total = 0  # outstanding of the living
        self._heap: list[tuple[int, int, int]] = []  # entries that no longer hold are skipped
        self._rebuild()

    def __len__(self) -> int:
        return len(self.outstanding)

    @property
    def mean(self) -> float:
        """Mean load of the living; 0 when there are none."""
        return self._total / len(self.living) if self.living else 0.0

    def least(self) -> int:
        """The living replica with the smallest load, then with the least work so far.

        Raises:
            IndexError: none is alive.
        """
        heap = self._heap
        while heap:
            replica = heap[0][2]
            if self.alive[replica] and heap[0] == self._entry(replica):
                return replica
            heapq.heappop(heap)
        raise IndexError("no replica is alive")

    def add(self, replica: int, tokens: int) -> None:
        """Work was sent to a replica."""
        self.assigned[replica] += tokens
        self._change(replica, tokens)

    def remove(self, replica: int, tokens: int) -> None:
        """Work is done, or taken back."""
        self._change(replica, -tokens)

    def set_alive(self, replica: int, alive: bool) -> None:
        """Take a replica out, or back in."""
        if self.alive[replica] == alive:
            return
        self.alive[replica] = alive
        self.living = [r for r, living in enumerate(self.alive) if living]
        self._total = sum(self.outstanding[r] for r in self.living)
        self._rebuild()

    def check_invariants(self) -> None:
        """Raise AssertionError when sums or the order are wrong."""
        assert all(tokens >= 0 for tokens in self.outstanding), "less than no work"
        assert self.living == [r for r, alive in enumerate(self.alive) if alive], "stale list"
        assert self._total == sum(self.outstanding[r] for r in self.living), "wrong total"
        if self.living:
            assert self.least() == min(self.living, key=self._entry), "the heap is wrong"

    def _entry(self, replica: int) -> tuple[int, int, int]:
        return self.outstanding[replica], self.assigned[replica], replica

    def _change(self, replica: int, tokens: int) -> None:
        self.outstanding[replica] += tokens
        if not self.alive[replica]:
            return
        self._total += tokens
        if len(self._heap) > 8 * len(self) + 64:
            self._rebuild()
        else:
            heapq.heappush(self._heap, self._entry(replica))

    def _rebuild(self) -> None:
        self._heap = [self._entry(replica) for replica in self.living]
        heapq.heapify(self._heap)
