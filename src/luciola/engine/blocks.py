"""Which blocks of the cache belong to whom: reference counts, prefixes found by hash, eviction by least recent use.

The cache is cut into blocks of `block_size` tokens. A block that is full is published under a key that stands for its
tokens and all before them; a request that begins with the same tokens shares it instead of computing it again. A block
that nobody holds any more keeps its content, and its key, until the room is needed: the one that was let go longest ago
goes first.

Only numbers are kept here; the tensors are in `cache`.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np


def block_key(before: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a block of `tokens` that follows the block with key `before` (the pool's `root` at the start)."""
    return hashlib.blake2b(before + np.asarray(tokens, dtype=np.int64).tobytes(), digest_size=16).digest()


class BlockPool:
    """`blocks` blocks of `block_size` tokens, numbered from 0.

    Every block is in one of three states: held (by one sequence or several), kept (held by nobody, its content still to
    be found by its key), or blank.
    """

    def __init__(self, blocks: int, block_size: int) -> None:
        self.blocks, self.block_size = blocks, block_size
        self._forgotten = 0
        self.reset()

    def reset(self) -> None:
        """All blocks are blank, nobody holds any."""
        self._holders = [0] * self.blocks
        self._key: list[bytes | None] = [None] * self.blocks
        self._published: dict[bytes, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()  # the next to be evicted first
        self._blank = list(range(self.blocks - 1, -1, -1))

    @property
    def root(self) -> bytes:
        """What stands before the first block's key. Another one after `forget`: a sequence that had begun before goes
        on to publish blocks of which a part was computed with other weights, and nobody may find them."""
        return self._forgotten.to_bytes(8, "little")

    @property
    def free(self) -> int:
        """Blocks that can be had now, kept ones included."""
        return len(self._blank) + len(self._kept)

    @property
    def used(self) -> int:
        """Blocks that sequences hold."""
        return self.blocks - self.free

    def needed(self, tokens: int) -> int:
        """Blocks that so many tokens take."""
        return -(-tokens // self.block_size)

    def take(self) -> int:
        """A block for new tokens, held once. The caller has seen to it that one is free."""
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._kept.popitem(last=False)
            self._unpublish(block)
        self._holders[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more sequence holds the block."""
        if self._holders[block] == 0:
            del self._kept[block]
        self._holders[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """A sequence lets go of its blocks, first to last; the later ones, of use to fewer, are evicted first."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if self._key[block] is None:
                    self._blank.append(block)
                else:
                    self._kept[block] = None

    def publish(self, block: int, key: bytes) -> None:
        """The block is full and its content stands for `key`; where another block does already, that one stays."""
        if key not in self._published and self._key[block] is None:
            self._published[key] = block
            self._key[block] = key

    def find(self, key: bytes) -> int | None:
        """The block that stands for `key`."""
        return self._published.get(key)

    def is_kept(self, block: int) -> bool:
        """Whether nobody holds the block, so that sharing it makes one less free."""
        return self._holders[block] == 0

    def forget(self) -> None:
        """No block stands for anything any more: the weights have changed. Holders keep theirs."""
        self._forgotten += 1
        self._published.clear()
        self._key = [None] * self.blocks
        self._blank.extend(self._kept)
        self._kept.clear()

    def check(self, held: Sequence[Sequence[int]]) -> None:
        """Raise AssertionError unless the books are right and `held`, the blocks of every sequence, are all that is
        held."""
        counts = [0] * self.blocks
        for blocks in held:
            for block in blocks:
                counts[block] += 1
        assert counts == self._holders, "reference counts differ from what sequences hold"
        nobody = {block for block, holders in enumerate(counts) if holders == 0}
        assert len(self._blank) == len(set(self._blank)), "a block is blank twice"
        assert set(self._blank) | set(self._kept) == nobody, "a block that nobody holds is lost"
        assert not set(self._blank) & set(self._kept), "a block is blank and kept"
        assert all(self._key[block] is None for block in self._blank), "a blank block has a key"
        assert {key: block for block, key in enumerate(self._key) if key is not None} == self._published

    def _unpublish(self, block: int) -> None:
        key = self._key[block]
        if key is not None:
            del self._published[key]
            self._key[block] = None
