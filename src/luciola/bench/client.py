"""A light HTTP client that asks completions servers: it shares the machine with the server that it measures."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any
from urllib.parse import urlsplit

LIMIT = 1 << 24  # bytes of a line or a chunk


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
