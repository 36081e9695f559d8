"""Requests that do not go: each is answered with one sentence that names the field, in OpenAI's form; nobody else
notices."""

import re
from collections.abc import Iterator
from typing import Any

import pytest

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def here(writer: Any, hosting: Any) -> Iterator[Any]:
    with hosting(writer(["fine"], context=256)) as server:
        yield server


BAD: list[tuple[str, dict[str, Any], str | None]] = [
    (CHAT, {}, "messages"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": "hi"}, "messages"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "king", "content": "hi"}]}, "messages[0]"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    (CHAT, {"messages": MESSAGES, "temperature": "hot"}, "temperature"),
    (CHAT, {"messages": MESSAGES, "temperature": -1}, "temperature"),
    (CHAT, {"messages": MESSAGES, "top_p": 0}, "top_p"),
    (CHAT, {"messages": MESSAGES, "n": 0}, "n"),
    (CHAT, {"messages": MESSAGES, "n": 10**9}, "n"),
    (CHAT, {"messages": MESSAGES, "n": 1.5}, "n"),
    (CHAT, {"messages": MESSAGES, "n": True}, "n"),
    (CHAT, {"messages": MESSAGES, "max_tokens": -5}, "max_tokens"),
    (CHAT, {"messages": MESSAGES, "max_completion_tokens": 0}, "max_completion_tokens"),
    (CHAT, {"messages": MESSAGES, "stop": [""]}, "stop[0]"),
    (CHAT, {"messages": MESSAGES, "stop": ["x"] * 10_000}, "stop"),
    (CHAT, {"messages": MESSAGES, "logit_bias": {"a": 1}}, None),
    (CHAT, {"messages": MESSAGES, "logit_bias": {"5": 1000}}, None),
    (CHAT, {"messages": MESSAGES, "logit_bias": {"99999": 1}}, "logit_bias"),
    (CHAT, {"messages": MESSAGES, "stop_token_ids": [99999]}, "stop_token_ids"),
    (CHAT, {"messages": MESSAGES, "thinking": {"type": "enabled", "budget_tokens": -1}}, "thinking.budget_tokens"),
    (
        CHAT,
        {"messages": MESSAGES, "chat_template_kwargs": {"enable_thinking": "no"}},
        "chat_template_kwargs.enable_thinking",
    ),
    (CHAT, {"messages": MESSAGES, "guided_regex": "("}, "guided_regex"),
    (CHAT, {"messages": MESSAGES, "regex": "a", "guided_choice": ["b"]}, "regex"),
    (CHAT, {"messages": MESSAGES, "json_schema": {"type": "foo"}}, "json_schema"),
    (CHAT, {"messages": MESSAGES, "grammar": 'root ::= "a"'}, "grammar"),
    (CHAT, {"messages": MESSAGES, "ebnf": 'root ::= "a"'}, "ebnf"),
    (CHAT, {"messages": MESSAGES, "include_stop_str_in_output": True}, "include_stop_str_in_output"),
    (CHAT, {"messages": MESSAGES, "bad_words": ["a"]}, "bad_words"),
    (CHAT, {"messages": MESSAGES, "allowed_token_ids": [1]}, "allowed_token_ids"),
    (CHAT, {"messages": MESSAGES, "reasoning_format": "deepseek-legacy"}, "reasoning_format"),
    (
        CHAT,
        {"messages": MESSAGES, "stream": True, "stream_options": {"continuous_usage_stats": True}},
        "stream_options.continuous_usage_stats",
    ),
    (CHAT, {"messages": MESSAGES, "max_tokens": 0}, "max_tokens"),
    (CHAT, {"messages": MESSAGES, "n_predict": 0}, "n_predict"),
    (
        CHAT,
        {
            "messages": MESSAGES,
            "tools": [{"type": "function", "function": {"name": "send_messages", "parameters": {"type": "string"}}}],
        },
        "tools[0].function.parameters",
    ),
    (
        CHAT,
        {
            "messages": MESSAGES,
            "tools": [
                {
                    "type": "function",
                    "function": {"name": "send_messages", "parameters": {"properties": {"messages": {"type": "foo"}}}},
                }
            ],
        },
        "tools",
    ),
    (
        CHAT,
        {
            "messages": MESSAGES,
            "tools": [{"type": "function", "function": {"name": "a"}}],
            "tool_choice": {"type": "function", "function": {"name": "b"}},
        },
        "tool_choice",
    ),
    (
        CHAT,
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "no"}}]}]},
        "messages[0].tool_calls[0].function.arguments",
    ),
    (CHAT, {"messages": MESSAGES, "top_logprobs": 3}, "top_logprobs"),
    (CHAT, {"messages": MESSAGES, "logprobs": 3}, "logprobs"),
    (CHAT, {"messages": MESSAGES, "prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    (CHAT, {"messages": MESSAGES, "use_beam_search": True}, "use_beam_search"),
    (CHAT, {"messages": [{"role": "user", "content": "hi"}], "continue_final_message": True}, "messages"),
    (CHAT, {"messages": MESSAGES, "stream": "yes"}, "stream"),
    (CHAT, {"messages": MESSAGES, "seed": 2**70}, "seed"),
    (CHAT, {"messages": MESSAGES, "min_tokens": 9, "max_tokens": 3}, "min_tokens"),
    (CHAT, {"messages": MESSAGES, "functions": []}, "functions"),
    (CHAT, {"messages": MESSAGES, "modalities": ["audio"]}, None),
    (CHAT, {"messages": MESSAGES, "tools": [{"type": "function"}]}, None),
    (CHAT, {"messages": MESSAGES, "tool_choice": "required"}, "tools"),
    (CHAT, {"messages": MESSAGES, "response_format": {"type": "json_schema"}}, "response_format"),
    (CHAT, {"messages": MESSAGES, "response_format": {"type": "xml"}}, "response_format.type"),
    (CHAT, {"messages": MESSAGES, "structured_outputs": {}}, "structured_outputs"),
    (CHAT, {"messages": MESSAGES, "structured_outputs": {"regex": "("}}, "structured_outputs"),
    (CHAT, {"messages": [{"role": "user", "content": "x" * 300}]}, "messages"),
    (TEXT, {}, "prompt"),
    (TEXT, {"prompt": ""}, "prompt"),
    (TEXT, {"prompt": []}, "prompt"),
    (TEXT, {"prompt": ["a", ""]}, "prompt[1]"),
    (TEXT, {"prompt": [[]]}, "prompt[0]"),
    (TEXT, {"prompt": [1, "a"]}, None),
    (TEXT, {"prompt": [-1]}, None),
    (TEXT, {"prompt": [10**6]}, "prompt"),
    (TEXT, {"prompt": [[5], [10**6]]}, "prompt[1]"),
    (TEXT, {"prompt": "a", "max_tokens": 0}, "max_tokens"),
    (TEXT, {"prompt": "a", "suffix": "b"}, "suffix"),
    (TEXT, {"prompt": "a", "best_of": 3}, "best_of"),
    (TEXT, {"prompt": ["a"] * 200}, "prompt"),
    ("/tokenize", {}, "prompt"),
    ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "prompt"),
    ("/detokenize", {"tokens": [10**6]}, "tokens"),
    ("/detokenize", {"tokens": "abc"}, "tokens"),
]


@pytest.mark.parametrize(("path", "body", "field"), BAD)
def test_what_is_wrong_is_named(here: Any, path: str, body: dict[str, Any], field: str | None) -> None:
    reply = here.client.post(path, json=body)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert error["message"] and "\n" not in error["message"] and len(error["message"]) < 600
    if field is not None:
        assert error["param"] == field
    here.until_free()


def test_a_prompt_that_is_too_long_has_its_own_code(here: Any) -> None:
    reply = here.client.post(TEXT, json={"prompt": "x" * 256})
    assert reply.status_code == 400 and reply.json()["error"]["code"] == "context_length_exceeded"


def test_another_model_is_not_found(here: Any) -> None:
    reply = here.client.post(CHAT, json={"model": "gpt-\x00é", "messages": MESSAGES})
    assert reply.status_code == 404 and reply.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "hi"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "hi"}], "temperature": 1e999}',
        b'{"messages": [{"role": "user", "content": "hi"}], "seed": ' + b"9" * 10_000 + b"}",
        b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}',
        b"null",
        b"[]",
        b'"text"',
    ],
)
def test_a_body_that_is_no_such_json(here: Any, body: bytes) -> None:
    reply = here.client.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400, reply.text
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_a_body_of_another_kind(here: Any) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        reply = here.client.post(CHAT, content=b'{"messages": []}', headers={"Content-Type": kind})
        assert reply.status_code == 415 and "Content-Type: application/json" in reply.json()["error"]["message"]


def test_unknown_paths_and_methods(here: Any) -> None:
    missing = here.client.post("/v1/embeddings", json={})
    assert missing.status_code == 404 and "/v1/embeddings" in missing.json()["error"]["message"]
    wrong = here.client.get(CHAT)
    assert wrong.status_code == 405 and wrong.headers["allow"] == "POST" and wrong.json()["error"]["message"]


def test_names_that_nobody_knows_are_passed_over(here: Any) -> None:
    body = {"messages": MESSAGES, "store": True, "metadata": {"a": "b"}, "service_tier": "auto", "temperature": None}
    assert here.client.post(CHAT, json=body).status_code == 200


HARMLESS: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"max_tokens": -1}),
    (CHAT, {"n_predict": -1}),
    (CHAT, {"stop": ""}),
    (CHAT, {"stop": []}),
    (CHAT, {"stop": None}),
    (CHAT, {"best_of": 1, "suffix": "", "use_beam_search": False, "bad_words": [], "allowed_token_ids": None}),
    (CHAT, {"include_stop_str_in_output": False, "reasoning_format": "auto"}),
    (CHAT, {"stream_options": {"include_usage": False, "continuous_usage_stats": False}}),
    (CHAT, {"seed": 1.0, "n": 1.0, "max_tokens": 4.0, "top_k": 5.0, "temperature": 1.0}),
    (
        CHAT,
        {"messages": [*MESSAGES, {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, *MESSAGES]},
    ),
    (CHAT, {"messages": [*MESSAGES, {"role": "assistant", "content": None, "refusal": "no"}, *MESSAGES]}),
    (TEXT, {"max_tokens": -1}),
    (TEXT, {"n_predict": 2, "best_of": 1}),
]


@pytest.mark.parametrize(("path", "body"), HARMLESS)
def test_what_other_servers_take_is_taken(here: Any, path: str, body: dict[str, Any]) -> None:
    whole = ({"messages": MESSAGES} if path == CHAT else {"prompt": "a"}) | body
    for place in (path, path.removeprefix("/v1")):
        reply = here.client.post(place, json=whole)
        assert reply.status_code == 200, reply.text


def test_routes_have_a_name_without_version_and_one_with(here: Any) -> None:
    assert here.client.get("/models").json() == here.client.get("/v1/models").json()
    ids = here.client.post("/v1/tokenize", json={"content": "ab"}).json()["tokens"]
    assert ids == here.client.post("/tokenize", json={"content": "ab"}).json()["tokens"]
    assert here.client.post("/v1/detokenize", json={"tokens": ids}).json()["content"] == "ab"


@pytest.mark.parametrize(
    "bound",
    [
        {"guided_regex": "a[bc]{3}d"},
        {"regex": "a[bc]{3}d"},
        {"guided_choice": ["abbbd", "acccd"]},
        {"guided_grammar": "start: /a[bc]{3}d/"},
        {"guided_json": {"type": "string", "pattern": "^a[bc]{3}d$"}},
        {"json_schema": {"type": "string", "pattern": "^a[bc]{3}d$"}},
        {"json_schema": '{"type": "string", "pattern": "^a[bc]{3}d$"}'},
    ],
)
def test_other_names_of_structured_outputs_bind_the_text(here: Any, bound: dict[str, Any]) -> None:
    chat = here.client.post(CHAT, json={"messages": MESSAGES, "reasoning_effort": "none"} | bound).json()
    text = here.client.post(TEXT, json={"prompt": "x", "n_predict": 40} | bound).json()
    for given in (chat["choices"][0]["message"]["content"], text["choices"][0]["text"]):
        assert re.fullmatch(r'"?a[bc]{3}d"?', given)


def test_n_predict_bounds_the_reply(here: Any) -> None:
    body = {"messages": MESSAGES, "n_predict": 3, "ignore_eos": True}
    assert here.client.post(CHAT, json=body).json()["usage"]["completion_tokens"] == 3


def test_a_schema_bomb_is_refused_and_the_others_are_served(here: Any) -> None:
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(60):
        deep = {"type": "object", "properties": {f"p{i}": deep for i in range(1)}, "required": ["p0"]}
    wide = {"type": "object", "properties": {f"p{i}": {"enum": [f"{i}-{j}" for j in range(50)]} for i in range(400)}}
    regex = {"type": "string", "pattern": "(a{1,1000}){1,1000}"}
    for schema in (deep, wide, regex):
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        body = {"messages": MESSAGES, "response_format": form, "max_tokens": 5}
        assert here.client.post(CHAT, json=body, timeout=60).status_code in (200, 400)
        assert here.client.post(CHAT, json={"messages": MESSAGES}).status_code == 200
