"""What /metrics, the usage in replies and the access log say of the same requests."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from luciola.model.language_model import LanguageModel
from luciola.serve.guard import ServerSettings
from luciola.text.tokenizer import Tokenizer

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
    with (
        hosting(writer(PIECES, context=1 << 15), ServerSettings(access_log=True)) as server,
        Growth(server) as grown,
    ):
        body = QUESTION | {"stream": streams, "ignore_eos": True}
        server.left_amid(body, 2.0)
        server.until_free(5.0)
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    (line,) = [line for line in lines if line["path"] == "/v1/chat/completions"]
    assert line["status"] == (200 if streams else 499) and line["finish"] == "left"
    assert line["prompt_tokens"] > 0 and line["completion_tokens"] >= 10
    assert not caplog.records
    assert grown["request_failure_total"] == 0 and grown["request_success_total abort"] == 1


def test_a_prompt_counts_once_however_many_completions_it_has(here: Any) -> None:
    messages = [{"role": "user", "content": "what is two and two, once more and at some length?"}]
    chat(here, messages=messages)
    with Growth(here) as grown:
        usage = chat(here, messages=messages, n=4).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 16
    assert grown["prompt_tokens_total"] == usage["prompt_tokens"] == grown["prefix_cache_queries_total"]
    assert grown["prefix_cache_hits_total"] == usage["prompt_tokens_details"]["cached_tokens"]
    assert grown["generation_tokens_total"] == usage["completion_tokens"]


def test_each_prompt_of_a_request_tells_what_the_cache_had_of_it(here: Any) -> None:
    prompts = ["one text of more than sixteen letters", "and another, which begins in another way"]
    ask = {"prompt": prompts, "n": 2, "max_tokens": 1}
    here.client.post("/v1/completions", json=ask)
    with Growth(here) as grown:
        usage = here.client.post("/v1/completions", json=ask).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 64
    assert grown["prefix_cache_hits_total"] == 64
    assert grown["prompt_tokens_total"] == usage["prompt_tokens"]


def test_a_cache_smaller_than_the_context_is_the_bound_that_clients_see(writer: Any, hosting: Any) -> None:
    with hosting(writer(PIECES, context=512), max_cached_tokens=16) as server:
        assert server.client.get("/v1/models").json()["data"][0]["max_model_len"] == 17
        refused = server.client.post("/v1/completions", json={"prompt": "a" * 17})
        assert refused.status_code == 400 and refused.json()["error"]["code"] == "context_length_exceeded"
        assert "max_cached_tokens" not in refused.text
        longest = server.client.post("/v1/completions", json={"prompt": "a" * 16}).json()
        assert longest["usage"]["completion_tokens"] == 1 and longest["choices"][0]["finish_reason"] == "length"


def test_every_token_but_the_first_has_a_latency_also_those_that_were_guessed(writer: Any, hosting: Any) -> None:
    with hosting(writer(PIECES, context=512), speculate="ngram") as server, Growth(server) as grown:
        usage = chat(server, max_tokens=100, ignore_eos=True).json()["usage"]
    assert usage["completion_tokens_details"]["accepted_prediction_tokens"] > 0
    assert grown["inter_token_latency_seconds_count"] == usage["completion_tokens"] - 1 == 99
    accepted, drafted = (grown[f"spec_decode_num_{what}_tokens_total"] for what in ("accepted", "draft"))
    assert 0 < accepted <= drafted and 0 < grown["spec_decode_num_drafts_total"] < drafted
    assert accepted == usage["completion_tokens_details"]["accepted_prediction_tokens"]


def test_the_times_of_a_request_are_parts_of_its_whole(here: Any) -> None:
    with Growth(here) as grown:
        usage = chat(here, n=2, messages=[{"role": "user", "content": "a prompt that is new to the cache"}]).json()[
            "usage"
        ]
    queue, prefill, inference, decode, whole = (
        grown[f"{name}_seconds_sum"]
        for name in (
            "request_queue_time",
            "request_prefill_time",
            "request_inference_time",
            "request_decode_time",
            "e2e_request_latency",
        )
    )
    for name in ("request_queue_time", "request_prefill_time", "request_inference_time"):
        assert grown[f"{name}_seconds_count"] == 2
    assert min(queue, prefill, decode) > 0
    assert prefill + decode == pytest.approx(inference)
    assert queue + inference <= whole
    # The end token is drawn, but never read.
    assert grown["iteration_tokens_total_sum"] == usage["prompt_tokens"] + usage["completion_tokens"] - 2
    assert grown["iteration_tokens_total_count"] == grown["iterations_total"] == usage["completion_tokens"] / 2


def test_every_refusal_is_counted_by_its_status(writer: Any, hosting: Any) -> None:
    guard = ServerSettings(access_log=False, max_body=1000)
    with hosting(writer(PIECES, context=512), guard) as server, Growth(server) as grown:
        assert chat(server, temperature=-1).status_code == 400
        assert chat(server, model="other").status_code == 404
        assert server.client.get("/nowhere").status_code == 404
        assert server.client.get("/tokenize").status_code == 405
        assert server.client.post("/tokenize", content=b"x" * 2000).status_code == 413
        assert server.client.post("/tokenize", content="hello", headers={"Content-Type": "text/csv"}).status_code == 415
        assert server.client.post("/tokenize", json={}, headers={"Origin": "http://evil"}).status_code == 403
        assert chat(server, stream=True, messages=[{"role": "user", "content": "a" * 600}]).status_code == 400
        assert chat(server).status_code == 200
    assert grown["request_failure_total"] == 8
    assert [grown[f"request_failure_total {status}"] for status in (400, 403, 404, 405, 413, 415)] == [2, 1, 2, 1, 1, 1]


def test_a_wrong_key_is_counted_and_a_time_that_is_over_once(writer: Any, hosting: Any) -> None:
    guard = ServerSettings(access_log=False, api_keys=("k",))
    with hosting(writer(PIECES, context=1 << 15), guard, request_seconds=0.3) as server:
        assert server.client.get("/metrics").status_code == 401
        server.client.headers["X-Api-Key"] = "k"
        assert counted(server)["request_failure_total 401"] == 1
        with Growth(server) as grown:
            for streams in (False, True):
                assert "0.3 seconds" in chat(server, ignore_eos=True, stream=streams).text
    assert grown["request_failure_total 504"] == grown["request_failure_total"] == 2
    assert grown["request_success_total abort"] == 2


def test_probes_may_ask_by_head(here: Any) -> None:
    for path in ("/", "/health", "/ready"):
        reply = here.client.head(path)
        assert reply.status_code == 200 and not reply.content


def test_the_load_of_experts_by_layer(hosting: Any, tiny: dict[str, Any]) -> None:
    tokenizer = Tokenizer.characters("abc")
    with hosting(LanguageModel.create(tiny | {"vocab_size": tokenizer.vocab_size}, tokenizer)) as server:
        server.client.post("/v1/completions", json={"prompt": "abcab", "max_tokens": 7, "ignore_eos": True})
        server.until_free()
        text = server.client.get("/metrics").text
    for layer in (1, 2):
        rows = re.findall(
            rf'^luciola:expert_load_bucket\{{layer="{layer}",le="(\S+)",model_name=".*"\}} (.*)$', text, re.M
        )
        assert [bound for bound, _ in rows] == ["0.0", "1.0", "2.0", "3.0", "4.0", "5.0", "+Inf"]
        counts = [float(count) for _, count in rows]
        assert counts == sorted(counts)
        assert counts[-1] == counts[-2] == 2 * (5 + 7 - 1)  # the last token drawn is not computed
