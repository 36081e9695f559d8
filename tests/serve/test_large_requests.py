"""Large requests, sound or not: refused or answered in good time, while others are served and memory stays as it is."""

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PAIRS = 300_000


@pytest.fixture(scope="module")
def here(writer: Any, hosting: Any) -> Iterator[Any]:
    with hosting(writer(["fine"], context=256)) as server:
        yield server


def user(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "prompts of two kinds": (TEXT, {"prompt": ["a", {}] * PAIRS}, "prompt"),
    "prompts that are objects": (TEXT, {"prompt": [{}] * PAIRS}, "prompt"),
    "lists of no ids": (TEXT, {"prompt": [["a", {}]] * PAIRS}, "prompt"),
    "many prompts": (TEXT, {"prompt": ["a"] * PAIRS}, "prompt"),
    "empty parts": (CHAT, user([{}] * PAIRS), "messages[0].content"),
    "messages of no kind": (CHAT, {"messages": [{}] * PAIRS}, "messages"),
    "messages that are numbers": (CHAT, {"messages": [5] * PAIRS}, "messages"),
    "a role as long as a book": (CHAT, {"messages": [{"role": "x" * 5_000_000}]}, "messages[0]"),
    "many messages": (CHAT, {"messages": [{"role": "user", "content": "a"}] * 200_000}, "messages"),
    "biases of no numbers": (CHAT, user("a") | {"logit_bias": {f"x{i}": [] for i in range(PAIRS)}}, "logit_bias"),
    "many biases": (CHAT, user("a") | {"logit_bias": {str(i): 1 for i in range(PAIRS)}}, "logit_bias"),
    "stops of no text": (CHAT, user("a") | {"stop": ["a", {}] * PAIRS}, "stop[1]"),
    "tools of no kind": (CHAT, user("a") | {"tools": [{}] * PAIRS}, "tools"),
    "a list for a number": (CHAT, user("a") | {"temperature": ["a" * 100] * 80_000}, "temperature"),
    "choices of no text": (
        CHAT, user("a") | {"structured_outputs": {"choice": [{}] * PAIRS}}, "structured_outputs.choice[0]"
    ),
    "token ids of no numbers": ("/detokenize", {"tokens": ["a", {}] * PAIRS}, "tokens[0]"),
}  # fmt: skip


class Watch:
    """The longest time that a request for /health took, as long as the block lasts."""

    def __init__(self, url: str) -> None:
        self.worst, self._url, self._done = 0.0, url, threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        with httpx.Client(base_url=self._url, timeout=120) as client:
            while not self._done.is_set():
                began = time.perf_counter()
                assert client.get("/health").status_code == 200
                self.worst = max(self.worst, time.perf_counter() - began)
                time.sleep(0.005)


@pytest.mark.parametrize(("path", "body", "field"), WRONG.values(), ids=WRONG.keys())
def test_a_large_request_is_refused_at_its_first_fault(here: Any, path: str, body: dict[str, Any], field: str) -> None:
    content = json.dumps(body).encode()
    process = psutil.Process()
    before = process.memory_info().rss
    with Watch(here.url) as watch:
        reply = here.client.post(path, content=content, headers={"Content-Type": "application/json"}, timeout=120)
    assert reply.status_code == 400, reply.text[:500]
    error = reply.json()["error"]
    assert error["param"].startswith(field) and len(error["message"]) < 600
    assert watch.worst < 1.5  # every fault listed: 4 to 60 seconds
    assert process.memory_info().rss - before < 400 << 20


LONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "a text": (TEXT, {"prompt": "a b " * 2_400_000}, "prompt"),
    "a message": (CHAT, user("a b " * 2_400_000), "messages"),
    "parts": (CHAT, user([{"type": "text", "text": "a b " * 200}] * 9_000), "messages"),
    "messages": (CHAT, {"messages": [{"role": "user", "content": "a b " * 200}] * 9_000}, "messages"),
    "a conversation to tokenise": ("/tokenize", user("a b " * 2_400_000), "messages"),
    "a text to tokenise": ("/tokenize", {"content": "a b " * 2_400_000}, "content"),
}


@pytest.mark.parametrize(("path", "body", "field"), LONG.values(), ids=LONG.keys())
def test_what_no_context_holds_is_not_tokenised(here: Any, path: str, body: dict[str, Any], field: str) -> None:
    content = json.dumps(body).encode()
    began = time.perf_counter()
    with Watch(here.url) as watch:
        reply = here.client.post(path, content=content, headers={"Content-Type": "application/json"}, timeout=120)
    assert reply.status_code == 400 and reply.json()["error"]["param"] == field, reply.text[:500]
    assert watch.worst < 1.5 and time.perf_counter() - began < 8  # tokenised: over 20


def test_a_long_text_is_tokenised_while_others_are_served(here: Any) -> None:
    text = "a b " * (1 << 18)
    with Watch(here.url) as watch:
        reply = here.client.post("/tokenize", json={"content": text, "return_token_strs": True}, timeout=120).json()
    assert reply["count"] == len(text) and "".join(reply["token_strs"]) == text
    assert here.client.post("/detokenize", json={"tokens": reply["tokens"]}).json()["content"] == text
    assert watch.worst < 1.5
