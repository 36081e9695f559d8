"""What clients may do to a running server: memory stays bounded, they get the right status, and others are served."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

Servers = Callable[..., Any]

HEAD = b"POST /v1/echo HTTP/1.1\r\nHost: localhost\r\n"
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
LAST = b"Connection: close\r\n\r\n"
MEBIBYTE = b"x" * 2**20


@pytest.fixture(scope="module")
def process(small_serving: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One server for all of the tests, with short deadlines."""
    deadlines = {"head_timeout": 0.5, "body_timeout": 3.0, "stall_timeout": 0.5, "write_timeout": 0.5, "keep_alive": 1}
    with small_serving(tmp_path_factory.mktemp("server"), **deadlines) as server:
        yield server


@pytest.fixture
def server(process: Any) -> Iterator[Any]:
    """Whatever a test did, others are served after it, and memory has not grown much."""
    server = process
    assert server.is_well()
    before = server.memory()
    yield server
    began = time.monotonic()
    assert server.is_well() and time.monotonic() - began < 5.0
    assert server.memory() - before < 64 * 2**20
    assert "Traceback" not in server.log.read_text()


def status(reply: bytes) -> int:
    """Of the first reply, 0 if there is none."""
    first = re.match(rb"HTTP/1\.1 (\d{3}) ", reply)
    return int(first.group(1)) if first else 0


def keep_sending(client: socket.socket, piece: bytes, most: int) -> tuple[bytes, int]:
    """Send until the server answers; the answer up to the connection's end, and the number of bytes sent before it."""
    sent = 0
    client.settimeout(0.0)
    while sent < most:
        with contextlib.suppress(BlockingIOError):
            sent += client.send(piece[sent % len(piece) :])
        with contextlib.suppress(BlockingIOError):
            if client.recv(1, socket.MSG_PEEK):
                break
    client.settimeout(10.0)
    return server_said(client), sent


def server_said(client: socket.socket) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionError):
        while piece := client.recv(65536):
            received += piece
    return received


def test_a_body_of_100_megabytes_is_refused_by_its_length(server: Any) -> None:
    # An ordinary client sends all of it before it reads: it too must see the refusal, not a reset.
    reply = httpx.post(server.url + "/v1/echo", content=100 * MEBIBYTE, timeout=20)
    assert reply.status_code == 413 and reply.json()["error"]["type"] == "invalid_request_error"
    with server.connect() as client:  # and one that waits for leave to send is told before it sends
        client.sendall(HEAD + b"Expect: 100-continue\r\nContent-Length: 104857600\r\n\r\n")
        assert status(client.recv(65536)) == 413


def test_a_body_without_end_is_refused_once_too_large(server: Any) -> None:
    with server.connect() as client:
        client.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        reply, sent = keep_sending(client, b"10000\r\n" + b"x" * 0x10000 + b"\r\n", 2**30)
    assert status(reply) == 413
    assert 10 * 2**20 < sent < 64 * 2**20


def test_bytes_of_a_chunked_body_that_are_no_body_are_bounded(server: Any) -> None:
    floods = [b"1;" + b"x" * 2**20, b"0\r\nx: " + b"x" * 2**20, b"0\r\n" + b"x: y\r\n" * 2**17]
    for flood in floods:
        with server.connect() as client:
            client.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
            reply, _ = keep_sending(client, flood, len(flood))
        assert status(reply) in (400, 431)


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (b"GET /", b"a" * 65536),
        (GET, b"X-Header: value\r\n" * 4096),
        (GET + b"X-Header: ", b"v" * 65536),
        (GET, b"n" * 65536),
        (GET, b"X: v\r\n" * 100),
    ],
    ids=["request line", "headers", "one value", "one name", "headers in small pieces"],
)
def test_a_flood_of_headers(server: Any, start: bytes, piece: bytes) -> None:
    before = server.memory()
    with server.connect() as client:
        client.sendall(start)
        reply, sent = keep_sending(client, piece, 200 * 2**20)
        assert status(reply) == 431 and b'"error"' in reply
        assert sent < 16 * 2**20
    assert server.memory() - before < 32 * 2**20


def test_heads_up_to_the_limit_are_served(server: Any) -> None:
    for filling, expected in ((30_000, 200), (33_000, 431)):
        assert status(server.ask(GET + b"X: " + b"v" * filling + b"\r\n" + LAST)) == expected
        assert status(server.ask(b"GET /health?" + b"v" * filling + GET[11:] + LAST)) == expected


def test_a_head_that_never_ends_is_given_up(server: Any) -> None:
    with server.connect() as client:
        began = time.monotonic()
        reply = b""
        client.settimeout(0.05)
        for byte in GET + b"X: " + b"v" * 1000:
            client.sendall(bytes([byte]))
            with contextlib.suppress(TimeoutError):
                reply = client.recv(65536)
                break
        assert status(reply) == 408 and time.monotonic() - began < 10.0


@pytest.mark.parametrize(("pause", "most"), [(5.0, 2.5), (0.1, 10.0)], ids=["stalls", "trickles"])
def test_a_body_that_never_ends_is_given_up(server: Any, pause: float, most: float) -> None:
    with server.connect() as client:
        began = time.monotonic()
        client.sendall(HEAD + b"Content-Length: 1000\r\n\r\n")
        client.settimeout(pause)
        reply = b""
        for _ in range(100):
            client.sendall(b"x")
            with contextlib.suppress(TimeoutError):
                reply = client.recv(65536)
                break
        assert status(reply) == 408 and time.monotonic() - began < most


def test_a_thousand_connections_that_say_nothing(server: Any) -> None:
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(server.connect()) for _ in range(1000)]
        began = time.monotonic()
        assert server.is_well() and time.monotonic() - began < 5.0
        assert all(client.recv(1) == b"" for client in silent)
        assert time.monotonic() - began < 10.0


def test_when_connections_run_out_the_longest_silent_makes_room(small_server: Servers) -> None:
    server = small_server(max_connections=20)
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(server.connect()) for _ in range(60)]
        for client in silent[:40]:
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(1) == b""
        assert server.is_well()
        silent[-1].sendall(GET + LAST)  # one of the latest is still there
        assert status(silent[-1].recv(65536)) == 200
    with contextlib.ExitStack() as stack:  # those who owe us a body make room too
        for _ in range(20):
            stack.enter_context(server.connect()).sendall(HEAD + b"Content-Length: 9\r\n\r\n1")
        time.sleep(0.2)
        assert server.is_well()
    with contextlib.ExitStack() as stack:  # no one makes room who is being served
        for _ in range(20):
            stack.enter_context(server.connect()).sendall(GET.replace(b"/health", b"/v1/wait?seconds=2") + b"\r\n")
        time.sleep(0.3)
        refused = server.connect()
        assert status(server.everything(refused)) == 503
        refused.close()
    time.sleep(0.2)
    assert server.is_well()


def test_who_reads_nothing_of_a_reply_is_let_go(server: Any) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(server.connect()).sendall(GET.replace(b"/health", b"/v1/flood") + b"\r\n")
        until = time.monotonic() + 5.0
        time.sleep(0.3)
        assert httpx.get(server.url + "/v1/left").json() > 0
        while httpx.get(server.url + "/v1/left").json() and time.monotonic() < until:
            time.sleep(0.1)
        assert httpx.get(server.url + "/v1/left").json() == 0


def test_who_leaves_in_the_midst_is_noticed(server: Any) -> None:
    for ending in ("closes", "resets", "sends no more", "asks for more and closes"):
        with server.connect() as client:
            client.sendall(GET.replace(b"/health", b"/v1/forever") + b"\r\n")
            assert b"200" in client.recv(100)
            if ending == "asks for more and closes":
                client.sendall(GET + b"\r\n")
            assert httpx.get(server.url + "/v1/left").json() == 1
            if ending == "resets":
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if ending == "sends no more":
                client.shutdown(socket.SHUT_WR)
            else:
                client.close()
            until = time.monotonic() + 2.0
            while httpx.get(server.url + "/v1/left").json() and time.monotonic() < until:
                time.sleep(0.02)
            assert httpx.get(server.url + "/v1/left").json() == 0, ending


GARBAGE = [
    b"\x00" * 100,
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),  # TLS
    b"\xff\xfe garbage\r\n\r\n",
    b"SSH-2.0-OpenSSH_9.6\r\n",
    b"GET\r\n\r\n",
    b"GET /health\r\n\r\n",
    b"GET /health HTTP/9.9\r\nHost: localhost\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"CONNECT localhost:1 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: local\x00host\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost : localhost\r\n\r\n",
    b"GET /health HTTP/1.1\r\nno colon\r\n\r\n",
    b"GET /health HTTP/1.1\r\n: no name\r\n\r\n",
    b"GET /a b HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /health HTTP/1.1\r\n\r\n",  # no Host
    b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage(server: Any, garbage: bytes) -> None:
    reply = server.ask(garbage)
    assert status(reply) == 400 and b'"invalid_request_error"' in reply
    assert reply.count(b"HTTP/1.1 ") == 1


# A request that two programs in a row may cut at different places lets one client speak as another.
SMUGGLING = [
    b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcde",
    b"Content-Length: 5, 5\r\n\r\nabcde",
    b"Content-Length: +5\r\n\r\nabcde",
    b"Content-Length: -5\r\n\r\nabcde",
    b"Content-Length: 0x5\r\n\r\nabcde",
    b"Content-Length: 5 5\r\n\r\nabcde",
    b"Content-Length: 99999999999999999999999999\r\n\r\nabcde",
    b"Content-Length : 5\r\n\r\nabcde",
    b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    b"Transfer-Encoding: identity\r\n\r\nabc",
    b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n",
    b"X: a\r\n b: folded\r\nContent-Length: 0\r\n\r\n",
    b"X: a\nContent-Length: 5\r\n\r\nabcde",
    b"X: a\rContent-Length: 5\r\n\r\nabcde",
    b"Transfer-Encoding: chunked\r\n\r\n-1\r\n\r\n",
    b"Transfer-Encoding: chunked\r\n\r\n0x1\r\na\r\n0\r\n\r\n",
    b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
    b"Transfer-Encoding: chunked\r\n\r\n1\r\nab\r\n0\r\n\r\n",
    b"Transfer-Encoding: chunked\r\n\r\n1\na\n0\n\n",
]


@pytest.mark.parametrize("shape", SMUGGLING)
def test_requests_of_doubtful_length_are_refused_with_all_that_follows(server: Any, shape: bytes) -> None:
    reply = server.ask(HEAD + shape + GET + LAST)
    assert status(reply) == 400
    assert b"alive" not in reply


def test_requests_in_a_row_are_answered_in_order(server: Any) -> None:
    slow = GET.replace(b"/health", b"/v1/wait?seconds=0.2") + b"\r\n"
    large = HEAD + b"Content-Length: 400000\r\n" + LAST + b"x" * 400_000
    assert re.findall(rb'waited|"length":\d+', server.ask(slow + large)) == [b"waited", b'"length":400000']
    posts = [HEAD + b"Content-Length: 1\r\n\r\n" + str(i).encode() for i in range(9)]
    reply = server.ask(b"".join(posts) + GET + LAST)
    assert re.findall(rb'"start":"(\d)"', reply) == [str(i).encode() for i in range(9)]
    assert reply.endswith(b"alive")


def test_a_thousand_requests_at_once_on_one_connection_are_too_many(server: Any) -> None:
    waiting = GET.replace(b"/health", b"/v1/wait?seconds=1") + b"\r\n"
    assert status(server.ask(waiting + (GET + b"\r\n") * 50 + GET + LAST)) == 200
    assert status(server.ask(waiting + (GET + b"\r\n") * 1000)) == 400
    body = HEAD + b"Content-Length: 300000\r\n\r\n" + b"x" * 300_000
    assert status(server.ask(waiting + body + body)) == 400


def test_old_and_unusual_requests(server: Any) -> None:
    assert server.ask(b"GET /health HTTP/1.0\r\n\r\n").endswith(b"alive")
    old = server.ask(b"POST /v1/echo HTTP/1.0\r\nContent-Length: 3\r\n\r\nabc")
    assert b'"length":3' in old
    assert server.ask(b"\r\n\r\n" + GET + LAST).endswith(b"alive")
    assert (
        server.ask(GET.replace(b"GET", b"HEAD") + LAST)[-4:] == b"\r\n\r\n"
        or status(server.ask(b"HEAD" + GET[3:] + LAST)) == 200
    )
    assert status(server.ask(b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n" + LAST)) in (400, 404)
    assert status(server.ask(b"BREW /health HTTP/1.1\r\nHost: localhost\r\n\r\n")) in (400, 405)
    assert server.ask(b"GET http://localhost/health HTTP/1.1\r\nHost: localhost\r\n" + LAST).endswith(b"alive")
    # Java's HTTP client offers HTTP/2 with each of its first requests; the offer may be ignored, the body may not.
    upgrade = (
        b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAA\r\n"
    )
    with server.connect() as client:
        for _ in range(2):
            client.sendall(HEAD + upgrade + b"Content-Length: 3\r\n\r\nabc")
            reply = b""
            while b"}" not in reply:
                reply += client.recv(65536)
            assert b'"length":3' in reply
    websocket = (
        b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAA\r\n\r\n"
    )
    with server.connect() as client:
        client.sendall(GET + websocket)
        assert status(client.recv(65536)) == 200  # an answer, and no upgrade


@pytest.mark.parametrize(
    "path",
    [
        "/static/../../etc/passwd",
        "/static/../conftest.py",
        "/static/%2e%2e/%2e%2e/etc/passwd",
        "/static/..%2f..%2fetc/passwd",
        "/static/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "/static/..%5c..%5cetc%5cpasswd",
        "/static/..\\..\\etc\\passwd",
        "/static//etc/passwd",
        "/static/%2fetc/passwd",
        "/static/%252e%252e/etc/passwd",
        "/static/%c0%ae%c0%ae/etc/passwd",
        "/static/link/passwd",
        "/static/page.js%00.png",
        "/static/%00",
        "/static/" + "a" * 5000,
        "/static/" + "a/" * 5000,
        "/static/%",
        "/static/%zz",
        "/static/%ff%fe",
        "/static/",
        "/static/.",
        "/%00",
        "/%",
        "/%e0%80",
        "//etc/passwd",
    ],
)
def test_no_path_leads_out_of_the_static_folder(server: Any, path: str) -> None:
    static = server.log.parent
    with contextlib.suppress(FileExistsError):
        (static / "link").symlink_to("/etc")
    (static / "page.js").write_text("page")
    reply = server.ask(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n".encode() + LAST)
    assert status(reply) in (400, 404) and b"root:" not in reply
    assert server.ask(GET.replace(b"/health", b"/static/page.js") + LAST).endswith(b"page")


def test_the_log_keeps_its_lines(small_server: Servers) -> None:
    server = small_server()
    server.ask(b"GET /%0d%0a%7b%22status%22%3a200%7d%1b%5b2J HTTP/1.1\r\nHost: localhost\r\n" + LAST)
    server.ask(GET + b"X-Request-Id: a\x1b[2J\r\n" + LAST)
    text = server.log.read_text()
    assert "\x1b" not in text and [line["status"] for line in server.lines()] == [404, 400]
