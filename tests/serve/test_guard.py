"""Who is let in, and what every reply carries; the guard alone, called as ASGI servers do."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

from luciola.serve.guard import ServerSettings, api_keys, guarded


async def length(request: Request) -> JSONResponse:
    request.state.log["prompt_tokens"] = 7
    return JSONResponse(len(await request.body()))


async def alive(request: Request) -> PlainTextResponse:
    return PlainTextResponse("alive", headers={"Referrer-Policy": "strict-origin"})


APP = Starlette(
    routes=[Route(path, alive) for path in ("/", "/health", "/ready", "/static/page.js", "/metrics", "/v1/models")]
    + [Route("/v1/length", length, methods=["POST"])]
)


def ask(
    settings: ServerSettings | None = None,
    path: str = "/v1/length",
    method: str = "POST",
    headers: dict[str, str] | None = None,
    content: Any = None,
    draining: bool = False,
) -> httpx.Response:
    guard = guarded(APP, settings or ServerSettings(access_log=False))
    guard.draining = draining

    async def reply() -> httpx.Response:
        transport = httpx.ASGITransport(app=guard)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as client:
            return await client.request(method, path, headers=headers, content=content)

    return asyncio.run(reply())


def with_keys(*keys: str, **options: Any) -> ServerSettings:
    return ServerSettings(api_keys=keys, access_log=False, **options)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize("key", ["first", "second"])
def test_each_key_opens(key: str) -> None:
    assert ask(with_keys("first", "second"), headers=bearer(key)).status_code == 200


def test_a_key_may_come_in_a_header_of_its_own() -> None:
    assert ask(with_keys("first", "second"), headers={"X-Api-Key": "second"}).status_code == 200
    both = {"X-Api-Key": "first"} | bearer("none")  # OpenAI's clients always send the latter
    assert ask(with_keys("first"), headers=both).status_code == 200
    for wrong in ("", "fir", "Bearer first"):
        assert ask(with_keys("first"), headers={"X-Api-Key": wrong}).status_code == 401


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer(""),
        bearer("firs"),
        bearer("firstt"),
        bearer("first, second"),
        {"Authorization": "first"},
        {"Authorization": "Basic first"},
        {"Authorization": "Bearer \xff"},
    ],
)
def test_anything_else_does_not(headers: dict[str, str]) -> None:
    encoded = {name: value.encode("latin-1") for name, value in headers.items()}
    reply = ask(with_keys("first", "second"), headers=encoded)  # type: ignore[arg-type]
    error = reply.json()["error"]
    assert reply.status_code == 401 and reply.headers["www-authenticate"] == "Bearer"
    assert set(error) == {"message", "type", "param", "code"} and error["code"] == "invalid_api_key"
    assert "second" not in reply.text


def test_the_page_and_the_probes_are_open_and_nothing_else() -> None:
    paths = [
        "/",
        "/health",
        "/ready",
        "/static/page.js",
        "/metrics",
        "/v1/models",
        "/docs",
        "/openapi.json",
        "/healthy",
    ]
    closed = [path for path in paths if ask(with_keys("first"), path, "GET").status_code == 401]
    assert closed == ["/metrics", "/v1/models", "/openapi.json", "/healthy"]


def test_keys_are_not_shown_and_have_a_form(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "geheim" not in repr(with_keys("geheim"))
    for key in ("", "two words", "a\n", "schlüssel"):
        with pytest.raises(ValueError, match="an API key must be printable ASCII") as raised:
            with_keys(key)
        assert not key or key not in str(raised.value)
    monkeypatch.setenv("LUCIOLA_API_KEY", "from-outside")
    assert api_keys([]) == ("from-outside",) and api_keys(["a", "b"]) == ("a", "b")
    monkeypatch.delenv("LUCIOLA_API_KEY")
    assert api_keys([]) == ()


OWN_NAMES = ["localhost", "localhost:8000", "LOCALHOST", "chat.localhost:1", "127.0.0.1:8000", "[::1]:8000", "10.1.2.3"]
FOREIGN_NAMES = [
    "evil.example",
    "localhost.evil.example:8000",
    "127.0.0.1.evil.example",
    "[::1",
    "",
    "a b",
    "evil@localhost.x",
]


@pytest.mark.parametrize("host", OWN_NAMES)
def test_own_names_are_served(host: str) -> None:
    assert ask(headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", FOREIGN_NAMES)
def test_a_foreign_name_pointed_at_loopback_is_refused_on_every_route(host: str) -> None:
    for method, path in (("POST", "/v1/length"), ("GET", "/v1/models"), ("GET", "/")):
        assert ask(path=path, method=method, headers={"Host": host}).status_code == 403


def test_nor_does_a_server_open_to_others_answer_to_foreign_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "Box.lan")
    settings = ServerSettings(host="0.0.0.0", allow_unprotected=True, allowed_hosts=("Chat.example",), access_log=False)
    for host in FOREIGN_NAMES:
        reply = ask(settings, headers={"Host": host, "Origin": f"http://{host}"})
        assert reply.status_code == 403
    for host in (*OWN_NAMES, "192.168.1.5:8000", "box:8000", "box.lan", "box.local", "chat.example", "CHAT.example."):
        assert ask(settings, headers={"Host": host}).status_code == 200, host
    for wrong in ("http://chat.example", "chat.example:8000", ""):
        with pytest.raises(ValueError, match=r"--allowed-host .*: expected a name"):
            ServerSettings(allowed_hosts=(wrong,))


def test_a_key_or_the_name_as_host_makes_a_name_ones_own() -> None:
    named = ServerSettings(host="box.example", allow_unprotected=True, access_log=False)
    assert ask(named, headers={"Host": "box.example:8000"}).status_code == 200
    assert ask(with_keys("k"), headers={"Host": "box.example", **bearer("k")}).status_code == 200


ORIGINS = {
    "http://localhost:8000": 200,
    "https://localhost:8000": 200,  # behind a proxy that ends TLS
    "http://localhost:8001": 403,
    "http://localhost": 403,
    "http://evil.example": 403,
    "http://localhost:8000.evil.example": 403,
    "http://[": 403,
    "null": 403,
    "": 403,
}


@pytest.mark.parametrize("origin", ORIGINS)
def test_pages_of_others_cannot_post(origin: str) -> None:
    assert ask(headers={"Origin": origin}).status_code == ORIGINS[origin]


def test_without_cors_no_page_elsewhere_may_read_a_reply() -> None:
    reply = ask(path="/v1/models", method="GET", headers={"Origin": "http://evil.example"})
    assert reply.headers["cross-origin-resource-policy"] == "same-origin"
    assert not [name for name in reply.headers if name.startswith("access-control")]


def test_cors_for_the_origins_named() -> None:
    settings = with_keys("k", cors=("http://app.example",))
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, x-stainless-os"}
    allowed = ask(settings, method="OPTIONS", headers={"Origin": "http://app.example", **asked})
    assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == "http://app.example"
    assert "x-stainless-os" in allowed.headers["access-control-allow-headers"]
    other = ask(settings, method="OPTIONS", headers={"Origin": "http://evil.example", **asked})
    assert "access-control-allow-origin" not in other.headers
    for key, status in (("k", 200), ("wrong", 401)):  # the page also gets to read why it was refused
        reply = ask(settings, headers={"Origin": "http://app.example", **bearer(key)})
        assert reply.status_code == status and reply.headers["access-control-allow-origin"] == "http://app.example"
    keyless = ServerSettings(cors=("http://app.example",), access_log=False)
    assert ask(keyless, headers={"Origin": "http://app.example"}).status_code == 200
    assert ask(keyless, headers={"Origin": "http://evil.example"}).status_code == 403


@pytest.mark.parametrize("origin", ["app.example", "http://app.example/", "http://app.example/path", "http://", ""])
def test_a_cors_origin_has_a_form(origin: str) -> None:
    with pytest.raises(ValueError, match="expected an origin such as"):
        ServerSettings(cors=(origin,))


def test_every_reply_carries_the_headers_of_security_and_an_id() -> None:
    for reply in (ask(), ask(with_keys("k")), ask(path="/nowhere"), ask(headers={"Origin": "null"})):
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["referrer-policy"] == "no-referrer"
        assert re.fullmatch("[0-9a-f]{32}", reply.headers["x-request-id"])
    assert ask(path="/health", method="GET").headers.get_list("referrer-policy") == ["strict-origin"]


@pytest.mark.parametrize(
    ("given", "kept"), [("trace-1.a_B", True), ("x" * 64, True), ("x" * 65, False), ("a b", False)]
)
def test_a_clean_request_id_is_kept(given: str, kept: bool) -> None:
    assert (ask(headers={"X-Request-Id": given}).headers["x-request-id"] == given) is kept


def test_bodies_up_to_the_limit() -> None:
    async def chunks(size: int) -> Any:
        for _ in range(size):
            yield b"x"

    settings = ServerSettings(max_body=1000, access_log=False)
    for content in (b"x" * 1000, chunks(1000)):
        assert ask(settings, content=content).json() == 1000
    for content in (b"x" * 1001, chunks(1001)):
        assert ask(settings, content=content).status_code == 413
    assert ask(settings, content=b"x", headers={"Content-Length": "9" * 30}).status_code == 413


def test_while_draining_only_probes_are_answered() -> None:
    refused = ask(draining=True)
    assert refused.status_code == 503 and refused.headers["retry-after"]
    assert ask(path="/ready", method="GET", draining=True).status_code == 200
    assert refused.headers["connection"] == "close"


def test_the_log_has_one_line_for_each_request(capfd: pytest.CaptureFixture[str]) -> None:
    ask(ServerSettings(), path="/v1/length?key=secret", content=b"a prompt", headers={"X-Request-Id": "mine"})
    ask(ServerSettings(), path="/%0A%7B%22status%22:1%7D%1b[2J", method="GET")
    ask(with_keys("k"))  # its log is off
    text = capfd.readouterr().err
    first, second = [json.loads(line) for line in text.splitlines()]
    assert first["path"] == "/v1/length" and first["status"] == 200 and first["prompt_tokens"] == 7
    assert first["id"] == "mine" and first["method"] == "POST" and first["bytes"] == 1
    assert "secret" not in text and 'prompt"' not in text and "\x1b" not in text
    assert second["path"] == '/\n{"status":1}\x1b[2J' and second["status"] == 404


def test_what_the_application_raises_is_answered_in_the_shape_of_errors() -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("a secret")

    async def reply() -> httpx.Response:
        transport = httpx.ASGITransport(app=guarded(broken, ServerSettings(access_log=False)))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get("/")

    failed = asyncio.run(reply())
    assert failed.status_code == 500 and failed.json()["error"]["type"] == "server_error"
    assert "secret" not in failed.text


def test_bodies_held_at_once_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luciola.serve.guard.MAX_HELD", 2500)
    guard = guarded(APP, ServerSettings(max_body=1000, access_log=False))

    async def statuses() -> list[int]:
        full = asyncio.Event()

        async def slow() -> Any:
            yield b"x" * 1000
            await full.wait()

        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=guard), base_url="http://localhost") as client:
            first = [asyncio.create_task(client.post("/v1/length", content=slow())) for _ in range(2)]
            await asyncio.sleep(0.05)
            third = await client.post("/v1/length", content=b"x" * 1000)
            full.set()
            done = [reply.status_code for reply in await asyncio.gather(*first)]
            after = await client.post("/v1/length", content=b"x" * 1000)
            return [third.status_code, *done, after.status_code]

    assert asyncio.run(statuses()) == [503, 200, 200, 200]
