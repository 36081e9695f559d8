"""One client's connection: uvicorn's httptools protocol, with bounds on what a client may send and how long it takes.

httptools keeps a header until it is complete, however long it grows, and uvicorn waits for a request's head for ever.
Here a head has a size and a deadline, a client that reads nothing of its reply is let go, and when connections run out
the one that has said nothing for longest makes room.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from luciola.serve.errors import ApiError
from luciola.serve.guard import LINGER, ServerSettings, log_request

MAX_HEAD = 32 * 1024  # bytes of a request line with its headers, and of anything else that is no body
MAX_PIPELINED = 64  # requests on one connection that wait for the reply to an earlier one
MAX_WAITING = 512 * 1024  # bytes of their bodies


class Connection(HttpToolsProtocol):
    """`silent` is shared by all connections: those that owe us a request or a part of it, the longest so first.

    `most` bounds the number of connections, as the settings do.
    """

    def __init__(self, settings: ServerSettings, silent: dict[Connection, None], most: int, **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self._settings, self._silent = settings, silent
        self._most = min(settings.max_connections, most)
        self._unparsed = 0  # bytes read since the parser last handed on a head or a piece of a body
        self._refused = False
        self._answering: RequestResponseCycle | None = None  # `cycle` is the latest request; this one, the earliest
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._most:
            if not self._silent:
                self._write_refusal(503, "too many connections are open; try again later")
                transport.close()
                return
            longest_silent = next(iter(self._silent))
            del self._silent[longest_silent]
            longest_silent.transport.abort()
        self._silent[self] = None
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timers()
        self._silent.pop(self, None)
        self._forget_reply()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._unparsed += len(data)
        if self._head_timer is None and self._answering is None:
            self._start_head_timer()  # the next request on a connection kept alive
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._decline_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self.refuse(400, "this is not a valid HTTP request")
        if self._unparsed > MAX_HEAD:
            self._refuse_head()

    def on_headers_complete(self) -> None:
        # All of the head may have come in one read that was larger than what is allowed.
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > MAX_HEAD:
            self._refuse_head()
            raise ValueError("refused")  # stops the parser
        if len(self.pipeline) >= MAX_PIPELINED:
            self.refuse(400, f"more than {MAX_PIPELINED} requests wait on this connection; await replies first")
            raise ValueError("refused")
        if self._is_upgrade():
            return  # it is declined, and the request parsed again as an ordinary one
        waiting = len(self.pipeline)
        super().on_headers_complete()
        if len(self.pipeline) == waiting:
            self._answering = self.cycle
        else:
            self.flow.resume_reading()  # which uvicorn has paused; but only who reads sees that a client leaves
        self._unparsed = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def on_body(self, body: bytes) -> None:
        self._unparsed = 0
        super().on_body(body)
        if sum(len(cycle.body) for cycle, _ in self.pipeline) > MAX_WAITING:
            self.refuse(400, f"more than {MAX_WAITING} bytes of bodies wait on this connection; await replies first")
            raise ValueError("refused")

    def on_message_complete(self) -> None:
        if not self._is_upgrade():
            super().on_message_complete()
            self._silent.pop(self, None)

    def _is_upgrade(self) -> bool:
        return bool(self.parser.should_upgrade()) and self.parser.get_method() != b"CONNECT"

    def _decline_upgrade(self, rest: bytes) -> None:
        """Parse a request that offers another protocol once more, without the offer, and then what came after its head.

        Java's HTTP client offers HTTP/2 with its requests, and httptools would take their bodies for HTTP/2.
        """
        kept = [pair for pair in self.headers if pair[0] not in (b"upgrade", b"connection", b"http2-settings")]
        line = b"%s %s HTTP/1.1\r\n" % (self.parser.get_method(), self.url)
        head = line + b"".join(b"%s: %s\r\n" % pair for pair in kept) + b"\r\n"
        self.parser = httptools.HttpRequestParser(self)
        self.data_received(head + rest)

    def on_response_complete(self) -> None:
        self._answering = self.pipeline[-1][0] if self.pipeline else None
        super().on_response_complete()
        if self.transport.is_closing():  # as soon as the client has read the reply's end
            self._start_write_timer()
        elif self._answering is None:
            self._silent[self] = None

    def timeout_keep_alive_handler(self) -> None:
        self.transport.abort()  # what has not been read of an earlier reply does not hold the connection

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_write_timer()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def refuse(self, status: int, message: str) -> None:
        """Answer bytes that make no request, and close; nothing more of what the client sends is parsed."""
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        self._stop_timers()
        self._silent.pop(self, None)
        self.pipeline.clear()
        if self._answering is not None and self._answering.response_started:
            self.transport.abort()  # an answer now would land in the midst of another
            return
        self._forget_reply()
        self._write_refusal(status, message)
        # Closing with bytes unread resets the connection, and a client still sending would never see the answer: so
        # read on for a moment, and throw away.
        self.transport.write_eof()
        self.flow.resume_reading()
        self._head_timer = self.loop.call_later(LINGER, self.transport.abort)

    def _forget_reply(self) -> None:
        """Tell the application that nobody waits for the reply it is at."""
        if self._answering is not None:
            self._answering.disconnected = True
            self._answering.message_event.set()

    def _refuse_head(self) -> None:
        self.refuse(431, f"the request's line and headers exceed {MAX_HEAD} bytes")

    def _write_refusal(self, status: int, message: str) -> None:
        body = ApiError(message, status).body()
        lines = [
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
            "content-type: application/json",
            f"content-length: {len(body)}",
            "x-content-type-options: nosniff",
            "connection: close",
        ]
        self.transport.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        if self._settings.access_log:
            log_request(client=self.client[0] if self.client else None, status=status, refused=message)

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(self._settings.head_timeout, self._head_is_late)

    def _start_write_timer(self) -> None:
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self._settings.write_timeout, self.transport.abort)

    def _head_is_late(self) -> None:
        if self._unparsed:
            self.refuse(408, f"the request's headers took longer than {self._settings.head_timeout:g} seconds")
        else:
            self.transport.abort()

    def _stop_timers(self) -> None:
        for timer in (self._head_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
