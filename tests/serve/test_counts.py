"""What /metrics, the usage in replies and the access log say of the same requests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from luciola.serve.guard import ServerSettings

PIECES = ["<think>", "two ", "and ", "two", "</think>", "It ", "is ", "four"]
QUESTION: dict[str, Any] = {"messages": [{"role": "user", "content": "2+2?"}], "temperature": 0}
OFF = {"thinking": {"type": "disabled"}}


@pytest.fixture(scope="module")
def here(writer: Any, hosting: Any) -> Iterator[Any]:
    with hosting(writer(PIECES, context=512), ServerSettings(access_log=True)) as server:
        yield server


def chat(here: Any, **body: Any) -> Any:
    return here.client.post("/v1/chat/completions", json=QUESTION | body)


def counted(here: Any) -> dict[str, float]:
    """The sum of each metric over its labels, and one with its last label where it has two."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(here.client.get("/metrics").text):
        for sample in family.samples:
            name = sample.name.removeprefix("luciola:")
            labels = [value for key, value in sample.labels.items() if key != "model_name"]
            for key in {name, *(f"{name} {label}" for label in labels)}:
                found[key] = found.get(key, 0.0) + sample.value
    return found


class Growth:
    """`with Growth(here) as grown: ...`; then grown["name"] says by how much a metric has grown."""

    def __init__(self, here: Any) -> None:
        self._here = here

    def __enter__(self) -> Growth:
        self._before = counted(self._here)
        return self

    def __exit__(self, *_: object) -> None:
        self._here.until_free()
        self._after = counted(self._here)

    def __getitem__(self, name: str) -> float:
        return self._after.get(name, 0.0) - self._before.get(name, 0.0)


def test_tokens_of_thinking_are_the_same_in_usage_and_metrics(here: Any) -> None:
    with Growth(here) as grown:
        usage = chat(here).json()["usage"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 5
    assert grown["reasoning_tokens_total"] == 5


@pytest.mark.parametrize(
    ("body", "thinking"),
    [
        (OFF, 0),
        ({"messages": [{"role": "assistant", "content": "It "}], "continue_final_message": True}, 0),
        # In the midst of its thinking it thinks on, though nothing opens it there.
        (
            {
                "messages": [{"role": "assistant", "content": "", "reasoning_content": "<two"}],
                "continue_final_message": True,
            },
            3,
        ),
    ],
)
def test_an_end_of_thinking_without_a_beginning_is_no_thinking(
    writer: Any, hosting: Any, body: dict[str, Any], thinking: int
) -> None:
    with hosting(writer(["two ", "and two", "</think>", "four"])) as server:
        reply = chat(server, **body).json()
    assert reply["usage"]["completion_tokens_details"]["reasoning_tokens"] == thinking
    assert ("reasoning" in reply["choices"][0]["message"]) == (thinking > 0)


def test_nor_in_a_text_completion(writer: Any, hosting: Any) -> None:
    with hosting(writer(["two ", "and two", "</think>", "four"])) as server:
        usage = server.client.post("/v1/completions", json={"prompt": "<answer>1", "temperature": 0}).json()["usage"]
    assert usage["completion_tokens"] == 5 and usage["completion_tokens_details"]["reasoning_tokens"] == 0


@pytest.mark.parametrize("streams", [False, True])
def test_who_leaves_is_no_failure_and_what_was_generated_is_logged(
    writer: Any, hosting: Any, streams: bool, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with hosting(writer(PIECES, context=1 << 15), ServerSettings(access_log=True)) as server:
        with Growth(server) as grown:
            body = QUESTION | {"stream": streams, "ignore_eos": True}
            timeout = httpx.Timeout(30, read=2.0)
            with (
                pytest.raises(httpx.ReadTimeout),
                server.client.stream("POST", "/v1/chat/completions", json=body, timeout=timeout) as response,
            ):
                for count, _ in enumerate(response.iter_lines()):
                    if count == 20:
                        raise httpx.ReadTimeout("enough")
            server.until_free(5.0)
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    (line,) = [line for line in lines if line["path"] == "/v1/chat/completions"]
    assert line["status"] == (200 if streams else 499) and line["finish"] == "left"
    assert line["prompt_tokens"] > 0 and line["completion_tokens"] >= 10
    assert not caplog.records
    assert grown["request_failure_total"] == 0


def test_a_prompt_counts_once_however_many_completions_it_has(here: Any) -> None:
    messages = [{"role": "user", "content": "what is two and two, once more and at some length?"}]
    chat(here, messages=messages)
    with Growth(here) as grown:
        usage = chat(here, messages=messages, n=4).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 16
    assert grown["prompt_tokens_total"] == usage["prompt_tokens"] == grown["prefix_cache_queries_total"]
    assert grown["prefix_cache_hits_total"] == usage["prompt_tokens_details"]["cached_tokens"]
    assert grown["generation_tokens_total"] == usage["completion_tokens"]
