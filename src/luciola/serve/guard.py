"""What stands between the network and the application: keys, web pages of strangers, bodies, the access log.

One ASGI middleware without knowledge of the application behind it. A web page that a person happens to visit can make
the browser call a server on loopback; without a key, requests that come from such a page are refused by their Origin,
and the trick of pointing a foreign name at 127.0.0.1 (DNS rebinding) by their Host.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import logging
import os
import re
import socket
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from luciola.serve.errors import ApiError, shutting_down

LINGER = 2.0  # seconds that a refused client may go on sending, so that it gets to read its refusal
LEFT = 499  # the status of a reply that nobody waited for; nginx' number
LINGER_BYTES = 256 * 2**20
MAX_HELD = 256 * 2**20  # bytes of all bodies held at once
# What a server with keys shows to everyone, beside /static/: /docs is a page, which asks for a key by itself.
OPEN = ("/", "/docs", "/health", "/ready")
WHILE_DRAINING = ("/health", "/ready", "/metrics")

_errors = logging.getLogger("luciola.serve")


@dataclass(frozen=True)
class ServerSettings:
    """How the server meets the network. Times are in seconds, sizes in bytes.

    Raises ValueError for an empty or unprintable key and for a CORS origin that is none.
    """

    host: str = "127.0.0.1"
    port: int = 8000  # 0: a free one
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    allow_unprotected: bool = False  # listen beyond loopback without a key
    allowed_hosts: tuple[str, ...] = ()  # names, beside the machine's own, by which it may be called without a key
    cors: tuple[str, ...] = ()  # origins whose pages may call the server; "*" for all
    max_body: int = 10 * 2**20
    max_connections: int = 2048
    head_timeout: float = 10.0  # from a connection's or request's first moment to the end of its headers
    body_timeout: float = 60.0  # for all of a body
    stall_timeout: float = 10.0  # between two pieces of a body
    write_timeout: float = 60.0  # without the client reading anything of a reply that waits for it
    keep_alive: int = 15  # between two requests on a connection
    drain_seconds: float = 30.0  # that running requests get to finish after SIGTERM
    access_log: bool = True

    def __post_init__(self) -> None:
        for key in self.api_keys:
            if not re.fullmatch(r"[\x21-\x7e]+", key):
                raise ValueError("an API key must be printable ASCII without spaces, at least one character")
        for host in self.allowed_hosts:
            if not re.fullmatch(r"[A-Za-z0-9._-]+", host):
                raise ValueError(f"--allowed-host {host}: expected a name such as box.example, without port and scheme")
        for origin in self.cors:
            parts = urlsplit(origin)
            if origin != "*" and (not parts.scheme or not parts.netloc or parts.path or parts.query or parts.fragment):
                raise ValueError(f"--cors {origin}: expected an origin such as http://localhost:3000, without a path")


def api_keys(given: Sequence[str]) -> tuple[str, ...]:
    """The keys given, else the one in the variable LUCIOLA_API_KEY, else none."""
    return tuple(given) or tuple(key for key in [os.environ.get("LUCIOLA_API_KEY", "")] if key)


def guarded(app: ASGIApp, settings: ServerSettings) -> Guard:
    """`app` behind the guard. `guard.draining = True` has it refuse new requests."""
    return Guard(app, settings)


def log_request(**fields: object) -> None:
    """One line of JSON on standard error; json escapes control characters, so a path cannot begin a line of its own."""
    line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **fields}
    try:
        sys.stderr.write(json.dumps(line, default=str) + "\n")
        sys.stderr.flush()
    except (OSError, ValueError):  # nobody reads the log any more; requests go on
        pass


class Guard:
    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self.draining = False
        self._app, self._settings = app, settings
        self._digests = [hashlib.sha256(key.encode()).digest() for key in settings.api_keys]
        self._names = {"localhost", settings.host.lower(), *_machine_names(), *map(str.lower, settings.allowed_hosts)}
        self._held = 0  # bytes of bodies
        # Called with the status of each reply that is an error, if the application wants to count them.
        self.failed: Callable[[int], None] = getattr(getattr(app, "state", None), "failed", lambda status: None)
        # Outside of the keys, since a browser asks for permission (a preflight request) without sending any.
        self._admitting: ASGIApp = self._admit
        if settings.cors:
            self._admitting = CORSMiddleware(
                self._admit,
                allow_origins=settings.cors,
                allow_methods=("GET", "POST"),
                allow_headers=("*",),
                expose_headers=("x-request-id", "retry-after"),
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id", "")
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", request_id):
            request_id = uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"], state["log"] = request_id, {}
        reply = Reply(send, request_id, self)
        try:
            try:
                self._check(scope, headers)
            except ApiError as refused:
                await _refuse(refused, receive, reply.send)
            else:
                await self._admitting(scope, receive, reply.send)
        except asyncio.CancelledError:
            if not self.draining:
                raise
            error = shutting_down()
            if "finish" in state["log"]:
                state["log"] |= {"finish": "error", "error": error.status}
            await reply.cut_short(error)
        except Exception as error:
            _errors.error("%s %r failed", scope["method"], scope["path"][:256], exc_info=error)
            await reply.cut_short(ApiError("the server failed at this request; its log says why", 500))
        finally:
            if reply.status is not None and reply.status >= 400 and reply.status != LEFT:
                self.failed(reply.status)
            if self._settings.access_log:
                client = scope.get("client")
                line = {
                    "id": request_id,
                    "client": client[0] if client else None,
                    "method": scope["method"],
                    "path": scope["path"][:256],
                    "status": reply.status,
                    "milliseconds": round(1000 * (time.perf_counter() - began), 1),
                    "bytes": reply.bytes,
                }
                log_request(**state["log"] | line | ({} if reply.complete else {"cut": True}))

    def _check(self, scope: Scope, headers: Headers) -> None:
        """What is decided before CORS answers: no browser needs to read these refusals."""
        if scope["http_version"] not in ("1.0", "1.1"):
            raise ApiError("this server speaks HTTP/1.1", 400)
        hosts = headers.getlist("host")
        if len(hosts) > 1 or (not hosts and scope["http_version"] == "1.1"):
            raise ApiError("a request needs exactly one Host header", 400)
        encodings = headers.getlist("transfer-encoding")
        if encodings and (encodings != ["chunked"] or scope["http_version"] == "1.0"):
            # A proxy in front may have understood another length of the body than we do.
            raise ApiError("the only Transfer-Encoding known here is chunked", 400)
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise ApiError("bodies are not unpacked here; send them without Content-Encoding", 415)
        if not self._digests and hosts and not self._is_own_name(hosts[0]):
            raise ApiError(
                "this server answers to IP addresses and to its machine's own names only, since a web page can have "
                "any other name point here; to use another, start it with --allowed-host NAME, or with --api-key",
                403,
            )
        if "\0" in scope["path"]:
            raise ApiError("no path holds a null byte", 404)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Key, origin and body; inside CORS, so that pages may read why they were refused."""
        headers = Headers(scope=scope)
        try:
            if self.draining and scope["path"] not in WHILE_DRAINING:
                raise shutting_down()
            if self._digests:
                if scope["path"] not in OPEN and not scope["path"].startswith("/static/"):
                    self._check_key(headers)
            elif scope["method"] not in ("GET", "HEAD", "OPTIONS"):
                self._check_origin(headers)
            body = await self._read_body(headers, receive)
        except ApiError as refused:
            await _refuse(refused, receive, send)
            return
        try:
            await self._app(scope, _replay(body, receive), send)
        finally:
            self._held -= len(body)

    def _check_key(self, headers: Headers) -> None:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = [key.strip() if scheme.lower() == "bearer" else "", headers.get("x-api-key", "")]
        digests = [hashlib.sha256(each.encode("latin-1")).digest() for each in given]
        # Digests of one length, all of them compared: the time taken tells nothing about any key.
        known = [hmac.compare_digest(digest, own) for digest in digests for own in self._digests]
        if not any(known):
            raise ApiError(
                "this server needs a key: send the header `Authorization: Bearer KEY` (or `X-Api-Key: KEY`) with one "
                "given as --api-key",
                401,
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )

    def _check_origin(self, headers: Headers) -> None:
        origin = headers.get("origin")
        if origin is None or "*" in self._settings.cors or origin in self._settings.cors:
            return
        try:
            own = _host_and_port(f"{urlsplit(origin).scheme}://{headers.get('host', '')}")
            if own is not None and own == _host_and_port(origin):
                return
        except ValueError:
            pass
        raise ApiError(
            f"web pages of {origin[:100]} may not call this server; to let them, start it with --cors ORIGIN", 403
        )

    def _is_own_name(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        name = name.removesuffix(".")
        return name in self._names or name.endswith(".localhost") or _address(name) is not None

    async def _read_body(self, headers: Headers, receive: Receive) -> bytes:
        """All of the body, before the application hears of the request. Raises ApiError."""
        limit, settings = self._settings.max_body, self._settings
        too_large = ApiError(f"the request's body exceeds {limit} bytes", 413)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > limit:
            raise too_large
        pieces: list[bytes] = []
        size, more = 0, True
        deadline = time.monotonic() + settings.body_timeout
        try:
            while more:
                wait = min(settings.stall_timeout, deadline - time.monotonic())
                try:
                    # Not `wait_for`, which takes three turns of the event loop for what is there already.
                    async with asyncio.timeout(max(wait, 0.0)):
                        message = await receive()
                except TimeoutError:
                    raise ApiError("the request's body came too slowly", 408) from None
                if message["type"] == "http.disconnect":
                    raise ApiError("the client left before its body was complete", 400)
                piece, more = message.get("body", b""), message.get("more_body", False)
                size += len(piece)
                self._held += len(piece)
                if size > limit:
                    raise too_large
                if self._held > max(MAX_HELD, limit):
                    raise ApiError(
                        "the server holds too many large requests; try again", 503, headers={"retry-after": "1"}
                    )
                pieces.append(piece)
        except BaseException:
            self._held -= size
            raise
        return b"".join(pieces)

    @property
    def resource_policy(self) -> str:
        return "cross-origin" if self._settings.cors else "same-origin"


class Reply:
    """The reply to one request on its way out: adds headers, and remembers what the access log tells."""

    def __init__(self, send: Send, request_id: str, guard: Guard) -> None:
        self._send, self._request_id, self._guard = send, request_id, guard
        self.status: int | None = None
        self.bytes, self.complete, self._streams_events = 0, False, False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers.setdefault("x-content-type-options", "nosniff")
            headers.setdefault("referrer-policy", "no-referrer")
            headers.setdefault("cross-origin-resource-policy", self._guard.resource_policy)
            headers["x-request-id"] = self._request_id
            if self._guard.draining:
                headers["connection"] = "close"
            self._streams_events = headers.get("content-type", "").startswith("text/event-stream")
        elif message["type"] == "http.response.body":
            self.bytes += len(message.get("body", b""))
            self.complete = not message.get("more_body", False)
        await self._send(message)

    async def cut_short(self, error: ApiError) -> None:
        """End a reply with an error, as far as what has been sent of it allows."""
        if self.status is None:
            body = error.body()
            pairs = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            await self.send({"type": "http.response.start", "status": error.status, "headers": pairs})
            await self.send({"type": "http.response.body", "body": body})
        elif self._streams_events and not self.complete:
            self._guard.failed(error.status)
            await self.send({"type": "http.response.body", "body": b"data: " + error.body() + b"\n\n"})
        # Else uvicorn closes the connection, by which the client sees that the reply is not whole.


async def _refuse(refused: ApiError, receive: Receive, send: Send) -> None:
    body = refused.body()
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    pairs = [(name.encode(), value.encode()) for name, value in {**headers, **(refused.headers or {})}.items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": pairs})
    # The reply is whole with this, and the connection closes when we say so: not with bytes unread, which would reset
    # it, and a client still sending would never see the reply.
    await send({"type": "http.response.body", "body": body, "more_body": True})
    await _discard(receive)
    await send({"type": "http.response.body", "body": b""})


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on `host`."""
    address = _address(host)
    return host == "localhost" or host.endswith(".localhost") or (address is not None and address.is_loopback)


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _machine_names() -> set[str]:
    """What this machine is called in its network; nobody is asked."""
    name = socket.gethostname().lower()
    first = name.partition(".")[0]
    return {name, first, f"{first}.local"} - {"", ".local"}


def _host_and_port(url: str) -> tuple[str, int] | None:
    """Of a web page's or server's URL, else None. Raises ValueError for some URLs that are none."""
    parts = urlsplit(url)
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    return (parts.hostname, port) if parts.hostname and port else None


def _replay(body: bytes, receive: Receive) -> Receive:
    """What the application receives: the body at once, then what `receive` says (that the client has left)."""
    read = False

    async def replay() -> Message:
        nonlocal read
        if read:
            return await receive()
        read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _discard(receive: Receive) -> None:
    size = 0
    try:
        async with asyncio.timeout(LINGER):
            more = True
            while more and size < LINGER_BYTES:
                message = await receive()
                size += len(message.get("body", b""))
                more = message.get("more_body", False)
    except TimeoutError:
        pass
