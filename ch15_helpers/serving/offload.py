"""Between the scheduler and the tiers below the device pool: which transfer belongs to whom."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from ch15_helpers.kv.keys import BlockKey
from ch15_helpers.serving.scheduler import Scheduler
from ch15_helpers.serving.step import Promotion, Step

if TYPE_CHECKING:  # most engines have no tiers
    from ch15_helpers.kv.cache import PagedKVCache
    from ch15_helpers.kv.tiers import TierConfig
    from ch15_helpers.model.transformer import Transformer


class Arrival(Protocol):
    """A promotion under way (``kv.transfer.Transfer``)."""

    @property
    def done(self) -> bool:
        """Whether nothing more will change; does not wait."""

    @property
    def ok(self) -> Sequence[bool]:
        """For each block, whether its content is there."""

    def wait(self) -> None:
        """Block until ``done``."""


class Store(Protocol):
    """Keeps blocks below the device pool (``kv.tiers.TieredStore``)."""

    def num_leading(self, keys: Sequence[BlockKey]) -> int:
        """How many of the first keys are in some tier."""

    def demote(self, pairs: Sequence[tuple[int, BlockKey]], keep: Sequence[BlockKey] = ()) -> None:
        """Keep the content of device blocks that are about to be overwritten; ``keep`` is about
        to be promoted and must not be given up for it."""

    def promote(self, pairs: Sequence[tuple[BlockKey, int]]) -> Arrival:
        """Start to copy blocks back."""

    def poll(self) -> Sequence[Arrival]:
        """Let the store finish what is due."""

    def close(self) -> None:
        """Stop; no transfer is under way any more."""


class Offload:
    """Starts a step's demotions and promotions, and tells the scheduler what has arrived.

    The store never raises for a block that it cannot keep or find: that is a miss, and the
    scheduler has the request compute those tokens.
    """

    def __init__(self, store: Store, scheduler: Scheduler) -> None:
        self.store = store
        self._scheduler = scheduler
        self._under_way: dict[int, Arrival] = {}
        scheduler.residency.attach_tiers(store)

    @property
    def num_under_way(self) -> int:
        """Promotions that the scheduler has not been told about."""
        return len(self._under_way)

    def demote(
        self, pairs: Sequence[tuple[int, BlockKey]], promotions: Sequence[Promotion] = ()
    ) -> None:
        """Hand evicted blocks down before the step overwrites them.

        Room for them must not come from what this step's promotions are about to ask for.
        """
        self.store.demote(pairs, [key for each in promotions for key, _ in each.pairs])

    def promote(self, promotions: Sequence[Promotion]) -> None:
        """Start to bring blocks back while the step runs."""
        for promotion in promotions:
            self._under_way[promotion.ticket] = self.store.promote(promotion.pairs)

    def deliver(self) -> None:
        """Tell the scheduler about every promotion that has ended; does not wait."""
        if not self._under_way:
            return
        self.store.poll()
        for ticket, transfer in list(self._under_way.items()):
            if transfer.done:
                del self._under_way[ticket]
                self._scheduler.loaded(ticket, transfer.ok)

    def wait(self) -> None:
        """Block until the oldest promotion has ended: there is nothing else to do."""
        for transfer in self._under_way.values():
            transfer.wait()
            return

    def drop(self, step: Step) -> None:
        """The step did not run: promotions that it did not get to start bring nothing."""
        for promotion in step.promotions:
            if promotion.ticket not in self._under_way:
                self._scheduler.loaded(promotion.ticket, [False] * len(promotion.pairs))

    def forget(self) -> None:
        """The device is lost: whatever is under way does not matter to the scheduler any more."""
        self._under_way.clear()

    def close(self) -> None:
        """Wait for what is under way, then close the store."""
        while self._under_way:
            self.wait()
            self.deliver()
        self.store.close()


def tiered_offload(
    model: Transformer,
    cache: PagedKVCache,
    scheduler: Scheduler,
    config: TierConfig,
    clock: Callable[[], float],
) -> Offload:
    """The tiers that ``config`` asks for, behind one scheduler.

    Raises:
        ValueError: the scheduler has no prefix cache, whose blocks the tiers keep.
        TierError: a tier cannot be built.
    """
    from ch15_helpers.kv.fingerprint import weights_fingerprint
    from ch15_helpers.kv.tiers import TieredStore

    prefix = scheduler.residency.prefix
    if prefix is None:
        raise ValueError("tiers hold what the prefix cache evicts; set enable_prefix_caching")
    fingerprint = ""
    if config.disk_dir is not None:  # blocks of these weights alone may come from a file
        fingerprint = weights_fingerprint(model.source, model.dtype, model.named_weights())
    store = TieredStore(cache, prefix.keys, config, fingerprint=fingerprint, clock=clock)
    return Offload(store, scheduler)
