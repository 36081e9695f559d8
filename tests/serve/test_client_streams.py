"""OpenAI's library and streams: what comes in pieces adds up to what comes whole, also by the library's own events."""

from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

QUESTION: Any = [{"role": "user", "content": "What will the weather be?"}]
THOUGHTS = ["<think>", "\nThey ask ", "for a ", "forecast", ".\n", "</think>", "\n\n"]
CALLS = [
    "Let me see. ", "<tool_call>\n", '{"name": "forecast", ', '"arguments": {"day": "to', 'day"}', "}\n</tool_call>",
    "\n<tool_call>", '\n{"name": "forecast", "arguments": ', '{"day": ', '"tomorrow"', "}}\n</tool_call>",
]  # fmt: skip


class Forecast(BaseModel):
    day: Literal["today", "tomorrow"]


class Weather(BaseModel):
    rainy: bool
    day: Literal["today"]


TOOLS: Any = [openai.pydantic_function_tool(Forecast, name="forecast", description="of the weather")]


@pytest.fixture(scope="module")
def here(writer: Any, hosting: Any) -> Iterator[Any]:
    with hosting(writer([*THOUGHTS, *CALLS])) as server:
        yield server


@pytest.fixture(scope="module")
def client(here: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=here.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


def events(client: openai.OpenAI, **asked: Any) -> tuple[list[Any], Any]:
    """The library's events of a stream, and the completion that it makes of them."""
    with client.chat.completions.stream(model="tiny", messages=QUESTION, **asked) as stream:
        return list(stream), stream.get_final_completion()


def pieces(stream: Any, index: int, *names: str) -> list[Any]:
    """What the chunks of a choice have at `choice.name.name`, but for what is empty."""
    found = []
    for chunk in stream:
        for choice in chunk.choices:
            value = choice
            for name in names:
                value = getattr(value, name, None)
            if choice.index == index and value:
                found.append(value)
    return found


def joined(stream: Any, index: int, *names: str) -> list[Any]:
    """The items of all lists that the chunks of a choice have there."""
    return [item for piece in pieces(stream, index, *names) for item in piece]


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_calls_of_tools_come_as_they_are_written(client: openai.OpenAI, choice: str) -> None:
    asked: Any = {"tools": TOOLS, "tool_choice": choice, "temperature": 0, "max_tokens": 300}
    heard, final = events(client, **asked)
    whole = client.chat.completions.parse(model="tiny", messages=QUESTION, **asked).choices[0]
    assert final.choices[0].finish_reason == whole.finish_reason == "tool_calls"
    assert (final.choices[0].message.content or None) == whole.message.content
    calls, others = final.choices[0].message.tool_calls, whole.message.tool_calls or []
    assert [call.function.arguments for call in calls] == [call.function.arguments for call in others]
    assert [call.function.name for call in calls] == ["forecast"] * len(calls)
    assert len({call.id for call in [*calls, *others]}) == 2 * len(calls)
    if choice == "auto":
        assert whole.message.content == "Let me see."
        assert [call.function.parsed_arguments for call in calls] == [Forecast(day="today"), Forecast(day="tomorrow")]
    done = [event for event in heard if event.type == "tool_calls.function.arguments.done"]
    assert [event.parsed_arguments for event in done] == [call.function.parsed_arguments for call in others]
    for event in done:
        grown = [e for e in heard if e.type == "tool_calls.function.arguments.delta" and e.index == event.index]
        parts = [e.arguments_delta for e in grown if e.arguments_delta]
        assert "".join(parts) == event.arguments and len(parts) > 1


def test_what_the_library_made_of_a_stream_can_be_given_back(here: Any, client: openai.OpenAI) -> None:
    _, final = events(client, tools=TOOLS, temperature=0)
    message = final.choices[0].message
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": f"{call.function.parsed_arguments.day}: rain"}
        for call in message.tool_calls
    ]
    after: Any = client.chat.completions.create(
        model="tiny", messages=[*QUESTION, message, *results], max_tokens=1, extra_body={"return_token_ids": True}
    )
    read = here.service.tokenizer.decode(after.prompt_token_ids)
    places = [read.index(text) for text in ("Let me see.", '{"day": "today"}', '{"day": "tomorrow"}',
                                            "today: rain", "tomorrow: rain")]  # fmt: skip
    assert places == sorted(places)


def test_a_class_is_parsed_while_it_streams(client: openai.OpenAI) -> None:
    asked: Any = {"response_format": Weather, "temperature": 0, "max_tokens": 300}
    heard, final = events(client, **asked)
    parsed = final.choices[0].message.parsed
    assert isinstance(parsed, Weather) and parsed.day == "today"
    (done,) = (event for event in heard if event.type == "content.done")
    assert done.parsed == parsed == client.chat.completions.parse(
        model="tiny", messages=QUESTION, **asked
    ).choices[0].message.parsed  # fmt: skip
    deltas = [event for event in heard if event.type == "content.delta"]
    assert "".join(event.delta for event in deltas) == done.content
    assert {"rainy": parsed.rainy} in [event.parsed for event in deltas], "known before the rest is"


@pytest.mark.parametrize("asked", [{"response_format": Weather}, {"tools": TOOLS, "tool_choice": "required"}])
def test_what_is_cut_off_is_not_parsed(client: openai.OpenAI, asked: dict[str, Any]) -> None:
    limited: Any = {"temperature": 0, "max_tokens": len(THOUGHTS) + 5, **asked}
    with pytest.raises(openai.LengthFinishReasonError):
        events(client, **limited)
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model="tiny", messages=QUESTION, **limited)


def test_the_thinking_comes_first_under_both_names(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "messages": QUESTION, "temperature": 0}
    message: Any = client.chat.completions.create(**asked).choices[0].message
    chunks = list(client.chat.completions.create(stream=True, **asked))
    thinking = pieces(chunks, 0, "delta", "reasoning_content")
    assert thinking == pieces(chunks, 0, "delta", "reasoning") and len(thinking) > 2
    assert "".join(thinking) == message.reasoning_content == "They ask for a forecast."
    assert "".join(pieces(chunks, 0, "delta", "content")) == message.content
    kinds = [
        "thinking" if getattr(chunk.choices[0].delta, "reasoning", None) else "content"
        for chunk in chunks[1:]
        if chunk.choices[0].finish_reason is None
    ]
    assert kinds == sorted(kinds, reverse=True) and len(set(kinds)) == 2


def test_logprobs_of_a_stream(client: openai.OpenAI) -> None:
    asked: Any = {"logprobs": True, "top_logprobs": 3, "temperature": 1.5, "seed": 5}
    heard, final = events(client, **asked)
    whole = client.chat.completions.create(model="tiny", messages=QUESTION, **asked).choices[0].logprobs
    assert whole is not None and whole.content and {len(entry.top_logprobs) for entry in whole.content} == {3}
    in_pieces = [entry for event in heard if event.type == "logprobs.content.delta" for entry in event.content]
    (done,) = (event for event in heard if event.type == "logprobs.content.done")
    for told in (in_pieces, done.content, final.choices[0].logprobs.content):
        assert [(e.token, e.bytes) for e in told] == [(e.token, e.bytes) for e in whole.content]
        assert [e.logprob for e in told] == pytest.approx([e.logprob for e in whole.content], abs=1e-4)
        assert [t.token for e in told for t in e.top_logprobs] == [
            t.token for e in whole.content for t in e.top_logprobs
        ]


@pytest.mark.parametrize("seed", range(3))
def test_each_of_several_sampled_replies_is_the_same_in_pieces(client: openai.OpenAI, seed: int) -> None:
    """At this temperature thoughts, special tokens and noise are mixed; some replies end early, some never."""
    asked: Any = {
        "model": "tiny", "messages": QUESTION, "n": 4, "seed": seed, "temperature": 4.5, "max_tokens": 60,
        "extra_body": {"return_token_ids": True},
    }  # fmt: skip
    whole: Any = client.chat.completions.create(**asked)
    chunks: Any = list(client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **asked))
    *growing, last = chunks
    assert len({choice.message.content for choice in whole.choices}) > 1
    assert any(hasattr(choice.message, "reasoning_content") for choice in whole.choices)
    for choice in whole.choices:
        content = "".join(pieces(chunks, choice.index, "delta", "content"))
        thinking = "".join(pieces(chunks, choice.index, "delta", "reasoning_content"))
        assert content == choice.message.content
        assert thinking == getattr(choice.message, "reasoning_content", "")
        assert joined(chunks, choice.index, "token_ids") == choice.token_ids
        assert pieces(chunks, choice.index, "finish_reason") == [choice.finish_reason]
    assert growing[0].prompt_token_ids == whole.prompt_token_ids
    assert last.choices == [] and all(chunk.usage is None for chunk in growing)
    assert last.usage.completion_tokens == whole.usage.completion_tokens == sum(len(c.token_ids) for c in whole.choices)
    assert last.usage.prompt_tokens == len(whole.prompt_token_ids)
    assert last.usage.completion_tokens_details == whole.usage.completion_tokens_details


def test_texts_of_several_prompts_are_the_same_in_pieces(client: openai.OpenAI) -> None:
    asked: Any = {
        "model": "tiny", "prompt": ["It is ", "They ask "], "n": 2, "seed": 2, "temperature": 4.5, "logprobs": 2,
        "echo": True, "extra_body": {"return_token_ids": True},
    }  # fmt: skip
    whole: Any = client.completions.create(**asked)
    chunks: Any = list(client.completions.create(stream=True, stream_options={"include_usage": True}, **asked))
    for choice in whole.choices:
        assert choice.text.startswith(asked["prompt"][choice.index // 2])
        assert "".join(pieces(chunks, choice.index, "text")) == choice.text
        assert joined(chunks, choice.index, "token_ids") == choice.token_ids
        assert pieces(chunks, choice.index, "finish_reason") == [choice.finish_reason]
        for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
            assert joined(chunks, choice.index, "logprobs", name) == getattr(choice.logprobs, name)
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


@pytest.mark.parametrize(
    "budget", [{"thinking_token_budget": 3}, {"thinking": {"type": "enabled", "budget_tokens": 3}}]
)
def test_a_budget_of_thinking(client: openai.OpenAI, budget: dict[str, Any]) -> None:
    asked: Any = {"model": "tiny", "messages": QUESTION, "temperature": 0, "extra_body": budget}
    reply: Any = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(stream=True, **asked))
    thinking = reply.choices[0].message.reasoning_content
    assert thinking == "They ask for a forecast", "three tokens, but not the fourth"
    assert "".join(pieces(chunks, 0, "delta", "reasoning_content")) == thinking
    assert "".join(pieces(chunks, 0, "delta", "content")) == reply.choices[0].message.content
    unlimited = client.chat.completions.create(model="tiny", messages=QUESTION, temperature=0).usage
    assert unlimited is not None and unlimited.completion_tokens_details is not None
    told = reply.usage.completion_tokens_details.reasoning_tokens
    assert 3 <= told < (unlimited.completion_tokens_details.reasoning_tokens or 0)


def test_a_reply_told_to_stop_thinking_answers(writer: Any, hosting: Any) -> None:
    thoughts = [f"thought {i} " for i in range(1500)]
    with (
        hosting(writer(["<think>", *thoughts, "</think>", "Done."])) as server,
        openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client,
    ):
        stream = client.chat.completions.create(model="tiny", messages=QUESTION, stream=True, temperature=0)
        control = {"id": next(stream).id, "action": "reasoning_end"}
        with server.engine._loop.held():
            told = client.post("/chat/completions/control", cast_to=object, body=control)
        rest = list(stream)
        assert told == {"success": True}
        thinking = "".join(pieces(rest, 0, "delta", "reasoning_content"))
        assert "".join(thoughts).startswith(thinking) and "thought 1499" not in thinking
        assert pieces(rest, 0, "delta", "content") == ["Done."]
        with pytest.raises(openai.NotFoundError, match="is running"):
            client.post("/chat/completions/control", cast_to=object, body=control)


def test_an_error_amid_a_stream_is_raised(writer: Any, hosting: Any) -> None:
    with (
        hosting(writer(CALLS, context=1 << 15), request_seconds=0.5) as server,
        openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client,
    ):
        asked: Any = {"model": "tiny", "messages": QUESTION, "extra_body": {"ignore_eos": True}}
        received = []
        with pytest.raises(openai.APIError, match=r"longer than the 0\.5 seconds"):
            for chunk in client.chat.completions.create(stream=True, **asked):
                received.append(chunk)
        assert pieces(received, 0, "delta", "content")
        with pytest.raises(openai.InternalServerError, match=r"longer than the 0\.5 seconds") as caught:
            client.chat.completions.create(**asked)
        assert caught.value.status_code == 504
