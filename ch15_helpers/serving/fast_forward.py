"""Many decode steps at once: what makes the simulator fast without making it less exact.

Between two events (an arrival, a finished request, a full pool) a scheduler returns the same
decodes step after step. Without a model there is nothing to do in between but to count.
"""

from __future__ import annotations

from collections.abc import Sequence

from ch15_helpers.serving.admission import Admission
from ch15_helpers.serving.step import Step


class FastForward(Admission):
    """Repeats decode steps for a driver that has no model, such as the simulator."""

    def num_quiet_steps(self, step: Step) -> int:
        """How often ``schedule`` would now return the decodes of ``step`` again, and nothing else.

        Ask after ``update`` of a step in which nothing finished. The number is a lower bound; it
        assumes that nothing more arrives, that only lengths end requests, and that none was forked.
        """
        if step.chunks or step.preempted or self._loading or not step.decodes:
            return 0
        if step.decodes is not self._decoding or self._prefilling:
            return 0
        full = self.num_running >= self._max_running or not self.policy.joins_running
        # Otherwise whoever waits did not fit, which stays so if it is the same one that is asked.
        if self._waiting and not full and (self._disturbed or not self.policy.timeless):
            return 0
        quiet = min(r.max_output_tokens - len(r.output_token_ids) for r in self._decoding) - 1
        while quiet > 0 and self._blocks_for_steps(quiet) > self.blocks.allocator.num_free:
            quiet //= 2
        return max(0, quiet)

    def repeat(self, times_s: Sequence[float], token: int) -> None:
        """``schedule`` and ``update`` the current decodes ``len(times_s)`` times over.

        Args:
            times_s: when each step ended; no more of them than ``num_quiet_steps`` said.
            token: what every request got in every step; it must not be one that ends a request.
        """
        count = len(times_s)
        tokens = [token] * count
        self._growing = []
        for request in self._decoding:
            computed = request.num_computed_tokens + count
            if computed > request.event_at:
                last = request.num_tokens + count - 1
                self.blocks.ensure(request.request_id, last, count)
                self.residency.set_event(request)
            request.output_token_ids += tokens
            request.token_times_s += times_s
            request.num_computed_tokens = computed
            if computed >= request.event_at:
                self._growing.append(request)

    def _blocks_for_steps(self, count: int) -> int:
        """Blocks that ``count`` more decode steps take."""
        blocks = self.blocks
        return sum(
            blocks.blocks_for(request.num_tokens + count - 1)
            - blocks.capacity(request.request_id) // blocks.block_size
            for request in self._decoding
            if request.num_computed_tokens + count > request.event_at
        )
