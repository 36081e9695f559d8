"""OpenAI's library and many requests at once: each gets its own, who leaves is forgotten, who is too many waits."""

import asyncio
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

PIECES = ["<think>", "\nRain ", "today", ".\n", "</think>", "\n\n", "Take an ", "umbrella", "…"]
QUESTION: Any = [{"role": "user", "content": "What should I take?"}]
SAMPLED: Any = {"model": "tiny", "messages": QUESTION, "temperature": 4.5, "max_tokens": 30}
ENDLESS: Any = {"model": "tiny", "messages": QUESTION, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def here(writer: Any, hosting: Any) -> Iterator[Any]:
    with hosting(writer(PIECES, context=1 << 15), max_queue=40) as server:
        yield server


@pytest.fixture(scope="module")
def client(here: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=here.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


def many(here: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=here.url + "/v1", api_key="none", max_retries=0)


async def said(client: openai.AsyncOpenAI, stream: bool, **asked: Any) -> list[Any]:
    """(content, thinking) of each choice."""
    if stream:
        async with client.chat.completions.stream(**SAMPLED, **asked) as events:
            choices: Any = (await events.until_done()).current_completion_snapshot.choices
    else:
        choices = (await client.chat.completions.create(**SAMPLED, **asked)).choices
    return [(choice.message.content, getattr(choice.message, "reasoning_content", None)) for choice in choices]


def test_each_of_many_gets_what_it_would_get_alone(here: Any) -> None:
    async def check() -> None:
        async with many(here) as client:
            with here.engine._loop.held():
                tasks = [asyncio.create_task(said(client, seed % 2 == 0, seed=seed)) for seed in range(16)]
                while here.service._waiting < 16:
                    assert not any(task.done() for task in tasks)
                    await asyncio.sleep(0.005)
            together = await asyncio.gather(*tasks)
            assert together == [await said(client, seed % 3 == 0, seed=seed) for seed in range(16)]
            assert len({content for ((content, _),) in together}) > 8

    asyncio.run(check())


def test_several_choices_of_a_stream_are_told_apart(here: Any) -> None:
    async def check() -> None:
        async with many(here) as client:
            kinds = (said(client, stream, seed=seed, n=4) for stream in (True, False) for seed in range(4))
            found = await asyncio.gather(*kinds)
        assert found[:4] == found[4:]
        assert all(len(set(choices)) > 1 for choices in found)

    asyncio.run(check())


@pytest.mark.parametrize("stream", [True, False])
def test_who_is_cancelled_ends_and_disturbs_nobody(here: Any, stream: bool) -> None:
    async def endless(client: openai.AsyncOpenAI) -> None:
        if stream:
            async for _ in await client.chat.completions.create(stream=True, **ENDLESS):
                pass
        else:
            await client.chat.completions.create(**ENDLESS)

    async def check() -> None:
        async with many(here) as client:
            alone = await said(client, stream, seed=1)
            before = here.engine.stats["generated_tokens"]
            leaving = [asyncio.create_task(endless(client)) for _ in range(6)]
            while here.engine.stats["running"] < 6:
                assert not any(task.done() for task in leaving)
                await asyncio.sleep(0.005)
            staying = [asyncio.create_task(said(client, stream, seed=1)) for _ in range(6)]
            await asyncio.sleep(0.02)
            for task in leaving:
                task.cancel()
            assert all(isinstance(end, asyncio.CancelledError) for end in
                       await asyncio.gather(*leaving, return_exceptions=True))  # fmt: skip
            assert await asyncio.gather(*staying) == [alone] * 6
            here.until_free(2.0)
            assert here.engine.stats["generated_tokens"] - before < 1 << 14

    asyncio.run(check())


def test_closing_a_stream_ends_the_request(here: Any, client: openai.OpenAI) -> None:
    before = here.engine.stats["generated_tokens"]
    stream = client.chat.completions.create(stream=True, **ENDLESS)
    next(iter(stream))
    stream.close()
    here.until_free(2.0)
    with client.chat.completions.stream(**ENDLESS) as events:
        next(iter(events))
    here.until_free(2.0)
    assert here.engine.stats["generated_tokens"] - before < 1 << 14


def test_who_waits_no_longer_ends_the_request(here: Any, client: openai.OpenAI) -> None:
    before = here.engine.stats["generated_tokens"]
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).chat.completions.create(**ENDLESS)
    here.until_free(2.0)
    assert here.engine.stats["generated_tokens"] - before < 1 << 14


def test_a_full_queue_is_a_rate_limit_that_the_library_waits_out(writer: Any, hosting: Any) -> None:
    with (
        hosting(writer(PIECES), max_queue=1) as server,
        openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client,
    ):
        asked: Any = {"model": "tiny", "messages": QUESTION, "temperature": 0}
        patient = client.with_options(max_retries=3).chat.completions.with_raw_response
        replies: list[Any] = []
        threads = [
            threading.Thread(target=lambda: replies.append(client.chat.completions.with_raw_response.create(**asked))),
            threading.Thread(target=lambda: replies.append(patient.create(**asked))),
        ]
        with server.engine._loop.held():  # nobody's turn comes
            threads[0].start()
            until(lambda: server.service._waiting == 1)
            with pytest.raises(openai.RateLimitError, match="try again in a moment") as caught:
                client.chat.completions.create(**asked)
            threads[1].start()
            until(lambda: re.search(r'request_failure_total\{.*"429".*\} 2', server.client.get("/metrics").text))
            refused = time.monotonic()
        for thread in threads:
            thread.join()
        assert caught.value.code == "queue_full" and caught.value.response.headers["retry-after"] == "1"
        first, second = replies
        assert first.retries_taken == 0 and second.retries_taken > 0 and time.monotonic() - refused > 0.5
        assert {reply.parse().choices[0].message.content for reply in replies} == {"Take an umbrella…"}


def until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 5
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)
