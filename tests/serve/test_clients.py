"""OpenAI's library, as it is, against a scripted model: all that can be asked for in a single reply."""

import json
from collections.abc import Iterator
from datetime import date
from typing import Any, Literal
from uuid import UUID

import openai
import pytest
from pydantic import BaseModel, Field

from luciola.serve.guard import ServerSettings

PIECES = ["<think>", "\nRain ", "today", ".\n", "</think>", "\n\n", "Take an ", "umbrella", "…"]
KEY = "sk-secret"
QUESTION: Any = [{"role": "user", "content": "What should I take?"}]


@pytest.fixture(scope="module")
def here(writer: Any, hosting: Any) -> Iterator[Any]:
    with hosting(writer(PIECES), ServerSettings(api_keys=(KEY,), access_log=False)) as server:
        yield server


@pytest.fixture(scope="module")
def client(here: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=here.url + "/v1", api_key=KEY, max_retries=0) as made:
        yield made


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "luciola"
    with pytest.raises(openai.NotFoundError, match="gpt-9"):
        client.models.retrieve("gpt-9")


def test_a_chat(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="tiny", messages=QUESTION, temperature=0, seed=1)
    message: Any = reply.choices[0].message
    assert message.content == "Take an umbrella…" and message.reasoning_content == "Rain today."
    assert reply.usage is not None and reply.usage.completion_tokens == len(PIECES) + 1
    assert reply.usage.completion_tokens_details is not None
    assert reply.usage.completion_tokens_details.reasoning_tokens == 5


def test_every_setting_goes_through(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "developer", "content": "Be brief."}, *QUESTION],
        n=2,
        stop=["umbrella"],
        logprobs=True,
        top_logprobs=2,
        presence_penalty=0.1,
        frequency_penalty=0.1,
        logit_bias={"5": -100},
        max_completion_tokens=50,
        temperature=0,
        top_p=0.9,
        user="somebody",
        reasoning_effort="low",
        extra_body={"top_k": 5, "min_p": 0.01, "repetition_penalty": 1.01, "thinking_token_budget": 100},
    )
    assert [choice.message.content for choice in reply.choices] == ["Take an ", "Take an "]
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None and len(logprobs.content[0].top_logprobs) == 2


def test_the_longest_reply_by_both_names(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "messages": QUESTION, "temperature": 0}
    cut: Any
    for cut in (
        client.chat.completions.create(**{name: 7}, **asked) for name in ("max_tokens", "max_completion_tokens")
    ):
        assert cut.choices[0].finish_reason == "length" and cut.usage.completion_tokens == 7
        assert (
            cut.choices[0].message.content == "Take an " and cut.choices[0].message.reasoning_content == "Rain today."
        )


def test_a_seed_makes_the_same_replies_again_and_another_makes_others(client: openai.OpenAI) -> None:
    def replies(seed: int) -> tuple[list[str | None], list[str]]:
        asked: Any = {"model": "tiny", "n": 3, "seed": seed, "temperature": 50, "max_tokens": 20}
        chat = client.chat.completions.create(messages=QUESTION, **asked).choices
        return [choice.message.content for choice in chat], [
            choice.text for choice in client.completions.create(prompt="a", **asked).choices
        ]

    found = [replies(seed) for seed in range(4)]
    assert [replies(seed) for seed in range(4)] == found
    for kind in (0, 1):
        assert len({text for both in found for text in both[kind]}) == 4 * 3


@pytest.mark.parametrize(
    ("penalties", "expected"),
    [({}, "aaaaaa"), ({"presence_penalty": 1.5}, "abaaaa"), ({"frequency_penalty": 1.5}, "ababab")],
)
def test_biases_and_penalties(here: Any, client: openai.OpenAI, penalties: dict[str, float], expected: str) -> None:
    """The penalties are for what the reply has already, and not for what the question has."""
    bias = {str(here.service.tokenizer.token_id(text)): value for text, value in (("a", 100), ("b", 99))}
    asked: Any = {"model": "tiny", "temperature": 0, "max_tokens": 6, "logit_bias": bias, **penalties}
    reply = client.chat.completions.create(messages=[{"role": "user", "content": "aaa"}], **asked)
    assert reply.choices[0].message.content == expected
    assert client.completions.create(prompt="aaa", **asked).choices[0].text == expected
    never = {str(here.service.tokenizer.token_id("umbrella")): -100}
    without = client.chat.completions.create(
        model="tiny",
        messages=QUESTION,
        temperature=0,
        logit_bias=never,
        max_tokens=30,  # type: ignore[arg-type]
    )
    assert (without.choices[0].message.content or "").startswith("Take an ")
    assert "umbrella" not in (without.choices[0].message.content or "")


def test_a_chat_is_a_completion_of_the_tokens_it_reads(here: Any, client: openai.OpenAI) -> None:
    asked: Any = {
        "model": "tiny", "seed": 3, "temperature": 4, "max_tokens": 20,
        "extra_body": {"return_token_ids": True, "prompt_logprobs": 1},
    }  # fmt: skip
    chat: Any = client.chat.completions.create(messages=QUESTION, **asked)
    assert here.service.tokenizer.decode(chat.prompt_token_ids).count(QUESTION[0]["content"]) == 1
    text: Any = client.completions.create(prompt=chat.prompt_token_ids, **asked).choices[0]
    assert text.token_ids == chat.choices[0].token_ids and text.prompt_token_ids == chat.prompt_token_ids
    assert text.text == here.service.tokenizer.decode(text.token_ids)
    # The log-probabilities of the prompt are the same as by an echo.
    scores = client.completions.create(
        model="tiny", prompt=chat.prompt_token_ids, echo=True, max_tokens=0, logprobs=1
    ).choices[0].logprobs  # fmt: skip
    assert scores is not None and scores.token_logprobs is not None
    assert scores.token_logprobs[0] is chat.prompt_logprobs[0] is text.prompt_logprobs[0] is None
    for places in (chat.prompt_logprobs, text.prompt_logprobs):
        told = [
            place[str(token)]["logprob"] for token, place in zip(chat.prompt_token_ids, places, strict=True) if place
        ]
        assert told == pytest.approx(scores.token_logprobs[1:], abs=1e-4)
    with pytest.raises(openai.BadRequestError, match="cannot be streamed") as caught:
        client.chat.completions.create(messages=QUESTION, stream=True, **asked)
    assert caught.value.param == "prompt_logprobs"


ANSWER = ["Sure: ", '{"rainy": ', "true}", " Bye!"]
NEVER = {"type": "object", "properties": {"rainy": {"const": False}}, "required": ["rainy"],
         "additionalProperties": False}  # fmt: skip


def test_the_three_forms_of_a_response(writer: Any, hosting: Any) -> None:
    with (
        hosting(writer(ANSWER)) as server,
        openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client,
    ):
        bias = {str(server.service.tokenizer.token_id(ANSWER[1])): 10}  # where "Sure" is not allowed
        for form, meant in (
            ({"type": "text"}, None),
            ({"type": "json_object"}, {"rainy": True}),
            ({"type": "json_schema", "json_schema": {"name": "weather", "schema": NEVER}}, {"rainy": False}),
        ):
            asked: Any = {
                "model": "tiny", "messages": QUESTION, "temperature": 0, "logit_bias": bias, "response_format": form,
                "max_tokens": 100, "reasoning_effort": "none",
            }  # fmt: skip
            content = client.chat.completions.create(**asked).choices[0].message.content or ""
            assert content == "".join(ANSWER) if meant is None else json.loads(content) == meant
            stream = client.chat.completions.create(stream=True, **asked)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == content
        asked["response_format"] = {"type": "json_schema", "json_schema": {"name": "weather"}}
        with pytest.raises(openai.BadRequestError, match=r"needs json_schema\.schema"):
            client.chat.completions.create(**asked)


TEMPLATE = """\
{%- for message in messages %}
    {{- '[' + message.role + ']' }}
    {%- if message.reasoning_content %}{{ '(' + message.reasoning_content + ')' }}{% endif %}
    {{- message.content or '' }}
    {%- for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}
{%- endfor %}{{ '[assistant]' }}"""


def test_the_thinking_of_earlier_turns_is_left_out_but_where_they_called_tools(writer: Any, hosting: Any) -> None:
    call = ["<think>", "I look.", "</think>", '<tool_call>\n{"name": "now", "arguments": {}}', "\n</tool_call>"]
    tools: Any = [{"type": "function", "function": {"name": "now"}}]
    with (
        hosting(writer(call, chat_template=TEMPLATE)) as server,
        openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client,
    ):
        asked: Any = {"model": "tiny", "temperature": 0, "extra_body": {"return_token_ids": True}}
        calls = client.chat.completions.create(messages=QUESTION, tools=tools, **asked).choices[0].message
        says = client.chat.completions.create(messages=QUESTION, **asked).choices[0].message
        assert calls.tool_calls and not says.tool_calls
        for message in (calls, says):
            assert message.to_dict()["reasoning_content"] == message.to_dict()["reasoning"] == "I look."
        result = {"role": "tool", "tool_call_id": calls.tool_calls[0].id, "content": "noon"}
        for only in ({"reasoning_content"}, {"reasoning"}, {"reasoning_content", "reasoning"}):
            left_out = {"reasoning_content", "reasoning"} - only
            given = [{k: v for k, v in m.to_dict().items() if k not in left_out} for m in (calls, says)]
            history = [*QUESTION, given[0], result, given[1], *QUESTION]
            reply: Any = client.chat.completions.create(messages=history, max_tokens=1, **asked)
            read = server.service.tokenizer.decode(reply.prompt_token_ids, False)
            question = "[user]" + QUESTION[0]["content"]
            assert read == (
                question + '[assistant](I look.){"name": "now", "arguments": {}}[tool]noon'
                "[assistant]" + (says.content or "") + question + "[assistant]"
            )


class Place(BaseModel):
    latitude: int = Field(ge=-90, le=90, description="in degrees")
    name: Literal["home", "away"] | None = None


class Journey(BaseModel):
    """What pydantic knows: choices, ranges, patterns, dates, classes within classes and within themselves."""

    goal: Place
    stops: list[Place] = Field(min_length=1, max_length=2)
    day: date
    key: UUID
    code: str = Field(pattern="^[a-c]{2,4}$")
    price: float = Field(ge=0, le=10)
    then: "Journey | None"


@pytest.mark.parametrize("called", [False, True])
def test_noise_fits_the_class_that_is_asked_for(here: Any, client: openai.OpenAI, called: bool) -> None:
    token_id = here.service.tokenizer.token_id
    bias = {
        str(token_id(text)): value for text, value in {'"': 4, "}": 4, "]": 4, ",": 4, " ": -100, "\n": -100}.items()
    }
    asked: Any = {"response_format": Journey}
    if called:
        asked = {"tools": [openai.pydantic_function_tool(Journey)], "tool_choice": "required"}
    asked |= {"messages": QUESTION, "logit_bias": bias, "temperature": 2, "n": 2, "max_tokens": 2500}
    whole = client.chat.completions.parse(model="tiny", seed=1, **asked)
    with client.chat.completions.stream(model="tiny", seed=1, **asked) as stream:
        grown = stream.get_final_completion()
    found: list[list[Any]] = [
        [call.function.parsed_arguments for choice in reply.choices for call in choice.message.tool_calls or []]
        if called
        else [choice.message.parsed for choice in reply.choices]
        for reply in (whole, grown)
    ]
    assert found[0] == found[1] and {type(one) for one in found[0]} == {Journey}
    assert len({one.model_dump_json() for one in found[0]}) == len(found[0]) >= 2


def test_a_conversation_with_a_tool(client: openai.OpenAI) -> None:
    parameters = {"type": "object", "properties": {"day": {"enum": ["today"]}}, "required": ["day"],
                  "additionalProperties": False}  # fmt: skip
    tools: Any = [{"type": "function", "function": {"name": "forecast", "parameters": parameters}}]
    for choice in ("required", {"type": "function", "function": {"name": "forecast"}}):
        reply = client.chat.completions.create(
            model="tiny", messages=QUESTION, tools=tools, tool_choice=choice, temperature=0,  # type: ignore[call-overload]
            parallel_tool_calls=False, max_tokens=300,
        )  # fmt: skip
        message = reply.choices[0].message
        assert reply.choices[0].finish_reason == "tool_calls"
        assert json.loads(message.tool_calls[0].function.arguments) == {"day": "today"}
    after = [*QUESTION, message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}]
    final = client.chat.completions.create(model="tiny", messages=after, temperature=0)
    assert final.choices[0].message.content == "Take an umbrella…"


def test_text_completions(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "max_tokens": 3, "temperature": 0}
    reply = client.completions.create(prompt=["a", "b"], echo=True, logprobs=2, **asked)
    assert [choice.text for choice in reply.choices] == ["a<think>\nRain today", "b<think>\nRain today"]
    assert reply.choices[0].logprobs is not None and reply.choices[0].logprobs.token_logprobs is not None
    streamed = client.completions.create(prompt="a", stream=True, **asked)
    assert "".join(chunk.choices[0].text for chunk in streamed) == "<think>\nRain today"


def test_errors_are_the_librarys_own(here: Any, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist here"):
        client.chat.completions.create(model="gpt-9", messages=QUESTION)
    with pytest.raises(openai.NotFoundError, match="nothing at /v1/embeddings"):
        client.embeddings.create(model="tiny", input="text")
    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        client.chat.completions.create(model="tiny", messages=QUESTION, temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="x" * 5000)
    assert caught.value.code == "context_length_exceeded"
    with (
        openai.OpenAI(base_url=here.url + "/v1", api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()
