"""The clients of the comparison of servers, against one that says what it is told to, and its arithmetic."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socketserver
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from luciola.bench import serve
from luciola.bench.client import events, post
from luciola.bench.turns import Turn


@contextlib.contextmanager
def answering(pieces: list[bytes], head: bytes, asked: list[dict[str, Any]]) -> Iterator[str]:
    """A server that answers every request with these pieces; what it is asked is noted. Its address."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            assert self.rfile.readline() == b"POST /v1/completions HTTP/1.1\r\n"
            length = 0
            while (line := self.rfile.readline().lower()) != b"\r\n":
                length = int(line.split()[1]) if line.startswith(b"content-length:") else length
            asked.append(json.loads(self.rfile.read(length)))
            with contextlib.suppress(ConnectionError):
                for piece in [head, *pieces]:
                    self.wfile.write(piece)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunked(text: bytes, size: int) -> list[bytes]:
    """HTTP chunks of so many bytes each, wherever an event ends."""
    parts = [text[i : i + size] for i in range(0, len(text), size)]
    return [b"%x\r\n%s\r\n" % (len(part), part) for part in [*parts, b""]]


def stream(*chunks: dict[str, Any], end: str = "\n\n") -> bytes:
    return "".join(f"data: {text}{end}" for text in [*map(json.dumps, chunks), "[DONE]"]).encode()


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("end", ["\n\n", "\r\n\r\n"])
def test_a_round_asks_each_prompt_once_and_counts_what_the_server_counts(size: int, end: str) -> None:
    usage = {"choices": [], "usage": {"completion_tokens": 7}}
    text = stream({"choices": [{"text": "ä"}]}, {"choices": [{"text": "data: b"}]}, usage, end=end)
    prompts, asked = [[1, 2], [3], [4, 5, 6]], []
    with answering(chunked(text, size), CHUNKED, asked) as url:
        said = serve.asking(url, [prompts], clients=2, new_tokens=7)()
    assert said["tokens"] == 21 and len(said["first"]) == 3
    assert sorted(body["prompt"] for body in asked) == prompts
    assert all(body["max_tokens"] == 7 and body["ignore_eos"] and body["stream"] for body in asked)


def test_a_server_that_breaks_off_or_refuses_is_no_result() -> None:
    with (
        answering(chunked(b'data: {"choices": []}\n\n', 100), CHUNKED, []) as url,
        pytest.raises(ConnectionError, match="DONE"),
    ):
        serve.asking(url, [[[1]]], clients=1, new_tokens=2)()
    with answering([], CHUNKED + b"5\r\nab", []) as url, pytest.raises(asyncio.IncompleteReadError):
        serve.asking(url, [[[1]]], clients=1, new_tokens=2)()
    body = b'{"error": "no such model"}'
    head = b"HTTP/1.1 404 Not Found\r\nContent-Length: %d\r\n\r\n" % len(body)
    with answering([body], head, []) as url, pytest.raises(RuntimeError, match=r"404.*no such model"):
        serve.asking(url, [[[1]]], clients=1, new_tokens=2)()


def test_a_client_may_leave_a_stream() -> None:
    endless = chunked(stream(*[{"n": i} for i in range(10_000)]), 50)

    async def two_events(url: str) -> list[bytes]:
        read: list[bytes] = []
        async with post(f"{url}/v1/completions", {}) as (_, pieces):
            async for event in events(pieces):
                read.append(event)
                if len(read) == 2:
                    break
        return read

    with answering(endless, CHUNKED, []) as url:
        assert asyncio.run(two_events(url)) == [b'{"n": 0}', b'{"n": 1}']


def test_the_best_of_ours_is_set_beside_the_peer() -> None:
    def taken(*seconds: float, tokens: int = 100) -> list[Turn]:
        return [Turn(s, {"tokens": tokens, "first": [s / 10, s / 5]}) for s in seconds]

    turns = {"int8": taken(1.0, 2.0, 1.0), "keep": taken(3.0, 3.0, 3.0), "llama.cpp": taken(2.0, 3.0, 4.0)}
    found = serve.standings(turns, ["int8", "keep"], "llama.cpp")
    assert found["best"] == "int8"
    assert (found["ratio"], found["ratio_lowest"], found["ratio_highest"]) == (2.0, 1.5, 4.0)
    assert found["tokens_per_second"] == {"int8": 100.0, "keep": 100 / 3, "llama.cpp": 100 / 3}
    assert found["first_token_p50"]["llama.cpp"] == pytest.approx(0.4)
    assert found["first_token_p99"]["llama.cpp"] == pytest.approx(0.8)
    turns["keep"] = taken(3.0, 3.0, 3.0, tokens=99)
    with pytest.raises(RuntimeError, match="different numbers"):
        serve.standings(turns, ["int8", "keep"], "llama.cpp")
