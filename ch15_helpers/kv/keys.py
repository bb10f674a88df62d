"""Names for KV blocks by content: a block is its tokens *and* everything before them.

A full block's keys and values depend on the whole prefix, so its name is a chain: the parent's
name and this block's tokens (the hash chain of vLLM's prefix cache; a path in SGLang's radix
tree, Zheng et al., 2024). Keys are interned: the table compares tokens, not hashes, so two
different prefixes never get the same key, whatever their hashes. Equal content means the same
object, and ``is`` decides.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from weakref import WeakValueDictionary

_ROOT_DIGEST = hashlib.blake2b(b"ch15 kv block chain", digest_size=16).digest()


class BlockKey:
    """One full block of one prefix. Made by ``KeyTable.intern`` alone; compared by identity.

    Attributes:
        parent: the block before it; None is the first.
        tokens: the ids in this block.
        depth: blocks before it.
    """

    __slots__ = ("__weakref__", "_digest", "depth", "parent", "tokens")

    def __init__(self, parent: BlockKey | None, tokens: tuple[int, ...]) -> None:
        self.parent = parent
        self.tokens = tokens
        self.depth: int = 0 if parent is None else parent.depth + 1
        self._digest: bytes | None = None

    @property
    def digest(self) -> bytes:
        """16 bytes that name the whole prefix, for file names and routers. Never proof: where
        content comes from outside this process, compare ``prefix_tokens``."""
        if self._digest is None:
            chain = [key for key in self.chain() if key._digest is None]
            for key in chain:
                before = _ROOT_DIGEST if key.parent is None else key.parent._digest
                ids = struct.pack(f"<{len(key.tokens)}q", *key.tokens)
                key._digest = hashlib.blake2b((before or b"") + ids, digest_size=16).digest()
        assert self._digest is not None
        return self._digest

    def chain(self) -> list[BlockKey]:
        """All blocks of the prefix, first to this one."""
        keys: list[BlockKey] = []
        key: BlockKey | None = self
        while key is not None:
            keys.append(key)
            key = key.parent
        keys.reverse()
        return keys

    def prefix_tokens(self) -> tuple[int, ...]:
        """Every token up to the end of this block."""
        return tuple(token for key in self.chain() for token in key.tokens)

    def __repr__(self) -> str:
        return f"BlockKey(depth={self.depth}, digest={self.digest.hex()[:8]})"


class KeyTable:
    """The keys that are alive. One per engine, shared by its prefix cache and its tiers.

    A key lives as long as somebody holds it or one of its descendants.
    """

    def __init__(self, block_size: int) -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        self.block_size = block_size
        self._keys: WeakValueDictionary[tuple[int, tuple[int, ...]], BlockKey] = (
            WeakValueDictionary()
        )

    def __len__(self) -> int:
        return len(self._keys)

    def intern(self, parent: BlockKey | None, tokens: Sequence[int]) -> BlockKey:
        """The key of a block with these tokens after ``parent``.

        Raises:
            ValueError: the number of tokens is not the block size.
        """
        ids = tuple(tokens)
        if len(ids) != self.block_size:
            raise ValueError(f"a full block has {self.block_size} tokens, got {len(ids)}")
        # A parent outlives its children, so its id is not reused while an entry names it.
        name = (id(parent), ids)
        key = self._keys.get(name)
        if key is None:
            key = BlockKey(parent, ids)
            self._keys[name] = key
        return key

    def keys_of(self, tokens: Sequence[int], after: BlockKey | None = None) -> Iterator[BlockKey]:
        """Keys of the full blocks of ``tokens``, which follow ``after``; one at a time, so that a
        look-up that misses early stops early."""
        size = self.block_size
        for start in range(0, len(tokens) - size + 1, size):
            after = self.intern(after, tokens[start : start + size])
            yield after
