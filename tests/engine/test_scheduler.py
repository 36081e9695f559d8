"""Blocks and turns, without a model: the books stay right, nobody is lost, nobody starves, whatever comes in."""

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from luciola.engine.blocks import BlockPool, block_key
from luciola.engine.params import SamplingParams
from luciola.engine.scheduler import PATIENCE, SHORT, Scheduler
from luciola.engine.sequence import Sequence


def sequence(number: int, tokens: list[int], max_tokens: int = 4, priority: int = 0) -> Sequence:
    return Sequence(
        prompt_length=len(tokens),
        params=SamplingParams(),
        index=0,
        max_tokens=max_tokens,
        tokens=list(tokens),
        stream=None,  # type: ignore[arg-type]
        order=(number + priority * PATIENCE, number),
    )


class Run:
    """A scheduler whose model is a rule: the next token is a function of all before it, written into the blocks."""

    def __init__(self, blocks: int, size: int, rows: int, chunk: int) -> None:
        self.pool = BlockPool(blocks, size)
        self.scheduler = Scheduler(self.pool, rows, chunk)
        self.written: dict[int, list[int]] = {block: [-1] * size for block in range(blocks)}
        self.steps = 0

    def write(self, s: Sequence, start: int, stop: int) -> None:
        size = self.pool.block_size
        for i in range(start, stop):
            block = s.blocks[i // size]
            assert self.pool._holders[block] == 1, "a shared block was written"
            self.written[block][i % size] = s.tokens[i]

    def read(self, s: Sequence) -> list[int]:
        size = self.pool.block_size
        return [self.written[s.blocks[i // size]][i % size] for i in range(s.computed)]

    def step(self) -> list[Sequence]:
        work = self.scheduler.plan()
        ended = []
        assert sum(count for _, count in work.pieces) <= self.scheduler.chunk
        for s, count in [*work.pieces, *((s, s.pending) for s in work.short)]:
            assert len(s.blocks) * self.pool.block_size >= s.computed + count, "a token without a slot"
            self.write(s, s.computed, s.computed + count)
            s.computed += count
            self.scheduler.publish(s)
            assert self.read(s) == s.tokens[: s.computed], "the cache holds other tokens than the sequence"
            if s.pending == 0:
                for follower in s.followers:
                    follower.leader = None
                    pair = self.scheduler.fork(s, follower)
                    if pair is not None:
                        self.written[pair[1]] = list(self.written[pair[0]])
                    HAPPENED["forked" if follower.row >= 0 else "fork waits"] += 1
                    if follower.row >= 0:
                        follower.tokens.append(rule(follower.tokens))
                        assert self.read(follower) == follower.tokens[:-1]
                        if len(follower.tokens) - follower.prompt_length >= follower.max_tokens:
                            follower.finish = "length"
                            ended.append(follower)
                s.followers = []
                s.tokens.append(rule(s.tokens))
                if len(s.tokens) - s.prompt_length >= s.max_tokens:
                    s.finish = "length"
                    ended.append(s)
        self.scheduler.leave(ended)
        self.steps += 1
        return ended

    def check(self) -> None:
        everyone = [*self.scheduler.running, *self.scheduler.waiting]
        self.pool.check([s.blocks for s in everyone])
        assert all(not s.blocks and s.row < 0 for s in self.scheduler.waiting)
        rows = [s.row for s in self.scheduler.running]
        assert len(set(rows)) == len(rows) and min(rows, default=0) >= 0
        assert self.scheduler.running == sorted(self.scheduler.running, key=lambda s: s.order)


def rule(tokens: list[int]) -> int:
    return (sum(tokens) * 31 + len(tokens)) % 5


@st.composite
def schedules(draw: st.DrawFn) -> dict[str, Any]:
    size, blocks = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    return {
        "size": size,
        "blocks": blocks,
        "rows": draw(st.integers(1, 5)),
        "chunk": draw(st.integers(1, 40)),
        "seed": draw(st.integers(0, 2**32)),
    }


HAPPENED: Counter[str] = Counter()


def test_every_request_of_a_random_schedule_ends_and_every_block_comes_back() -> None:
    """And everything that may happen to a request has happened."""
    HAPPENED.clear()
    one_schedule()
    assert min(HAPPENED[what] for what in ("preempted", "aborted", "forgotten", "found", "forked", "fork waits")) > 500


@given(schedules())
@settings(max_examples=10_000, deadline=None, derandomize=True, phases=[Phase.generate])
def one_schedule(plan: dict[str, Any]) -> None:
    """Requests of one to three samples, aborts, changed weights, in a cache that is often too small for all. Prompts
    are made of few tokens, so that prefixes meet; block borders are met by every length from 1 on."""
    rng = random.Random(plan["seed"])
    run = Run(plan["blocks"], plan["size"], plan["rows"], plan["chunk"])
    capacity = plan["blocks"] * plan["size"]
    alive: list[Sequence] = []
    asked: list[tuple[list[int], Sequence]] = []
    for number in range(rng.randint(1, 6)):
        prompt = [rng.randrange(2) for _ in range(rng.randint(1, capacity))]
        room = capacity - len(prompt) + 1
        priority = rng.choice([0, 0, 0, 1])
        group = [
            sequence(10 * number + j, prompt, rng.randint(1, min(6, room)), priority) for j in range(rng.randint(1, 3))
        ]
        for follower in group[1:]:
            follower.leader = group[0]
        group[0].followers = group[1:]
        run.scheduler.add(group[0])
        alive += group
        asked += [(prompt, s) for s in group]
        for _ in range(rng.randint(0, 3)):
            for s in run.step():
                alive.remove(s)
            run.check()
        if rng.random() < 0.1:
            run.pool.forget()
            for s in run.scheduler.running:  # what they hold is stale as well; the engine never changes weights midway
                s.keys = []
            run.check()
            HAPPENED["forgotten"] += 1
        if alive and rng.random() < 0.2:
            gone = rng.choice(alive)
            if gone.leader is None and not gone.followers:
                gone.finish = "abort"
                run.scheduler.leave([gone])
                alive.remove(gone)
                HAPPENED["aborted"] += 1
                run.check()
    limit = run.steps + 400 * (1 + len(alive))
    while alive:
        assert run.steps < limit, "somebody is never served"
        for s in run.step():
            alive.remove(s)
        run.check()
    assert run.pool.used == 0
    HAPPENED["preempted"] += run.scheduler.preemptions
    HAPPENED["found"] += sum(bool(s.cached_tokens) for _, s in asked)
    assert not run.scheduler.running and not run.scheduler.waiting
    for prompt, s in asked:
        if s.finish == "length":
            expected = list(prompt)
            for _ in range(s.max_tokens):
                expected.append(rule(expected))
            assert s.tokens == expected


def test_a_prompt_seen_before_is_shared_but_for_its_last_token() -> None:
    """Also where it ends at a block's border: the state of the last token is what the next one is drawn from."""
    for length in (8, 9, 11, 12):
        run = Run(20, 4, 4, 100)
        prompt = list(range(length))
        first = sequence(0, prompt, 1)
        run.scheduler.add(first)
        run.step()
        again = sequence(1, prompt, 1)
        run.scheduler.add(again)
        run.scheduler.plan()
        assert again.cached_tokens == (length - 1) // 4 * 4
        assert again.pending >= 1
        run.check()


def test_samples_of_a_prompt_share_its_full_blocks() -> None:
    run = Run(20, 4, 8, 100)
    group = [sequence(j, list(range(10)), 3) for j in range(5)]
    group[0].followers = group[1:]
    run.scheduler.add(group[0])
    run.step()
    assert run.pool.used == 2 + 5  # two full blocks for all, one of its own for each
    assert len({s.blocks[0] for s in group}) == len({s.blocks[1] for s in group}) == 1
    assert len({s.blocks[2] for s in group}) == 5


def test_the_least_recently_used_block_is_evicted_first_and_the_end_before_the_beginning() -> None:
    pool = BlockPool(4, 1)
    old, new = [pool.take(), pool.take()], [pool.take(), pool.take()]
    keys = [block_key(pool.root, [i]) for i in range(4)]
    for block, key in zip([*old, *new], keys, strict=True):
        pool.publish(block, key)
    pool.release(old)
    pool.release(new)
    evicted = [pool.take() for _ in range(4)]
    assert evicted == [old[1], old[0], new[1], new[0]]
    assert all(pool.find(key) is None for key in keys)


def test_a_shared_prefix_is_no_longer_evicted() -> None:
    pool = BlockPool(3, 2)
    block = pool.take()
    key = block_key(pool.root, [1, 2])
    pool.publish(block, key)
    pool.release([block])
    assert pool.free == 3
    found = pool.find(key)
    assert found == block
    pool.share(block)
    assert {pool.take(), pool.take()} == {0, 1, 2} - {block}
    assert pool.free == 0
    assert pool.find(key) == block


def test_lower_priorities_wait_but_are_served() -> None:
    """One level lets PATIENCE requests pass, and not one more."""
    run = Run(4, 4, 1, 100)
    run.scheduler.add(sequence(0, [1], 2))
    run.step()
    later = sequence(1, [1], 1, priority=1)
    run.scheduler.add(later)
    for number in range(2, PATIENCE + 10):
        run.scheduler.add(sequence(number, [1], 1))
    served: list[Sequence] = []
    while later not in served:
        served += run.step()
    assert len(served) == PATIENCE + 1  # the first, those that passed, and itself
    assert {s.order[1] for s in served} == set(range(PATIENCE + 1))


def test_a_long_prompt_does_not_hold_up_those_who_are_being_answered() -> None:
    run = Run(100, 4, 4, 8)
    talker, reader = sequence(0, [1, 2], 50), sequence(1, [0] * (SHORT + 80), 1)
    run.scheduler.add(talker)
    run.step()
    run.scheduler.add(reader)
    for _ in range(8):
        before = len(talker.tokens)
        run.step()
        assert len(talker.tokens) == before + 1
    assert 0 < reader.computed < len(reader.tokens)


def test_the_oldest_keeps_its_blocks_when_the_room_runs_out() -> None:
    run = Run(5, 2, 4, 100)
    old, young = sequence(0, [0, 0, 0], 6), sequence(1, [1, 1, 1], 6)
    run.scheduler.add(old)
    run.scheduler.add(young)
    order = []
    for _ in range(40):
        order += run.step()
        run.check()
    assert order == [old, young]
    assert run.scheduler.preemptions > 0


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8])
def test_a_preempted_sequence_finds_what_is_left_of_its_blocks(length: int) -> None:
    """And goes on just where it was."""
    run = Run(8, 2, 4, 100)
    s = sequence(0, list(range(length)), 5)
    run.scheduler.add(s)
    run.step()
    run.step()
    run.scheduler.preempt(s)
    run.check()
    run.scheduler.plan()
    assert s.computed == (len(s.tokens) - 1) // 2 * 2
    run.scheduler.preempt(s)
    while not s.ended:
        run.step()
    expected = list(range(length))
    for _ in range(5):
        expected.append(rule(expected))
    assert s.tokens == expected
