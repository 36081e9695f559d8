"""Servers in processes of their own, and clients that speak to them in bytes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
import uvicorn

import luciola
from luciola.serve.app import create
from luciola.serve.guard import ServerSettings, guarded
from luciola.serve.service import Service, Settings
from luciola.text.tokenizer import Tokenizer

SMALL_APP = Path(__file__).with_name("small_app.py")


@dataclass
class Live:
    process: subprocess.Popen[str]
    url: str
    log: Path

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def connect(self, timeout: float = 10.0) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout)

    @staticmethod
    def everything(client: socket.socket) -> bytes:
        """All that the server sends until it closes the connection; a reset ends it too."""
        received = b""
        with contextlib.suppress(ConnectionError):
            while piece := client.recv(65536):
                received += piece
        return received

    def ask(self, request: bytes) -> bytes:
        """All that the server answers to these bytes, on a connection of their own."""
        with self.connect() as client:
            with contextlib.suppress(ConnectionError):
                client.sendall(request)
            return self.everything(client)

    def is_well(self) -> bool:
        """Whether a new client is served."""
        return self.ask(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").endswith(b"alive")

    def memory(self) -> int:
        """Bytes resident."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def lines(self) -> list[dict[str, object]]:
        """The access log."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    def end(self, how: int = signal.SIGTERM) -> int:
        """The exit code."""
        self.process.send_signal(how)
        return self.process.wait(20)


@contextlib.contextmanager
def served(folder: Path, environment: dict[str, str] | None = None, **options: object) -> Iterator[Live]:
    """The small application behind the guard, with these `ServerSettings`."""
    log = folder / "stderr"
    process = start(folder, environment, log, **options)
    assert process.stdout is not None
    try:
        ready = process.stdout.readline()
        address = re.search(r"http://\S+:\d+", ready)
        assert address, log.read_text()
        yield Live(process, address.group(), log)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def start(folder: Path, environment: dict[str, str] | None, log: Path, **options: object) -> subprocess.Popen[str]:
    arguments = json.dumps({"port": 0, "static": str(folder), **options})
    source = str(Path(luciola.__file__).parents[1])
    with log.open("w") as errors:
        return subprocess.Popen(
            [sys.executable, SMALL_APP, arguments],
            env={**os.environ, "PYTHONPATH": source, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )


@pytest.fixture(scope="session")
def small_serving() -> Callable[..., contextlib.AbstractContextManager[Live]]:
    """`with small_serving(folder, max_body=1000) as server`: the small application behind the guard, for a block."""
    return served


@pytest.fixture
def small_server(tmp_path: Path) -> Iterator[Callable[..., Live]]:
    """`small_server(max_body=1000)`: the same until the test ends."""
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(served(tmp_path, **options))


ALPHABET = "".join(chr(code) for code in range(32, 127)) + "\n"


@dataclass
class Here:
    """A server in this process."""

    url: str
    service: Service
    client: httpx.Client  # one for all requests of a module: each costs a tenth of a second to make

    @property
    def engine(self) -> luciola.Engine:
        return self.service.engine

    def left_amid(self, body: dict[str, Any], patience: float) -> None:
        """Ask for a reply and leave it: a stream after twenty lines, another after so many seconds."""
        timeout = httpx.Timeout(30, read=patience)
        asked = self.client.stream("POST", "/v1/chat/completions", json=body, timeout=timeout)
        with contextlib.suppress(httpx.ReadTimeout), asked as response:
            for count, _ in enumerate(response.iter_lines()):
                if count == 20:
                    return
            raise AssertionError("the reply was whole before anybody left")

    def until_free(self, seconds: float = 5.0) -> None:
        """Wait until no sequence holds any of the cache; fails if that does not come."""
        deadline = time.monotonic() + seconds
        while self.engine.blocks_used or self.engine.stats["running"] or self.engine.stats["waiting"]:
            assert time.monotonic() < deadline, self.engine.stats
            time.sleep(0.005)


@contextlib.contextmanager
def hosted(
    lm: luciola.LanguageModel,
    guard: ServerSettings | None = None,
    speculate: str | None = None,
    max_cached_tokens: int = 1 << 15,
    **settings: Any,
) -> Iterator[Here]:
    """The server for a model, with these `Settings`, as long as the block lasts."""
    engine = luciola.Engine(lm, dtype="float32", max_cached_tokens=max_cached_tokens, speculate=speculate)
    app = create(lm, engine, Settings(**{"name": "tiny", **settings}))
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        guarded(app, guard or ServerSettings(access_log=False)), log_config=None, ws="none", lifespan="off"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with httpx.Client(base_url=url, timeout=30) as client:
            yield Here(url, app.state.service, client)
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def writer(chain: Callable[..., luciola.LanguageModel]) -> Callable[..., luciola.LanguageModel]:
    """`writer(pieces, context=4096, **tokenizer)`: a model that answers anything with these pieces, each a token of its
    own, and ends. It is sure of each token; led elsewhere by a constraint, it begins again."""

    def make(pieces: Sequence[str], context: int = 4096, **tokenizer: Any) -> luciola.LanguageModel:
        assert len(set(pieces)) == len(pieces) and not any(piece in ALPHABET for piece in pieces)
        tokens = Tokenizer.characters(ALPHABET, added_tokens=["<think>", "</think>", *pieces], **tokenizer)
        ids = [tokens.token_id(piece) for piece in pieces]
        logits_VV = torch.zeros(tokens.vocab_size, tokens.vocab_size)
        logits_VV[:, ids[0]] = 20.0
        for token, following in zip(ids, [*ids[1:], tokens.eos_token_ids[0]], strict=True):
            logits_VV[token, ids[0]], logits_VV[token, following] = 0.0, 20.0
        return chain(logits_VV, tokens, max_position_embeddings=context)

    return make


@pytest.fixture(scope="session")
def hosting() -> Callable[..., contextlib.AbstractContextManager[Here]]:
    """`with hosting(lm, max_queue=3) as server`: a model behind the real application, in this process."""
    return hosted
