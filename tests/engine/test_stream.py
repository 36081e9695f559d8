"""`stream_async` as a server uses it: log-probabilities in the deltas, and an event loop that never waits."""

import asyncio
import threading
import time
from typing import Any

import pytest

from luciola.engine.engine import Engine
from luciola.engine.params import SamplingParams
from luciola.engine.requests import Requests
from luciola.engine.sequence import Delta
from luciola.model.language_model import LanguageModel


async def collect(engine: Engine, prompt: list[int], params: SamplingParams) -> list[Delta]:
    return [delta async for delta in engine.stream_async(prompt, params)]


def all_blocks_are_back(engine: Engine) -> None:
    limit = time.monotonic() + 10
    while engine.stats["running"] or engine.stats["waiting"] or not engine._loop.idle:
        assert time.monotonic() < limit, engine.stats
        time.sleep(0.001)
    assert engine.blocks_used == 0
    engine._pool.check([])


@pytest.mark.parametrize("speculate", [None, "ngram"])
@pytest.mark.parametrize("top", [0, 2])
def test_deltas_bring_the_log_probabilities_of_their_tokens(lm: LanguageModel, speculate: str | None, top: int) -> None:
    engine = Engine(lm, dtype="model", speculate=speculate)
    params = SamplingParams(max_tokens=40, temperature=0.3, seed=2, n=2, logprobs=True, top_logprobs=top, stop=["ab"])

    deltas = asyncio.run(collect(engine, [3, 4, 5], params))
    for index in range(2):
        mine = [delta for delta in deltas if delta.index == index]
        whole = mine[-1].completion
        assert whole is not None
        for delta in mine:
            assert delta.logprobs is not None
            assert len(delta.logprobs) == len(delta.token_ids)
            assert delta.top_logprobs is None if top == 0 else len(delta.top_logprobs or ()) == len(delta.token_ids)
        assert [x for delta in mine for x in delta.logprobs or ()] == whole.logprobs
        if top:
            assert [x for delta in mine for x in delta.top_logprobs or ()] == whole.top_logprobs
            assert [[*likeliest] for likeliest in whole.top_logprobs or ()]


def test_deltas_have_no_log_probabilities_that_nobody_asked_for(lm: LanguageModel) -> None:
    engine = Engine(lm, dtype="model")
    deltas = asyncio.run(collect(engine, [3, 4, 5], SamplingParams(max_tokens=5)))
    assert deltas
    assert all(delta.logprobs is None and delta.top_logprobs is None for delta in deltas)


def slowed(monkeypatch: pytest.MonkeyPatch, seconds: float) -> list[threading.Thread]:
    """Preparing a request takes so long; the threads that did it."""
    real, threads = Requests.sequences, []

    def slow(self: Requests, *arguments: Any, **more: Any) -> Any:
        threads.append(threading.current_thread())
        time.sleep(seconds)
        return real(self, *arguments, **more)

    monkeypatch.setattr(Requests, "sequences", slow)
    return threads


def test_preparing_a_request_does_not_hold_up_the_event_loop(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, threads = Engine(lm, dtype="model"), slowed(monkeypatch, 0.3)

    async def ticks() -> int:
        task = asyncio.create_task(collect(engine, [3, 4], SamplingParams(max_tokens=3)))
        count = 0
        while not threads or not task.done():
            await asyncio.sleep(0.005)
            count += 1
        await task
        return count

    assert asyncio.run(ticks()) > 20
    assert threading.main_thread() not in threads


def test_a_request_cancelled_while_it_is_prepared_never_begins(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, threads = Engine(lm, dtype="model"), slowed(monkeypatch, 0.05)

    async def cancelled() -> None:
        task = asyncio.create_task(collect(engine, [3, 4], SamplingParams(max_tokens=80, n=3, ignore_eos=True)))
        while not threads:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.1)

    asyncio.run(cancelled())
    assert engine.stats["steps"] == 0
    all_blocks_are_back(engine)


def test_what_is_refused_is_refused_to_who_reads(lm: LanguageModel) -> None:
    engine = Engine(lm, dtype="model")
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        asyncio.run(collect(engine, [], SamplingParams()))


@pytest.mark.parametrize("delay", [0.0, 0.002, 0.01])
def test_a_cancelled_stream_frees_its_blocks_within_a_step(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch, delay: float
) -> None:
    """At whatever stage it is; others go on. Counted by the engine itself: another thread sees its steps late."""
    engine = Engine(lm, dtype="model", block_size=4)
    asked, left = [], []
    ask, end = engine._loop.ask, engine._end

    def noted(request: Any) -> None:
        asked.append(engine.stats["steps"])
        ask(request)

    def ended(rows: Any) -> None:
        end(rows)
        left.append(engine.stats["steps"])
        assert all(row.blocks == [] and row.row == -1 for row in rows)

    monkeypatch.setattr(engine._loop, "ask", noted)
    monkeypatch.setattr(engine, "_end", ended)

    async def leave() -> None:
        stays = asyncio.create_task(collect(engine, [3, 4, 5], SamplingParams(max_tokens=90, ignore_eos=True)))
        params = SamplingParams(max_tokens=90, n=4, ignore_eos=True, seed=1)
        task = asyncio.create_task(collect(engine, [7, 8], params))
        await asyncio.sleep(delay)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert len((await stays)[-1].completion.token_ids) == 90  # type: ignore[union-attr]

    asyncio.run(leave())
    all_blocks_are_back(engine)
    assert len(asked) == len(left) <= 1  # none where it had not begun, or was through
    assert all(after - before <= 1 for before, after in zip(asked, left, strict=True))
