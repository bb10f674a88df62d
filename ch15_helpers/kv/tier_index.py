"""Which slot of a memory tier holds which block, which may be given up, and which are safe."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from ch15_helpers.kv.keys import BlockKey
from ch15_helpers.kv.policies import make_eviction_policy
from ch15_helpers.kv.ticket import Ticket


class Entry:
    """One resident block.

    Attributes:
        slot: where it is. pins: copies that are reading it now; it stays while there are any.
        ticket: the copy that fills the slot; None when that is known to be over.
        saved: a lower tier has it too, or has refused it: nothing more to be done.
        chosen: it is being written down because it was the coldest, and was not used since.
    """

    __slots__ = ("chosen", "key", "pins", "saved", "slot", "ticket")

    def __init__(self, key: BlockKey, slot: int) -> None:
        self.key = key
        self.slot = slot
        self.pins = 0
        self.saved = False
        self.chosen = False
        self.ticket: Ticket | None = None


class SlotIndex:
    """Bookkeeping of one memory tier of ``num_slots`` blocks. Not thread-safe: the store locks.

    A block is in one of three states. *Resident*: the policy may choose it. *Pinned*: in use.
    *Clean*: chosen before, saved below, and first to go; a use makes it resident again.
    """

    def __init__(self, num_slots: int, policy: str, nbytes: int) -> None:
        self.num_slots = num_slots
        self._nbytes = nbytes
        self._policy = make_eviction_policy(policy)
        self._entries: dict[BlockKey, Entry] = {}
        self._clean: OrderedDict[BlockKey, Entry] = OrderedDict()
        # A stack in descending order: a batch gets neighbouring slots, which copy as one run.
        self._free = list(range(num_slots - 1, -1, -1))

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    @property
    def num_free(self) -> int:
        """Slots that hold nothing and that nobody reads."""
        return len(self._free)

    @property
    def num_ready(self) -> int:
        """Slots that can be taken at once without losing what only this tier has."""
        return len(self._free) + len(self._clean)

    def get(self, key: BlockKey) -> Entry | None:
        """The entry, without counting as a use."""
        return self._entries.get(key)

    def touch(self, entry: Entry) -> None:
        """The block was used."""
        entry.chosen = False
        self._policy.touch(entry.key)
        if self._clean.pop(entry.key, None) is not None and not entry.pins:
            self._policy.unpin(entry.key)

    def pin(self, entry: Entry) -> None:
        """Keep the slot's content until ``unpin``."""
        entry.pins += 1
        self._policy.pin(entry.key)

    def unpin(self, entry: Entry) -> None:
        """One reader fewer."""
        if entry.pins < 1:
            raise ValueError(f"slot {entry.slot} is not pinned")
        entry.pins -= 1
        if not entry.pins and entry.key not in self._clean and self._holds(entry):
            self._policy.unpin(entry.key)
        if not entry.pins and not self._holds(entry):
            self._free.append(entry.slot)

    def coldest(self) -> Entry | None:
        """What the policy would give up next, or None when all is in use or clean."""
        try:
            return self._entries[self._policy.victim()]  # type: ignore[index]
        except LookupError:
            return None

    def retire(self, entry: Entry) -> None:
        """Make an entry clean: the next slot that is needed may be this one."""
        entry.chosen = False
        if self._holds(entry):
            self._policy.pin(entry.key)
            self._clean[entry.key] = entry

    def room(self) -> bool:
        """Whether ``add`` would find a slot."""
        return bool(self._free) or any(not e.pins for e in self._clean.values())

    def add(self, key: BlockKey, cost_s: float) -> Entry | None:
        """Take a free slot, or that of the oldest clean entry; None when there is neither."""
        if not self._free:
            going = next((e for e in self._clean.values() if not e.pins), None)
            if going is None:
                return None
            self.drop(going)
        entry = Entry(key, self._free.pop())
        self._entries[key] = entry
        self._policy.insert(key, cost_s=cost_s, nbytes=self._nbytes)
        return entry

    def drop(self, entry: Entry) -> None:
        """Forget a block. Its slot is free at once, or when the last reader is done."""
        if not self._holds(entry):
            return
        del self._entries[entry.key]
        self._clean.pop(entry.key, None)
        self._policy.remove(entry.key)
        if not entry.pins:
            self._free.append(entry.slot)

    def check_invariants(self) -> None:
        """Raise AssertionError unless free slots and entries fit together."""
        used = [entry.slot for entry in self._entries.values()]
        taken = [*used, *self._free]
        assert len(set(taken)) == len(taken), "a slot is used twice"
        assert all(0 <= slot < self.num_slots for slot in taken), "a slot does not exist"
        assert len(self._policy) == len(self._entries), "policy and index disagree"
        for key, entry in self._entries.items():
            assert entry.key is key, "an entry is under another's key"
        assert all(self._holds(entry) for entry in self._clean.values()), "clean but gone"
        # Slots of dropped entries that are still being read are in neither list.
        assert len(taken) <= self.num_slots, "more slots than there are"

    def _holds(self, entry: Entry) -> bool:
        return self._entries.get(entry.key) is entry
