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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

import luciola

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
        return httpx.get(self.url + "/health", timeout=10).text == "alive"

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
def serving() -> Callable[..., contextlib.AbstractContextManager[Live]]:
    """`with serving(folder, max_body=1000) as server`: the small application behind the guard, files in `folder`."""
    return served


@pytest.fixture
def small_server(tmp_path: Path) -> Iterator[Callable[..., Live]]:
    """`small_server(max_body=1000)`: the same until the test ends."""
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(served(tmp_path, **options))
