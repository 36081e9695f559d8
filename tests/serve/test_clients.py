"""Foreign clients, as they are: OpenAI's library and the `llm` program, against a scripted model."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from pydantic import BaseModel

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


def test_a_chat(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="tiny", messages=QUESTION, temperature=0, seed=1)
    message: Any = reply.choices[0].message
    assert message.content == "Take an umbrella…" and message.reasoning_content == "Rain today."
    assert reply.usage is not None and reply.usage.completion_tokens == len(PIECES) + 1
    assert reply.usage.completion_tokens_details is not None
    assert reply.usage.completion_tokens_details.reasoning_tokens == 5


def test_a_stream_with_usage(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="tiny", messages=QUESTION, stream=True, stream_options={"include_usage": True}, temperature=0
    )
    text, usage = "", None
    for chunk in stream:
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
        usage = chunk.usage or usage
    assert text == "Take an umbrella…" and usage is not None and usage.total_tokens > usage.completion_tokens


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


def test_structured_output_as_a_class(client: openai.OpenAI) -> None:
    class Weather(BaseModel):
        rainy: bool

    reply = client.chat.completions.parse(
        model="tiny", messages=QUESTION, response_format=Weather, max_tokens=400, temperature=0
    )
    parsed = reply.choices[0].message.parsed
    assert isinstance(parsed, Weather)
    anything = client.chat.completions.create(
        model="tiny", messages=QUESTION, response_format={"type": "json_object"}, max_tokens=60, temperature=0, seed=3
    )
    assert (anything.choices[0].message.content or "{").lstrip().startswith("{")


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


def test_closing_a_stream_ends_the_request(writer: Any, hosting: Any) -> None:
    with (
        hosting(writer(PIECES, context=1 << 15)) as server,
        openai.OpenAI(base_url=server.url + "/v1", api_key="none") as client,
    ):
        stream = client.chat.completions.create(
            model="tiny", messages=QUESTION, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        stream.close()
        server.until_free(2.0)
        assert server.engine.stats["generated_tokens"] < 1 << 14


@pytest.mark.parametrize("streams", [True, False])
def test_the_program_llm(here: Any, tmp_path: Path, streams: bool) -> None:
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: firefly\n  model_name: tiny\n  api_base: {here.url}/v1\n  api_key_name: firefly\n"
    )
    (tmp_path / "keys.json").write_text(json.dumps({"firefly": KEY}))
    command = [
        sys.executable,
        "-m",
        "llm",
        "-m",
        "firefly",
        "What should I take?",
        *([] if streams else ["--no-stream"]),
    ]
    # Plugins that happen to be installed are none of our business.
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path), "LLM_LOAD_PLUGINS": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("Take an umbrella…")
