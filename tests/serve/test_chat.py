"""Chat completions over HTTP: what is in a reply, whole or in pieces, and what becomes of one that is broken off."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

PIECES = ["<think>", "\nTwo and ", "two make", " four.\n", "</think>", "\n\n", "It is ", "**4**", ", of course", "…"]
QUESTION = {"messages": [{"role": "user", "content": "2+2?"}], "temperature": 0}


@pytest.fixture(scope="module")
def here(writer: Any, hosting: Any) -> Iterator[Any]:
    with hosting(writer(PIECES)) as server:
        yield server


@pytest.fixture
def post(here: Any) -> Callable[..., Any]:
    def send(path: str = "/v1/chat/completions", **body: Any) -> Any:
        whole = QUESTION | body if path.endswith("chat/completions") else body
        return here.client.post(path, json=whole)

    return send


def events(here: Any, **body: Any) -> list[dict[str, Any]]:
    """The JSON of a stream's events; it ended with [DONE]."""
    found = []
    with here.client.stream("POST", "/v1/chat/completions", json=QUESTION | {"stream": True} | body) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    for line in lines[:-1]:
        assert line.startswith("data: ")
        found.append(json.loads(line.removeprefix("data: ")))
    return found


def joined(chunks: list[dict[str, Any]], field: str, index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get(field) or "" for choice in choices)


def test_the_thinking_stands_apart_under_both_names(post: Any) -> None:
    reply = post().json()
    message = reply["choices"][0]["message"]
    assert message["content"] == "It is **4**, of course…"
    assert message["reasoning_content"] == message["reasoning"] == "Two and two make four."
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["object"] == "chat.completion" and reply["model"] == "tiny"


def test_usage_counts_every_token_and_those_of_the_thinking(post: Any) -> None:
    usage = post().json()["usage"]
    assert usage["completion_tokens"] == len(PIECES) + 1  # and the end token
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 5


def test_a_stream_says_the_same(here: Any, post: Any) -> None:
    whole = post().json()
    chunks = events(here, stream_options={"include_usage": True})
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert joined(chunks, "content") == whole["choices"][0]["message"]["content"]
    assert joined(chunks, "reasoning") == joined(chunks, "reasoning_content") == "Two and two make four."
    assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1]["choices"] == []
    told = {key: value for key, value in chunks[-1]["usage"].items() if key != "prompt_tokens_details"}
    assert told == {key: value for key, value in whole["usage"].items() if key != "prompt_tokens_details"}
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_several_choices_each_have_an_index(here: Any, post: Any) -> None:
    assert [choice["index"] for choice in post(n=3).json()["choices"]] == [0, 1, 2]
    chunks = events(here, n=3)
    assert all(joined(chunks, "content", index) == "It is **4**, of course…" for index in range(3))


def test_one_name_for_the_thinking_if_the_server_is_told_so(writer: Any, hosting: Any) -> None:
    with hosting(writer(PIECES), reasoning_fields=("reasoning",)) as server:
        message = server.client.post("/v1/chat/completions", json=QUESTION).json()["choices"][0]["message"]
    assert message["reasoning"] and "reasoning_content" not in message


def test_the_thinking_can_be_left_out_or_left_in(post: Any) -> None:
    assert "reasoning" not in post(include_reasoning=False).json()["choices"][0]["message"]
    for whole in ({"separate_reasoning": False}, {"reasoning_format": "none"}):
        assert post(**whole).json()["choices"][0]["message"]["content"] == "".join(PIECES)


@pytest.mark.parametrize(
    "off",
    [
        {"thinking": {"type": "disabled"}},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"chat_template_kwargs": {"thinking": False}},
        {"reasoning_effort": "none"},
    ],
)
def test_a_thinking_switched_off_is_closed_in_the_prompt(here: Any, post: Any, off: dict[str, Any]) -> None:
    tokens = here.client.post("/tokenize", json={"messages": QUESTION["messages"]}).json()["tokens"]
    reply = post(return_token_ids=True, **off).json()
    closed = here.service.tokenizer.decode(reply["prompt_token_ids"][len(tokens) :], False)
    assert closed == "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    "budget", [{"thinking_token_budget": 2}, {"thinking": {"type": "enabled", "budget_tokens": 2}}]
)
def test_a_budget_ends_the_thinking(post: Any, budget: dict[str, Any]) -> None:
    message = post(**budget).json()["choices"][0]["message"]
    assert message["reasoning"].startswith("Two and") and "four" not in message["reasoning"]


def test_logprobs_of_each_token_of_the_reply(here: Any, post: Any) -> None:
    content = post(logprobs=True, top_logprobs=3).json()["choices"][0]["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == "".join(PIECES)
    for entry in content:
        assert bytes(entry["bytes"]).decode() == entry["token"]
        assert len(entry["top_logprobs"]) == 3 and entry["top_logprobs"][0]["token"] == entry["token"]
        assert -0.01 < entry["logprob"] <= 0
    streamed = events(here, logprobs=True)
    entries = [
        e for c in streamed for choice in c["choices"] for e in (choice["logprobs"] or {"content": []})["content"]
    ]
    assert [entry["token"] for entry in entries] == [entry["token"] for entry in content]


def test_a_stop_text_ends_the_reply_and_is_named(post: Any) -> None:
    choice = post(stop=["4**"]).json()["choices"][0]
    assert choice["message"]["content"] == "It is **" and choice["stop_reason"] == "4**"


def test_a_limit_is_told(post: Any) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        reply = post(**{name: 6}).json()
        assert reply["choices"][0]["finish_reason"] == "length" and reply["usage"]["completion_tokens"] == 6
    cut = post(max_tokens=3).json()["choices"][0]["message"]
    assert cut["content"] == "" and cut["reasoning"] == "Two and two make"


def test_earlier_thinking_is_no_part_of_the_conversation(here: Any) -> None:
    def tokens(**assistant: Any) -> list[int]:
        messages = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b", **assistant},
            {"role": "user", "content": "c"},
        ]
        found: list[int] = here.client.post("/tokenize", json={"messages": messages}).json()["tokens"]
        return found

    assert tokens() == tokens(reasoning_content="hm") == tokens(reasoning="hm") == tokens(content="<think>hm</think>b")


def test_parts_of_a_content_are_joined(here: Any, post: Any) -> None:
    parts = [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]
    one, other = (
        here.client.post("/tokenize", json={"messages": [{"role": "user", "content": content}]}).json()
        for content in ("2+2?", parts)
    )
    assert one == other
    image = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]
    assert post(messages=[{"role": "user", "content": image}]).status_code == 400


def test_a_reply_goes_on_from_the_last_message(post: Any) -> None:
    messages = [*QUESTION["messages"], {"role": "assistant", "content": "It is "}]
    for wanted in ({"continue_final_message": True}, {"messages": [messages[0], messages[1] | {"prefix": True}]}):
        reply = post(**{"messages": messages, **wanted}).json()
        assert reply["choices"][0]["message"]["content"].startswith(("<think>", "")), reply
        assert reply["usage"]["prompt_tokens"] > 7


def test_a_schema_binds_the_answer_and_not_the_thinking(post: Any) -> None:
    schema = {
        "type": "object",
        "properties": {"sum": {"type": "integer", "maximum": 9}},
        "required": ["sum"],
        "additionalProperties": False,
    }
    for form in (
        {"type": "json_schema", "json_schema": {"name": "sum", "schema": schema}},
        {"type": "json_object", "schema": schema},
    ):
        message = post(response_format=form, max_tokens=200).json()["choices"][0]["message"]
        assert json.loads(message["content"])["sum"] <= 9 and "four" in message["reasoning"]
    choice = {"structured_outputs": {"choice": ["red.", "green"]}}
    assert post(**choice).json()["choices"][0]["message"]["content"] in ("red.", "green")


def test_a_required_call_comes_whole_and_in_pieces(here: Any, post: Any) -> None:
    parameters = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"],
                  "additionalProperties": False}  # fmt: skip
    tools = [{"type": "function", "function": {"name": "weather", "parameters": parameters}}]
    asked = {"tools": tools, "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 300}
    choice = post(**asked).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"])["city"] in ("Rome", "Oslo")
    pieces = [
        piece
        for chunk in events(here, **asked)
        for choice in chunk["choices"]
        for piece in choice["delta"].get("tool_calls") or ()
    ]
    assert pieces[0]["id"] and pieces[0]["function"]["name"] == "weather"
    assert json.loads("".join(piece["function"].get("arguments") or "" for piece in pieces))["city"] in ("Rome", "Oslo")


@pytest.mark.parametrize("streams", [False, True])
def test_who_leaves_frees_the_cache_within_a_step(writer: Any, hosting: Any, streams: bool) -> None:
    with hosting(writer(PIECES, context=1 << 15)) as server:
        body = QUESTION | {"stream": streams, "ignore_eos": True}
        server.left_amid(body, 0.5)
        server.until_free(1.0)
        assert 0 < server.engine.stats["generated_tokens"] < 1 << 14


def test_thinking_can_be_ended_while_it_goes_on(writer: Any, hosting: Any) -> None:
    pieces = ["<think>", *(f"thought {i} " for i in range(1500)), "</think>", "Done."]
    with hosting(writer(pieces, context=1 << 12)) as server:
        with server.client.stream("POST", "/v1/chat/completions", json=QUESTION | {"stream": True}) as response:
            lines = (json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {"))
            first = next(lines)
            control = {"id": first["id"], "action": "reasoning_end"}
            with server.engine._loop.held():
                told = server.client.post("/v1/chat/completions/control", json=control)
            rest = list(lines)
        assert told.json() == {"success": True}
        assert 0 < len(rest) < 1500 and "</think>" not in joined(rest, "content") + joined(rest, "reasoning")
        assert joined(rest, "content") == "Done."
        assert server.client.post("/v1/chat/completions/control", json=control).status_code == 404


def test_a_full_queue_says_so_and_when_to_come_again(writer: Any, hosting: Any) -> None:
    with hosting(writer(PIECES, context=1 << 13), max_queue=2) as server:
        body = QUESTION | {"n": 2}
        asked = threading.Thread(target=lambda: server.client.post("/v1/chat/completions", json=body))
        with server.engine._loop.held():  # nobody's turn comes
            asked.start()
            while server.service._waiting < 2:
                time.sleep(0.005)
            full = server.client.post("/v1/chat/completions", json=body)
        asked.join()
        assert full.status_code == 429 and full.headers["retry-after"] == "1"
        assert full.json()["error"]["code"] == "queue_full"
        assert server.client.post("/v1/chat/completions", json=body).status_code == 200


def test_a_request_that_takes_too_long_is_given_up(writer: Any, hosting: Any) -> None:
    with hosting(writer(PIECES, context=1 << 15), request_seconds=0.3) as server:
        body = QUESTION | {"ignore_eos": True}
        late = server.client.post("/v1/chat/completions", json=body, timeout=10)
        assert late.status_code == 504 and "0.3 seconds" in late.json()["error"]["message"]
        with server.client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as response:
            lines = [line for line in response.iter_lines() if line]
        assert "0.3 seconds" in json.loads(lines[-1].removeprefix("data: "))["error"]["message"]
        server.until_free()


CALL = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
CALLED = [
    {"role": "user", "content": "when?"},
    {"role": "assistant", "content": "", "reasoning": "look", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "noon"},
]


@pytest.mark.parametrize(
    "body",
    [
        {"tools": [TOOL]},
        {"tools": [TOOL], "tool_choice": "none"},
        {"tools": [TOOL], "messages": CALLED},
        {"messages": CALLED},
        {"thinking": {"type": "disabled"}},
        {"reasoning_effort": "none"},
        {"messages": [*CALLED, {"role": "assistant", "content": "It is"}], "continue_final_message": True},
        {"messages": [*CALLED, {"role": "assistant", "content": "It is", "prefix": True}]},
    ],
)
def test_tokenize_shows_what_the_model_reads(here: Any, post: Any, body: dict[str, Any]) -> None:
    reply = post(**body, max_tokens=1, return_token_ids=True).json()
    tokens = here.client.post("/tokenize", json={"messages": QUESTION["messages"]} | body).json()
    assert tokens["tokens"] == reply["prompt_token_ids"] and tokens["count"] == reply["usage"]["prompt_tokens"]


def test_some_tools_may_be_allowed_and_the_model_sees_them_all(post: Any) -> None:
    tools = [{"type": "function", "function": {"name": name}} for name in ("now", "then", "never")]
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [tools[0]]}}
    reply = post(tools=tools, tool_choice=allowed, return_token_ids=True, parallel_tool_calls=False)
    assert reply.status_code == 200, reply.text
    calls = reply.json()["choices"][0]["message"]["tool_calls"]
    assert [call["function"]["name"] for call in calls] == ["now"]
    every = post(tools=tools, tool_choice="required", return_token_ids=True, max_tokens=1).json()
    assert reply.json()["prompt_token_ids"] == every["prompt_token_ids"]
