"""Servers in processes of their own, and a light HTTP client, for it shares the machine with the server it measures."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

LIMIT = 1 << 24  # bytes of a line or a chunk
END_SECONDS = 60.0


@contextlib.contextmanager
def served(model: str, log: Path, *options: str) -> Iterator[tuple[str, int]]:
    """`luciola serve MODEL` with these options at a free port, as long as the block lasts: its address and process id.
    What it writes on standard error goes to `log`.

    Raises:
        RuntimeError: it does not start, or ends with another exit code than 0.
    """
    command = [sys.executable, "-m", "luciola", "serve", model, "--port", "0", *options]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
    try:
        assert process.stdout is not None
        address = re.search(r"http://\S+:\d+", process.stdout.readline())
        if address is None:
            code = process.wait(END_SECONDS)
            raise RuntimeError(f"luciola serve {model} did not start, exit code {code}: {log.read_text()}")
        yield address[0], process.pid
        process.terminate()
        code = process.wait(END_SECONDS)
        if code != 0:
            raise RuntimeError(f"luciola serve {model} ended with exit code {code}: {log.read_text()[-2000:]}")
    finally:
        process.kill()
        process.communicate()


@contextlib.asynccontextmanager
async def post(url: str, body: Mapping[str, Any]) -> AsyncIterator[tuple[int, AsyncGenerator[bytes, None]]]:
    """The status of the reply, and its body piece by piece as it arrives. Left early, the connection is closed at once.

    Raises:
        ConnectionError, asyncio.IncompleteReadError: the server broke off.
    """
    parts, data = urlsplit(url), json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=LIMIT)
    try:
        head = f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data)
        start = (await reader.readuntil(b"\r\n\r\n")).lower()
        async with contextlib.aclosing(_pieces(reader, start)) as pieces:
            yield int(start.split(None, 2)[1]), pieces
    finally:
        writer.transport.abort()


async def _pieces(reader: asyncio.StreamReader, head: bytes) -> AsyncGenerator[bytes, None]:
    headers = dict(line.partition(b": ")[::2] for line in head.split(b"\r\n"))
    if b"content-length" in headers:
        yield await reader.readexactly(int(headers[b"content-length"]))
        return
    while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
        yield (await reader.readexactly(size + 2))[:-2]


async def events(pieces: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """The data of server-sent events, each a line, up to the one that says [DONE].

    Raises:
        ConnectionError: the stream ends without it.
    """
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data: "):
                data = line[6:].rstrip(b"\r")
                if data == b"[DONE]":
                    return
                yield data
    raise ConnectionError("a stream ended without [DONE]")
