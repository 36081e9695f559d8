"""Text completions, token ids in and out, scores of prompts, and the routes around them."""

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import luciola
from luciola.text.bpe import train_bpe

PIECES = ["one ", "two ", "three ", "€5 ", "end"]


@pytest.fixture(scope="module")
def here(writer: Any, hosting: Any) -> Iterator[Any]:
    with hosting(writer(PIECES, context=512)) as server:
        yield server


def complete(here: Any, **body: Any) -> Any:
    return here.client.post("/v1/completions", json={"prompt": "count: ", "temperature": 0} | body)


def test_a_text_is_gone_on_from_as_it_is(here: Any) -> None:
    reply = complete(here).json()
    assert reply["object"] == "text_completion"
    assert reply["choices"][0]["text"] == "".join(PIECES) and reply["choices"][0]["finish_reason"] == "stop"


def test_sixteen_tokens_unless_asked_otherwise(here: Any) -> None:
    assert complete(here, ignore_eos=True).json()["usage"]["completion_tokens"] == 16


def test_several_prompts_as_texts_and_as_ids(here: Any) -> None:
    ids = here.service.tokenizer.encode("count: ")
    texts = complete(here, prompt=["count: ", "b"], n=2).json()
    assert [choice["index"] for choice in texts["choices"]] == [0, 1, 2, 3]
    assert complete(here, prompt=ids).json()["choices"][0]["text"] == texts["choices"][0]["text"]
    assert len(complete(here, prompt=[ids, [5]]).json()["choices"]) == 2


def test_token_ids_in_the_reply_lead_to_the_same_text(here: Any) -> None:
    choice = complete(here, return_token_ids=True).json()["choices"][0]
    assert choice["prompt_token_ids"] == here.service.tokenizer.encode("count: ")
    assert here.service.tokenizer.decode(choice["token_ids"]) == choice["text"]


def test_a_stream_says_the_same(here: Any) -> None:
    body = {"prompt": ["a", "b"], "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    texts = {0: "", 1: ""}
    with here.client.stream("POST", "/v1/completions", json=body) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    chunks = [json.loads(line) for line in lines]
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == {0: "".join(PIECES), 1: "".join(PIECES)}
    assert chunks[-1]["usage"]["completion_tokens"] == 12


def test_echo_scores_the_prompt_as_the_model_does(here: Any) -> None:
    choice = complete(here, prompt="one two three ", echo=True, logprobs=2, max_tokens=0).json()["choices"][0]
    assert choice["text"] == "one two three " and choice["finish_reason"] == "length"
    table = choice["logprobs"]
    assert table["tokens"] == ["one ", "two ", "three "] and table["text_offset"] == [0, 4, 8]
    ids = here.service.tokenizer.encode("one two three ")
    with torch.no_grad():
        logp_TV = here.engine.model(torch.tensor([ids]))[0].log_softmax(-1)
    witness = [logp_TV[i, token].item() for i, token in enumerate(ids[1:])]
    assert table["token_logprobs"][0] is None
    assert table["token_logprobs"][1:] == pytest.approx(witness, abs=1e-4)
    assert table["top_logprobs"][0] is None and next(iter(table["top_logprobs"][1])) == "two "


def test_echo_with_a_continuation_and_without_scores(here: Any) -> None:
    both = complete(here, echo=True, logprobs=1, max_tokens=2).json()["choices"][0]
    assert both["text"] == "count: one two " and "".join(both["logprobs"]["tokens"]) == both["text"]
    assert all(len(both["logprobs"][key]) == len(both["logprobs"]["tokens"]) for key in both["logprobs"])
    assert complete(here, echo=True, max_tokens=2).json()["choices"][0]["text"] == "count: one two "


def test_prompt_logprobs_by_token_id(here: Any) -> None:
    places = complete(here, prompt_logprobs=1).json()["choices"][0]["prompt_logprobs"]
    ids = here.service.tokenizer.encode("count: ")
    assert len(places) == len(ids) and places[0] is None
    for token, place in zip(ids[1:], places[1:], strict=True):
        assert math.isfinite(place[str(token)]["logprob"]) and len(place) in (1, 2)


def test_a_seed_makes_the_same_text_again(here: Any) -> None:
    one, other, third = (
        complete(here, temperature=100.0, seed=seed).json()["choices"][0]["text"] for seed in (7, 7, 8)
    )
    assert one == other != third


def test_tokenize_and_detokenize_are_each_others_inverse(here: Any) -> None:
    reply = here.client.post("/tokenize", json={"prompt": "two €5 ", "return_token_strs": True}).json()
    assert reply["count"] == len(reply["tokens"]) and reply["max_model_len"] == 512
    assert "".join(reply["token_strs"]) == "two €5 "
    assert here.client.post("/tokenize", json={"content": "two €5 "}).json()["tokens"] == reply["tokens"]
    back = here.client.post("/detokenize", json={"tokens": reply["tokens"]}).json()
    assert back == {"prompt": "two €5 ", "content": "two €5 "}


def test_models_health_and_docs(here: Any) -> None:
    listed = here.client.get("/v1/models").json()
    assert listed["data"][0]["id"] == "tiny" and listed["data"][0]["max_model_len"] == 512
    assert here.client.get("/v1/models/tiny").json() == listed["data"][0]
    assert here.client.get("/v1/models/other").status_code == 404
    assert here.client.get("/health").status_code == here.client.get("/ready").status_code == 200
    assert here.client.get("/openapi.json").json()["paths"]["/v1/chat/completions"]
    assert "Content-Security-Policy" in here.client.get("/docs").headers


def test_metrics_count_what_was_served(here: Any) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    def values() -> dict[str, float]:
        families = text_string_to_metric_families(here.client.get("/metrics").text)
        found: dict[str, float] = {}
        for sample in (sample for family in families for sample in family.samples):
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
        return found

    before = values()
    complete(here, n=2)
    after = values()
    assert after["luciola:generation_tokens_total"] - before["luciola:generation_tokens_total"] == 12
    assert after["luciola:request_success_total"] - before["luciola:request_success_total"] == 2
    assert after["luciola:time_to_first_token_seconds_count"] > before["luciola:time_to_first_token_seconds_count"]
    assert after["luciola:num_requests_running"] == 0 and 0 <= after["luciola:kv_cache_usage_perc"] <= 1


@pytest.fixture(scope="module")
def spelled(tiny: dict[str, Any]) -> luciola.LanguageModel:
    """A model over bytes: every character beyond ASCII takes several tokens."""
    tokenizer = train_bpe(["Hi, hello"], 300)
    shape = tiny | {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 256}
    return luciola.LanguageModel.create(shape, tokenizer)


@pytest.mark.parametrize("as_ids", [False, True])
def test_an_echo_is_the_prompt_as_given_and_offsets_count_its_characters(
    spelled: luciola.LanguageModel, hosting: Any, as_ids: bool
) -> None:
    text = "<｜User｜>Hi 🦊€<｜end▁of▁sentence｜>\n"
    assert spelled.tokenizer is not None
    ids = spelled.tokenizer.encode(text)
    assert len(ids) > len("<｜") + 4
    with hosting(spelled) as server:
        asked = {"prompt": ids if as_ids else text, "echo": True, "logprobs": 1, "max_tokens": 3, "seed": 1}
        choice = server.client.post("/v1/completions", json=asked).json()["choices"][0]
        bare = server.client.post("/v1/completions", json=asked | {"logprobs": None}).json()["choices"][0]
    assert choice["text"].startswith(text) and bare["text"].startswith(text)
    offsets, tokens = choice["logprobs"]["text_offset"], choice["logprobs"]["tokens"]
    assert len(offsets) == len(tokens) == len(ids) + 3
    for offset, token in zip(offsets[: len(ids)], tokens, strict=False):
        if token.startswith("bytes:"):
            assert choice["text"][offset] in "🦊€"
        else:
            assert choice["text"].startswith(token, offset)
    assert offsets[len(ids)] == len(text) and offsets == sorted(offsets)


def test_a_bos_token_that_is_put_in_front_is_not_echoed(here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, encode = here.service.tokenizer, here.service.tokenizer.encode
    monkeypatch.setattr(
        type(tokenizer), "encode", lambda self, text, begin=False: [tokenizer.bos_token_id] * begin + encode(text)
    )
    choice = complete(here, echo=True, logprobs=0, max_tokens=2).json()["choices"][0]
    assert choice["text"] == "count: one two "
    assert choice["logprobs"]["text_offset"][:3] == [0, 0, 1] and choice["logprobs"]["text_offset"][-2:] == [7, 11]
