"""Who runs in the next step, and with which blocks.

Each step continues every running sequence by one token (or by a piece of its prompt), so nobody who runs waits for
anybody else's prompt: long prompts are read in pieces, `chunk` tokens a step in all. Those who wait come in, in order,
as soon as there is room for what they have. Where the room runs out, the one whose turn came last gives way: it lets go
of its blocks, waits again at its old place and is recomputed, with whatever of its blocks is still to be found.

Nobody starves: a request's place is its number plus PATIENCE for each level of priority below the highest asked for, so
that only finitely many can come in before it; and the oldest sequence is never made to give way.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Iterable
from typing import NamedTuple

from luciola.engine.blocks import BlockPool, block_key
from luciola.engine.sequence import Sequence

PATIENCE = 1000  # requests that one level of priority lets pass
SHORT = 16  # pending tokens up to which a sequence goes with those that are being continued
# The same for as many sequences as together have no more than that: so few tokens are read faster in one list.
FLAT = 64


class Work(NamedTuple):
    """One step: sequences with few pending tokens, all of which are read; and pieces of prompts, so many tokens of
    each."""

    short: list[Sequence]
    pieces: list[tuple[Sequence, int]]


class Scheduler:
    """Sequences that wait and that run, over one pool of blocks."""

    def __init__(self, pool: BlockPool, max_running: int, chunk: int) -> None:
        self.pool, self.max_running, self.chunk = pool, max_running, chunk
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []  # in order
        self.preemptions = self.cached_tokens = 0
        self._rows = list(range(max_running - 1, -1, -1))

    def add(self, sequence: Sequence) -> None:
        """Let it wait for its turn."""
        insort(self.waiting, sequence, key=_order)

    def leave(self, sequences: Iterable[Sequence]) -> None:
        """These have ended, wherever they stood: their blocks come back."""
        gone = set(sequences)
        for sequence in gone:
            self._release(sequence)
        if any(sequence in gone for sequence in self.waiting):
            self.waiting = [sequence for sequence in self.waiting if sequence not in gone]
        self.running = [sequence for sequence in self.running if sequence not in gone]

    def plan(self) -> Work:
        """Give out blocks, let sequences in or make them give way, and say what the step consists of."""
        self._make_room()
        self._let_in()
        short, pieces, left, flat = [], [], self.chunk, FLAT
        for sequence in self.running:
            pending = sequence.pending
            if pending == 1 and sequence.generated:
                short.append(sequence)
            elif pending <= min(max(flat, SHORT), left):
                short.append(sequence)
                left -= pending
                if pending > SHORT:
                    flat -= pending
            elif left > 0:
                count = min(pending, left)
                pieces.append((sequence, count))
                left -= count
        return Work(short, pieces)

    def fork(self, sequence: Sequence, follower: Sequence) -> tuple[int, int] | None:
        """Let `follower` run with what `sequence`, of the same tokens, has computed. Its full blocks are shared.

        Returns the blocks (from, to) of which a copy must be made for the follower, or None if that is not needed.
        Where there is no room the follower goes to wait, and `follower.row` stays -1.
        """
        pool = self.pool
        partial = sequence.computed % pool.block_size != 0
        full = len(sequence.blocks) - partial
        if not self._rows or pool.free < 1 + len(self.running):
            self.add(follower)
            return None
        for block in sequence.blocks[:full]:
            pool.share(block)
        follower.blocks, follower.keys, follower.root = sequence.blocks[:full], sequence.keys[:full], sequence.root
        follower.computed, follower.begun = sequence.computed, sequence.begun
        self._enter(follower)
        if not partial:
            return None
        follower.blocks.append(pool.take())
        return sequence.blocks[full], follower.blocks[full]

    def publish(self, sequence: Sequence) -> None:
        """Make the blocks findable that the last step has filled."""
        size = self.pool.block_size
        while (len(sequence.keys) + 1) * size <= sequence.computed:
            number = len(sequence.keys)
            tokens = sequence.tokens[number * size : (number + 1) * size]
            key = block_key(sequence.keys[-1] if sequence.keys else sequence.root, tokens)
            sequence.keys.append(key)
            self.pool.publish(sequence.blocks[number], key)

    def _make_room(self) -> None:
        """Every running sequence, oldest first, gets the blocks that its next tokens need."""
        pool = self.pool
        for sequence in list(self.running):
            if sequence.row < 0:
                continue  # it has given way to an older one in this very loop
            feed = self._feed(sequence)
            tokens = sequence.computed + feed + len(sequence.drafts)
            if tokens <= len(sequence.blocks) * pool.block_size:  # nearly everybody, nearly always
                continue
            wanted = pool.needed(tokens) - len(sequence.blocks)
            if wanted > pool.free and sequence.drafts:  # a guess is not worth anybody's blocks
                sequence.drafts.clear()
                wanted = pool.needed(sequence.computed + feed) - len(sequence.blocks)
            while wanted > pool.free:
                youngest = self.running[-1]
                self.preempt(youngest)
                if youngest is sequence:
                    break
            if sequence.row >= 0:
                sequence.blocks += [pool.take() for _ in range(wanted)]

    def preempt(self, sequence: Sequence) -> None:
        """Take its blocks away and let it wait for its turn again; its tokens stay."""
        self._release(sequence)
        self.running.remove(sequence)
        self.preemptions += 1
        sequence.computed = 0
        sequence.keys.clear()
        sequence.drafts.clear()
        self.add(sequence)

    def recover(self) -> None:
        """After a step that was broken off: all wait again, and every block and row is there."""
        for sequence in self.running:
            if sequence not in self.waiting:
                self.add(sequence)
        self.running = []
        for sequence in self.waiting:
            sequence.blocks, sequence.keys, sequence.drafts = [], [], []
            sequence.computed, sequence.row = 0, -1
        self.pool.reset()
        self._rows = list(range(self.max_running - 1, -1, -1))

    def _let_in(self) -> None:
        pool = self.pool
        while self.waiting and self._rows:
            sequence = self.waiting[0]
            found, keys = self._prefix(sequence)
            kept = sum(pool.is_kept(block) for block in found)
            wanted = pool.needed(len(sequence.tokens)) - len(found)
            if wanted + kept + len(self.running) > pool.free and self.running:
                return
            for block in found:
                pool.share(block)
            sequence.blocks, sequence.keys, sequence.root = found, keys, pool.root
            sequence.computed = len(found) * pool.block_size
            if sequence.cached_tokens is None:
                sequence.cached_tokens = sequence.computed
                self.cached_tokens += sequence.computed
            wanted = pool.needed(sequence.computed + self._feed(sequence)) - len(found)
            sequence.blocks += [pool.take() for _ in range(wanted)]
            self._enter(sequence)
            del self.waiting[0]

    def _feed(self, sequence: Sequence) -> int:
        """The most tokens of it, drafts apart, that the coming step may read."""
        return min(len(sequence.tokens) - sequence.computed, self.chunk)

    def _prefix(self, sequence: Sequence) -> tuple[list[int], list[bytes]]:
        """Blocks in the cache that begin as the sequence does. The last token is always left to compute: its state is
        what the next one is drawn from. Where routes or the prompt's log-probabilities are asked for, all must be seen
        once."""
        pool, size = self.pool, self.pool.block_size
        found: list[int] = []
        keys: list[bytes] = []
        if (sequence.params.routes and sequence.routed == 0) or sequence.scores_prompt:
            return found, keys
        for number in range((len(sequence.tokens) - 1) // size):
            tokens = sequence.tokens[number * size : (number + 1) * size]
            key = block_key(keys[-1] if keys else pool.root, tokens)
            block = pool.find(key)
            if block is None:
                break
            found.append(block)
            keys.append(key)
        return found, keys

    def _enter(self, sequence: Sequence) -> None:
        sequence.row, sequence.tabled = self._rows.pop(), 0
        insort(self.running, sequence, key=_order)
        if not sequence.begun:
            sequence.begun = time.perf_counter()

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        if sequence.row >= 0:
            self._rows.append(sequence.row)
            sequence.row = -1


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order
