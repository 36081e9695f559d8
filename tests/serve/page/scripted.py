"""A server with the routes of Luciola's whose answers are written down beforehand, so that a test of the page decides
what comes, when, and what goes wrong. `python tests/serve/page/scripted.py` serves it for work on the page."""

import asyncio
import itertools
import json
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

import luciola.serve

STATIC = Path(luciola.serve.__file__).parent / "static"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclass
class Reply:
    """What one chat completion does: stream `thinking` and `content` in pieces, `delay` seconds apart, and then end,
    or break off, hang, send an error; or be refused with `status` at once."""

    content: str = "Hello."
    thinking: str = ""
    delay: float = 0.0
    piece: int = 0  # characters a piece; 0: words
    end: str = "stop"  # a finish reason, "break", "hang" or "error"
    status: int = 200
    message: str = "no"
    code: str | None = None
    type: str = "server_error"  # of an error amid the stream
    headers: dict[str, str] = field(default_factory=dict)


class Scripted:
    """Replies are taken from `replies` in turn, then `default` for ever; every request's body is kept in `asked`."""

    def __init__(self, port: int = 0) -> None:
        self.port = port or _free_port()
        self.replies: list[Reply] = []
        self.default: Reply | Callable[[dict[str, Any]], Reply] = Reply()
        self.asked: list[dict[str, Any]] = []
        self.gone: list[str] = []  # requests whose client left before the end
        self.controls: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.key: str | None = None
        self.name = "glow-1b"
        self.model: dict[str, Any] = {"thinks": True, "system": "", "history": True, "temperature": 0.6, "top_p": 0.95}
        self.description: dict[str, Any] = {}
        self._ended: set[str] = set()  # ids whose thinking was told to end
        self._ids = itertools.count()
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def start(self) -> None:
        config = uvicorn.Config(
            self._app(), port=self.port, log_level="critical", timeout_graceful_shutdown=0, lifespan="off"
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def stop(self) -> None:
        """Ends as a killed process does: open streams are cut."""
        assert self._server and self._thread
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()
        self._server = None

    def _app(self) -> Starlette:
        guarded = self._guarded
        routes = [
            Route("/", self._page),
            Route("/docs", self._docs),
            Mount("/static", StaticFiles(directory=STATIC)),
            Route("/health", self._well),
            Route("/ready", self._well),
            Route("/metrics", guarded(self._metrics)),
            Route("/openapi.json", guarded(self._description)),
            Route("/v1/models", guarded(self._models)),
            Route("/v1/chat/completions", guarded(self._chat), methods=["POST"]),
            Route("/v1/chat/completions/control", guarded(self._control), methods=["POST"]),
        ]
        return Starlette(routes=[Mount("/below", routes=routes), *routes])  # also as behind a proxy that adds a path

    def _guarded(self, handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def check(request: Request) -> Response:
            self.paths.append(request.url.path)
            if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
                return _error(401, "This server wants an API key.", "invalid_api_key")
            return await handler(request)

        return check

    async def _page(self, request: Request) -> Response:
        return FileResponse(STATIC / "index.html", headers={"Content-Security-Policy": POLICY})

    async def _docs(self, request: Request) -> Response:
        return FileResponse(STATIC / "docs.html", headers={"Content-Security-Policy": POLICY})

    async def _description(self, request: Request) -> Response:
        return JSONResponse(self.description)

    async def _well(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _metrics(self, request: Request) -> Response:
        return PlainTextResponse(
            '# TYPE luciola:kv_cache_usage_perc gauge\nluciola:kv_cache_usage_perc{model_name="glow"} 0.42\n'
        )

    async def _models(self, request: Request) -> Response:
        model = {
            "id": self.name,
            "object": "model",
            "owned_by": "luciola",
            "max_model_len": 4096,
            "luciola": self.model,
        }
        return JSONResponse({"object": "list", "data": [model]})

    async def _control(self, request: Request) -> Response:
        body = await request.json()
        self.controls.append(body)
        self._ended.add(body["id"])
        return JSONResponse({"id": body["id"]})

    async def _chat(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append(body)
        reply = self.replies.pop(0) if self.replies else self.default
        if callable(reply):
            reply = reply(body)
        if reply.status != 200:
            return _error(reply.status, reply.message, reply.code, reply.headers)
        identity = f"chatcmpl-{next(self._ids)}"
        return StreamingResponse(self._stream(identity, reply), media_type="text/event-stream")

    async def _stream(self, identity: str, reply: Reply) -> AsyncIterator[str]:
        def chunk(delta: dict[str, Any], finish: str | None = None) -> str:
            choice = {"index": 0, "delta": delta, "finish_reason": finish}
            return _event({"id": identity, "object": "chat.completion.chunk", "model": self.name, "choices": [choice]})

        try:
            yield chunk({"role": "assistant", "content": ""})
            thoughts, words = _pieces(reply.thinking, reply.piece), _pieces(reply.content, reply.piece)
            for piece in thoughts:
                if identity in self._ended:
                    break
                yield chunk({"reasoning_content": piece, "reasoning": piece})
                await asyncio.sleep(reply.delay)
            for piece in words:
                yield chunk({"content": piece})
                await asyncio.sleep(reply.delay)
            if reply.end == "break":
                return
            if reply.end == "hang":
                await asyncio.sleep(3600)
            if reply.end == "error":
                error = {"message": reply.message, "type": reply.type, "param": None, "code": reply.code}
                yield _event({"error": error})
                return
            yield chunk({}, reply.end)
            usage = {
                "prompt_tokens": 120,
                "completion_tokens": len(thoughts) + len(words),
                "prompt_tokens_details": {"cached_tokens": 96},
            }
            yield _event({"id": identity, "choices": [], "usage": usage})
            yield "data: [DONE]\n\n"
        except (asyncio.CancelledError, GeneratorExit):
            self.gone.append(identity)
            raise


def _pieces(text: str, size: int) -> list[str]:
    return re.findall(rf"[\s\S]{{1,{size}}}" if size else r"\s*\S+\s*?|\s+$", text)


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _error(status: int, message: str, code: str | None, headers: dict[str, str] | None = None) -> Response:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return JSONResponse({"error": error}, status, headers)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    server = Scripted(8123)
    server.default = Reply("A **bold** answer with $x^2$.", "Let me think about it.", delay=0.1)
    server.start()
    print(server.url)
    threading.Event().wait()
