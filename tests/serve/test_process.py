"""The process from its first line to its exit code."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from luciola.serve.guard import ServerSettings
from luciola.serve.server import announcement, listen

Servers = Callable[..., Any]


def streamed(server: Any, query: str) -> tuple[threading.Thread, list[str]]:
    """A client that reads events in the background; the thread, begun, and what it has read."""
    read: list[str] = []
    began = threading.Event()

    def client() -> None:
        with httpx.stream("GET", f"{server.url}/v1/count?{query}", timeout=30) as reply:
            for line in reply.iter_lines():
                read.append(line)
                began.set()

    thread = threading.Thread(target=client)
    thread.start()
    assert began.wait(10)
    return thread, read


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_has_running_requests_finish_and_refuses_new_ones(small_server: Servers, how: int) -> None:
    server = small_server()
    with httpx.Client(base_url=server.url) as kept:
        assert kept.get("/ready").status_code == 200
        with httpx.Client(base_url=server.url) as probe:
            assert probe.get("/health").status_code == 200
            thread, read = streamed(server, "n=30&wait=0.1")
            server.process.send_signal(how)
            time.sleep(0.5)
            refused = kept.post("/v1/echo", content=b"x")
            assert refused.status_code == 503 and refused.headers["retry-after"]
            assert refused.headers["connection"] == "close" and refused.json()["error"]["code"] == "shutting_down"
            assert probe.get("/ready").status_code == 503
        # So is who comes only now.
        assert httpx.get(server.url + "/ready").status_code == 503
        assert httpx.get(server.url + "/health").status_code == 200
        late = httpx.post(server.url + "/v1/echo", content=b"x")
        assert late.status_code == 503 and late.json()["error"]["code"] == "shutting_down"
        assert server.process.poll() is None
    thread.join()
    assert [line for line in read if line] == [f"data: {i}" for i in range(30)]
    assert server.process.wait(5) == 0
    assert "Traceback" not in server.log.read_text()


def test_an_idle_server_ends_at_once(small_server: Servers) -> None:
    server = small_server()
    with server.connect(), httpx.Client(base_url=server.url) as kept:
        kept.get("/health")
        began = time.monotonic()
        assert server.end() == 0
        assert time.monotonic() - began < 10.0


def test_what_outlasts_the_drain_is_ended_with_an_error(small_server: Servers) -> None:
    server = small_server(drain_seconds=0.5)
    thread, read = streamed(server, "n=100000&wait=0.05")
    waiting = server.connect()
    waiting.sendall(b"GET /v1/wait?seconds=60 HTTP/1.1\r\nHost: localhost\r\n\r\n")
    time.sleep(0.2)
    began = time.monotonic()
    assert server.end() == 0
    assert 0.4 < time.monotonic() - began < 10.0
    thread.join()
    events = [line.removeprefix("data: ") for line in read if line]
    error = json.loads(events[-1])["error"]
    assert "shutting down" in error["message"]
    assert error["type"] == "overloaded_error" and error["code"] == "shutting_down"
    assert events[:-1] == [str(i) for i in range(len(events) - 1)]
    assert server.everything(waiting).startswith(b"HTTP/1.1 503 ")
    waiting.close()
    assert "Traceback" not in server.log.read_text()


def test_a_second_signal_ends_at_once(small_server: Servers) -> None:
    server = small_server(drain_seconds=60)
    with server.connect() as client:
        client.sendall(b"GET /v1/wait?seconds=60 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        time.sleep(0.2)
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert server.process.poll() is None
        assert server.end(signal.SIGINT) == 128 + signal.SIGINT


def test_a_port_in_use_is_named(small_server: Servers) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"^port {port} is in use; choose another with --port, or --port 0"):
            listen(ServerSettings(port=port))
    with pytest.raises(OSError, match=r"--host 203\.0\.113\.7 is no address of this machine"):
        listen(ServerSettings(host="203.0.113.7", port=0, api_keys=("k",)))
    with pytest.raises(OSError, match=r"--host a\.\.b is no address of this machine"):
        listen(ServerSettings(host="a..b", port=0, api_keys=("k",)))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "box.example", "192.168.1.5", ""])
def test_to_let_others_in_takes_a_key(host: str) -> None:
    with pytest.raises(ValueError, match="lets other machines in: give a key with --api-key"):
        listen(ServerSettings(host=host))


def test_a_key_or_force_opens_to_others(small_server: Servers) -> None:
    for settings in (
        ServerSettings(host="0.0.0.0", port=0, api_keys=("k",)),
        ServerSettings(host="0.0.0.0", port=0, allow_unprotected=True),
    ):
        for opened in listen(settings):
            opened.close()


def test_ipv6_and_names() -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    for host, shown in (("::1", "[::1]"), ("localhost", "localhost"), ("127.0.0.1", "127.0.0.1")):
        settings = ServerSettings(host=host, port=0)
        try:
            sockets = listen(settings)
        except OSError:
            assert host == "::1"  # switched off in this machine
            continue
        ports = {opened.getsockname()[1] for opened in sockets}
        assert len(ports) == 1 and f"http://{shown}:{ports.pop()}/v1" in announcement(settings, "m", sockets)
        for opened in sockets:
            opened.close()


def test_the_key_of_the_environment_is_kept_out_of_the_log(small_server: Servers) -> None:
    server = small_server(environment={"LUCIOLA_API_KEY": "geheim"})
    assert httpx.get(server.url + "/v1/left").status_code == 401
    assert httpx.get(server.url + "/v1/left", headers={"Authorization": "Bearer geheim"}).status_code == 200
    assert httpx.get(server.url + "/v1/left", headers={"Authorization": "Bearer falsch"}).status_code == 401
    assert [line["status"] for line in server.lines()] == [401, 200, 401]
    assert "geheim" not in server.log.read_text() and "falsch" not in server.log.read_text()


def test_more_files_may_be_open_than_the_shell_allows(small_server: Servers) -> None:
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 600:
        pytest.skip("this machine allows no more")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        server = small_server()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    silent = [server.connect() for _ in range(400)]
    assert server.is_well()
    for client in silent:
        client.close()
