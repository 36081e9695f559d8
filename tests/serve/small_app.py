"""A small application behind the real guard, in a process of its own: `python small_app.py '{"port": 0, ...}'`."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from luciola.serve.guard import ServerSettings, api_keys
from luciola.serve.server import run

MEBIBYTE = b"x" * 2**20


async def health(request: Request) -> PlainTextResponse:
    return PlainTextResponse("alive")


async def ready(request: Request) -> PlainTextResponse:
    return PlainTextResponse("", 503 if request.app.state.draining else 200)


async def echo(request: Request) -> JSONResponse:
    body = await request.body()
    request.state.log["prompt_tokens"] = len(body)
    return JSONResponse({"length": len(body), "start": body[:50].decode("latin-1")})


async def count(request: Request) -> StreamingResponse:
    """Events 0, 1, 2...: `n` of them, one every `wait` seconds."""
    n, wait = int(request.query_params.get("n", 3)), float(request.query_params.get("wait", 0.01))

    async def events() -> AsyncIterator[str]:
        for i in range(n):
            yield f"data: {i}\n\n"
            await asyncio.sleep(wait)

    return StreamingResponse(events(), media_type="text/event-stream")


async def forever(request: Request) -> StreamingResponse:
    """One event, and then none."""
    state = request.app.state

    async def events() -> AsyncIterator[bytes]:
        state.running += 1
        try:
            yield b"data: 0\n\n"
            await asyncio.Event().wait()
        finally:
            state.running -= 1

    return StreamingResponse(events(), media_type="text/event-stream")


async def flood(request: Request) -> StreamingResponse:
    """Bytes without end; `/v1/left` tells how many such replies are still being written."""
    state = request.app.state

    async def pieces() -> AsyncIterator[bytes]:
        state.running += 1
        try:
            while True:
                yield MEBIBYTE
                await asyncio.sleep(0)
        finally:
            state.running -= 1

    return StreamingResponse(pieces())


async def left(request: Request) -> JSONResponse:
    return JSONResponse(request.app.state.running)


async def wait(request: Request) -> PlainTextResponse:
    """Looks again and again whether the client has left, as an answer that is no stream does."""
    until = time.monotonic() + float(request.query_params["seconds"])
    while time.monotonic() < until and not await request.is_disconnected():
        await asyncio.sleep(0.02)
    return PlainTextResponse("waited")


async def fail(request: Request) -> PlainTextResponse:
    raise RuntimeError("as asked")


async def busy(request: Request) -> PlainTextResponse:
    """A thread of pure Python beside the event loop, as the engine's is in the worst case."""

    def spin() -> None:
        total = 0
        while True:
            total += 1

    threading.Thread(target=spin, daemon=True).start()
    return PlainTextResponse("busy")


def create(static: Path) -> Starlette:
    app = Starlette(
        routes=[
            Route("/", health),
            Route("/health", health),
            Route("/ready", ready),
            Route("/v1/echo", echo, methods=["POST", "GET"]),
            Route("/v1/count", count),
            Route("/v1/forever", forever),
            Route("/v1/flood", flood),
            Route("/v1/left", left),
            Route("/v1/wait", wait),
            Route("/v1/fail", fail),
            Route("/v1/busy", busy),
            Mount("/static", StaticFiles(directory=static)),
        ]
    )
    app.state.draining, app.state.running = False, 0
    return app


if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    static = Path(options.pop("static"))
    keys = api_keys(options.pop("api_keys", ()))
    try:
        run(create(static), ServerSettings(api_keys=keys, **options), "small")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
