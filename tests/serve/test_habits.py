"""Habits of clients of other servers: what they send without much thought, and what they rely on in a reply."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from luciola import Engine, LanguageModel
from luciola.serve.guard import ServerSettings
from luciola.serve.service import Service, Settings
from luciola.text.tokenizer import Tokenizer

PIECES = ["<think>", "two ", "and ", "two", "</think>", "It ", "is ", "four"]
QUESTION: dict[str, Any] = {"messages": [{"role": "user", "content": "2+2?"}], "temperature": 0}
STRING = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": STRING}}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def here(writer: Any, hosting: Any) -> Iterator[Any]:
    with hosting(writer(PIECES, context=1024)) as server:
        yield server


@pytest.fixture
def ask(here: Any) -> Callable[..., dict[str, Any]]:
    def reply(**body: Any) -> dict[str, Any]:
        response = here.client.post(CHAT, json=QUESTION | body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    return reply


def chunks(here: Any, **body: Any) -> list[dict[str, Any]]:
    with here.client.stream("POST", CHAT, json=QUESTION | body | {"stream": True}) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    return [json.loads(line) for line in lines[:-1]]


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(("stop", "reason"), [("R", "stop"), ("O", "stop"), (["nothing"], "tool_calls")])
def test_a_call_that_a_stop_text_cuts_short_is_no_call_to_make(
    here: Any, ask: Callable[..., dict[str, Any]], streams: bool, stop: object, reason: str
) -> None:
    bias = {str(here.service.tokenizer.encode(stop)[0]): 100} if isinstance(stop, str) else {}
    asked = {"tools": [TOOL], "tool_choice": "required", "stop": stop, "logit_bias": bias, "max_tokens": 300}
    asked["parallel_tool_calls"] = False
    if streams:
        found = next(c["choices"][0] for c in chunks(here, **asked) if c["choices"][0]["finish_reason"])
    else:
        found = ask(**asked)["choices"][0]
    assert (found["finish_reason"], found["stop_reason"]) == (reason, stop if reason == "stop" else None)


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ('{"city": "Rome", "day": "mon', '"Rome"'),
        ('{"city": "Rome", ', '"Rome"'),
        ('{"ci', "weather"),
        ("", "weather"),
        ("null", "weather"),
        (None, "weather"),
    ],
)
def test_a_history_may_have_calls_that_were_cut_short(
    here: Any, ask: Callable[..., dict[str, Any]], arguments: str | None, shown: str
) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    messages = [*QUESTION["messages"], {"role": "assistant", "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "c1", "content": "the call was not whole"}]  # fmt: skip
    ids = ask(messages=messages, tools=[TOOL], return_token_ids=True)["prompt_token_ids"]
    assert shown in here.service.tokenizer.decode(ids)


def test_a_schema_that_is_not_strict_is_kept_as_far_as_it_goes(here: Any, ask: Callable[..., dict[str, Any]]) -> None:
    look = {"type": "string", "pattern": "^(?!-)[a-z]+$", "maxLength": 3}
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True, "items": {"type": "null"},
              "maxItems": 2}, "b": look}, "required": ["a", "b"], "additionalProperties": False}  # fmt: skip
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    for strict in ({}, {"strict": False}):
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema} | strict}
        found = json.loads(ask(response_format=form, max_tokens=400)["choices"][0]["message"]["content"])
        assert len(found["b"]) <= 3 and set(found["a"]) <= {None} and len(found["a"]) <= 2
        assert ask(response_format=form, tools=[TOOL], max_tokens=1)
    call = ask(tools=[tool], tool_choice="required", max_tokens=400)["choices"][0]["message"]["tool_calls"][0]
    assert set(json.loads(call["function"]["arguments"])) == {"a", "b"}
    for further in ({}, {"tools": [TOOL]}):
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
        refused = here.client.post(CHAT, json=QUESTION | {"response_format": form} | further)
        assert refused.status_code == 400 and "uniqueItems" in refused.json()["error"]["message"]


def test_llama_cpps_name_of_the_penalty(ask: Callable[..., dict[str, Any]]) -> None:
    texts = [
        ask(**penalty, max_tokens=60, temperature=1, seed=3, ignore_eos=True)["choices"][0]["message"]
        for penalty in ({}, {"repeat_penalty": 50}, {"repetition_penalty": 50.0})
    ]
    assert texts[0] != texts[1] == texts[2]


@pytest.mark.parametrize(
    ("name", "neutral", "other"),
    [
        ("typical_p", 1.0, 0.9), ("mirostat", 0, 2), ("dry_multiplier", 0.0, 0.8), ("xtc_probability", 0, 0.5),
        ("n_probs", 0, 5), ("length_penalty", 1.0, 2.0), ("truncate_prompt_tokens", None, 10),
        ("chat_template", None, "{{ messages }}"), ("stream_reasoning", True, False),
        ("return_routed_experts", False, True),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_had_are_taken_where_they_do_nothing(
    here: Any, ask: Callable[..., dict[str, Any]], name: str, neutral: object, other: object
) -> None:
    assert ask(**{name: neutral})["choices"][0]["message"]["content"] == "It is four"
    refused = here.client.post(CHAT, json=QUESTION | {name: other})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == name


def test_whole_numbers_may_have_a_point_anywhere(ask: Callable[..., dict[str, Any]]) -> None:
    reply = ask(thinking={"type": "enabled", "budget_tokens": 1.0}, n=1.0, max_tokens=50.0)
    assert reply["usage"]["completion_tokens_details"]["reasoning_tokens"] == 3  # with the tags


def test_a_byte_order_mark_is_passed_over_and_packed_bodies_are_refused(here: Any) -> None:
    body, kind = json.dumps(QUESTION).encode(), {"content-type": "application/json"}
    assert here.client.post(CHAT, content=b"\xef\xbb\xbf" + body, headers=kind).status_code == 200
    packed = here.client.post(CHAT, content=body, headers=kind | {"content-encoding": "gzip"})
    assert packed.status_code == 415 and "Content-Encoding" in packed.json()["error"]["message"]
    assert here.client.post(CHAT, content=body, headers=kind | {"content-encoding": "identity"}).status_code == 200


@pytest.mark.parametrize("echo", [False, True])
def test_the_token_itself_is_among_the_likeliest(here: Any, echo: bool) -> None:
    body = {"prompt": "abc", "max_tokens": 12, "temperature": 6.0, "seed": 5, "logprobs": 1, "echo": echo}
    table = here.client.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    places = list(zip(table["tokens"], table["token_logprobs"], table["top_logprobs"], strict=True))
    assert (places[0][2] is None) == echo
    for token, logprob, top in places[echo:]:
        assert top[token] == logprob and len(top) in (1, 2) and max(top.values()) == max(logprob, *top.values())
    assert any(len(top) == 2 for _, _, top in places[echo:])


@pytest.mark.parametrize("spelled", [False, True])
@pytest.mark.parametrize("streams", [False, True])
def test_a_thinking_left_out_is_not_told_token_by_token(
    writer: Any, hosting: Any, streams: bool, spelled: bool
) -> None:
    pieces = ["<thin", "k>two ", "and", "</th", "ink>It ", "is ", "four"] if spelled else PIECES
    asked = {"include_reasoning": False, "logprobs": True}
    with hosting(writer(pieces, context=1024)) as server:
        if streams:
            choices = [choice for chunk in chunks(server, **asked) for choice in chunk["choices"]]
            entries = [entry for c in choices if c["logprobs"] for entry in c["logprobs"]["content"]]
        else:
            reply = server.client.post(CHAT, json=QUESTION | asked).json()
            assert "reasoning" not in reply["choices"][0]["message"]
            entries = reply["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in entries] == (["is ", "four"] if spelled else ["It ", "is ", "four"])


def test_the_fingerprint_names_the_form_of_the_weights(tiny: dict[str, Any]) -> None:
    tokenizer = Tokenizer.characters("abc")
    wide = {"hidden_size": 128, "intermediate_size": 512, "vocab_size": tokenizer.vocab_size, "initializer_range": 0.15}
    lm = LanguageModel.create(tiny | wide, tokenizer)
    names = {
        quantize: Service(lm, Engine(lm, dtype="float32", quantize=quantize), Settings(name="x")).fingerprint
        for quantize in (None, "int8")
    }
    assert names == {None: "luciola-float32", "int8": "luciola-int8"}


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("why", ["late", "queue", "grammar"])
def test_the_access_log_tells_our_errors_from_clients_that_left(
    writer: Any, hosting: Any, capfd: pytest.CaptureFixture[str], why: str, streams: bool
) -> None:
    settings = {"late": {"request_seconds": 0.2}, "queue": {"max_queue": 0}, "grammar": {}}[why]
    body = QUESTION | {"stream": streams}
    if why == "grammar":
        body |= {"structured_outputs": {"regex": "é+"}}  # which no token of this model can begin
    else:
        body |= {"ignore_eos": True}
    status = {"late": 504, "queue": 429, "grammar": 400}[why]
    with hosting(writer(PIECES, context=1 << 15), ServerSettings(access_log=True), **settings) as server:
        if why == "queue":
            server.service._waiting = 1
        response = server.client.post(CHAT, json=body)
        begun = streams and why == "late"
        assert response.status_code == (200 if begun else status)
        if why == "queue":
            server.service._waiting = 0
        server.until_free()
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    (line,) = [line for line in lines if line["path"] == CHAT]
    assert (line["status"], line["finish"], line["error"]) == (200 if begun else status, "error", status)
