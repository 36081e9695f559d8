"""The routes. Each takes its request apart, has a job made of it off the event loop, and sends what the job makes."""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

import luciola
from luciola import Engine, LanguageModel
from luciola.serve import replies
from luciola.serve.chat import ChatJob
from luciola.serve.completions import TextJob
from luciola.serve.errors import ApiError, answer, of_validation, shutting_down
from luciola.serve.guard import LEFT
from luciola.serve.metrics import CONTENT_TYPE
from luciola.serve.prompts import chat_prompt, check_known, tools_of
from luciola.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    ControlRequest,
    DetokenizeRequest,
    Templated,
    TokenizeRequest,
)
from luciola.serve.service import Service, Settings
from luciola.text.untrusted import printable, shortened

STATIC = Path(__file__).with_name("static")
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
UNCACHED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
Result = TypeVar("Result")
FAULTS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": replies.ErrorReply, "description": "the request does not go, and why"},
    "5XX": {"model": replies.ErrorReply, "description": "the server cannot answer now"},
}


def create(lm: LanguageModel, engine: Engine, settings: Settings) -> FastAPI:
    """The server's application; `app.state.service` is what its routes share.

    Raises:
        ValueError: the model has no tokenizer.
    """
    service = Service(lm, engine, settings)
    app = FastAPI(
        title="Luciola",
        version=luciola.__version__,
        description=f"{settings.name}, by OpenAI's protocol",
        redoc_url=None,
        docs_url=None,
    )
    app.router.route_class = _Route
    app.state.service, app.state.draining = service, False
    app.state.failed = service.metrics.failed  # the guard calls it
    app.add_exception_handler(ApiError, answer)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(Exception, _failed)
    _add_models(app, service)
    _add_completions(app, service)
    _add_tokens(app, service)
    _add_state(app, service)
    _add_page(app)
    return app


class _StrictJson(Request):
    """Reads bodies by RFC 8259: no NaN, no half characters, no nesting that would exhaust the stack."""

    async def json(self) -> Any:
        try:
            body = (await self.body()).removeprefix(codecs.BOM_UTF8)  # which some programs of Windows send
            return from_json(body, allow_inf_nan=False)
        except ValueError as error:
            raise HTTPException(400, f"the body is not valid JSON: {error}") from error


class _Route(APIRoute):
    """A route whose requests are read strictly, and whose faults are told in OpenAI's form."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            try:
                return await handle(_StrictJson(request.scope, request.receive))
            except RequestValidationError as error:
                kind = request.headers.get("content-type", "")
                if "json" not in kind:
                    raise ApiError(
                        f"the body must be JSON, with Content-Type: application/json, not {shortened(kind)}", 415
                    ) from error
                raise of_validation(error.errors()) from error

        return strict


async def _refused(request: Request, error: Exception) -> Response:
    """What starlette refuses by itself: unknown paths and methods, bodies that are no JSON."""
    assert isinstance(error, HTTPException)
    detail = str(error.detail)
    if error.status_code == 404 and detail == "Not Found":
        detail = f"there is nothing at {printable(request.url.path)}; /docs lists what there is"
    return ApiError(detail, error.status_code, headers=error.headers).response()


async def _failed(request: Request, error: Exception) -> Response:
    """A fault of ours; the log has the traceback."""
    return ApiError("the server failed at this request; its log says more", 500).response()


def _add_models(app: FastAPI, service: Service) -> None:
    settings = service.settings
    card = replies.ModelCard(
        id=settings.name,
        object="model",
        created=service.created,
        owned_by="luciola",
        max_model_len=service.context,
        luciola=replies.ModelExtras(
            thinks=service.tokenizer.thinks,
            system=settings.system,
            history=settings.history,
            temperature=settings.page_temperature,
            top_p=settings.page_top_p,
        ),
    )

    @app.get("/models", include_in_schema=False)
    @app.get("/v1/models", tags=["models"], responses=FAULTS)
    async def list_models() -> replies.ModelList:
        """The model that is served."""
        return replies.ModelList(object="list", data=[card])

    @app.get("/v1/models/{name:path}", tags=["models"], responses=FAULTS)
    async def one_model(name: str) -> replies.ModelCard:
        """The same, by its name."""
        service.check_model(name)
        return card


def _add_completions(app: FastAPI, service: Service) -> None:
    def answered(reply: type[BaseModel], chunk: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
        data = {"type": "string", "description": f"a {chunk.__name__} or an error in JSON, or [DONE]"}
        event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
        return {200: {"model": reply, "content": {"text/event-stream": {"itemSchema": event}}}, **FAULTS}

    @app.post("/chat/completions", include_in_schema=False, response_model=None)
    @app.post(
        "/v1/chat/completions",
        tags=["completions"],
        response_model=None,
        responses=answered(replies.ChatReply, replies.ChatChunk),
    )
    async def chat(body: ChatRequest, request: Request) -> Response:
        """A reply to a conversation."""
        service.check_model(body.model)
        return await _answer(request, partial(ChatJob, service, body), bool(body.stream))

    @app.post("/completions", include_in_schema=False, response_model=None)
    @app.post(
        "/v1/completions",
        tags=["completions"],
        response_model=None,
        responses=answered(replies.TextReply, replies.TextReply),
    )
    async def complete(body: CompletionRequest, request: Request) -> Response:
        """The continuation of a text, or of token ids."""
        service.check_model(body.model)
        return await _answer(request, partial(TextJob, service, body), bool(body.stream))

    @app.post("/v1/chat/completions/control", tags=["completions"], responses=FAULTS)
    async def control(body: ControlRequest) -> replies.Control:
        """Have the thinking of a running reply end now, and its answer begin."""
        if not service.stop_thinking(body.id):
            raise ApiError(f"no request {shortened(body.id)} is running", 404, "id", "not_found")
        return replies.Control(success=True)


async def _answer(request: Request, make: Callable[[], ChatJob | TextJob], streams: bool) -> Response:
    """Have the job made and its reply sent. What goes wrong before the first token has a status of its own."""
    failure: ApiError | None = None
    try:
        job = await asyncio.to_thread(make)
        try:
            if not streams:
                return Response(await _while_connected(request, job.whole()), media_type="application/json")
            chunks = job.chunks()
            first = await _while_connected(request, anext(chunks))
        except ApiError as error:
            failure = error
            raise
        finally:
            _note(request, job, failure)
    except ClientDisconnect:
        return Response(status_code=LEFT)
    events = _events(request, job, first, chunks)
    return StreamingResponse(events, media_type="text/event-stream", headers=UNCACHED)


async def _events(
    request: Request, job: ChatJob | TextJob, first: bytes, chunks: AsyncGenerator[bytes, None]
) -> AsyncIterator[bytes]:
    """Server-sent events. An error amid the stream is an event, too, and the last one."""
    failure: ApiError | None = None
    async with aclosing(chunks):
        try:
            yield b"data: " + first + b"\n\n"
            async for chunk in chunks:
                yield b"data: " + chunk + b"\n\n"
            yield b"data: [DONE]\n\n"
        except ApiError as error:
            failure = error
            request.app.state.failed(error.status)
            yield b"data: " + error.body() + b"\n\n"
        finally:
            _note(request, job, failure)


async def _while_connected(request: Request, work: Awaitable[Result]) -> Result:
    """The result of the work, which is given up when the client leaves.

    Raises:
        ClientDisconnect: it has left.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _note(request: Request, job: ChatJob | TextJob, failure: ApiError | None) -> None:
    """For the access log: numbers, and the error that has ended the reply, of which a stream's status says nothing."""
    noted = request.scope.setdefault("state", {}).setdefault("log", {})
    noted |= job.numbers() | ({} if failure is None else {"finish": "error", "error": failure.status})


def _add_tokens(app: FastAPI, service: Service) -> None:
    @app.post("/v1/tokenize", include_in_schema=False, response_model=None)
    @app.post("/tokenize", tags=["tokens"], response_model=None, responses={200: {"model": replies.Tokens}, **FAULTS})
    async def tokenize(body: TokenizeRequest) -> Response:
        """The token ids of a text, or of a conversation as the model would read it."""
        service.check_model(body.model)
        return Response(await asyncio.to_thread(_tokens, service, body), media_type="application/json")

    @app.post("/v1/detokenize", include_in_schema=False)
    @app.post("/detokenize", tags=["tokens"], responses=FAULTS)
    async def detokenize(body: DetokenizeRequest) -> replies.Text:
        """The text of token ids."""
        service.check_model(body.model)
        check_known(service, body.tokens, "tokens")
        text = await asyncio.to_thread(service.tokenizer.decode, body.tokens, False)
        return replies.Text(prompt=text, content=text)


def _tokens(service: Service, body: TokenizeRequest) -> bytes:
    ids = _token_ids(service, body)
    reply = replies.Tokens(tokens=ids, count=len(ids), max_model_len=service.context)
    if body.return_token_strs:
        reply.token_strs = service.texts.texts(ids)
    return reply.json_bytes()


def _token_ids(service: Service, body: TokenizeRequest) -> list[int]:
    text = body.prompt if body.prompt is not None else body.content
    if (text is None) == (body.messages is None):
        raise ApiError("give either prompt, a text, or messages, a conversation", param="prompt")
    if body.messages is not None:
        asked = Templated.model_construct(**{name: getattr(body, name) for name in body.model_fields_set})
        tools = tools_of(asked)
        return chat_prompt(service, asked, tools, tools is not None).ids
    try:
        return service.tokenizer.encode(text or "", begin=body.add_special_tokens is not False)
    except ValueError as error:
        raise ApiError(str(error), param="prompt") from error


def _add_state(app: FastAPI, service: Service) -> None:
    @app.head("/health", include_in_schema=False)
    @app.get("/health", tags=["state"])
    async def health() -> replies.Health:
        """Whether the process answers."""
        return replies.Health(status="ok")

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready", tags=["state"], responses={503: FAULTS["5XX"]})
    async def ready() -> replies.Health:
        """Whether it takes requests: not while it drains."""
        if app.state.draining:
            raise shutting_down()
        return replies.Health(status="ready")

    @app.get(
        "/metrics",
        tags=["state"],
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **FAULTS},
    )
    async def metrics() -> Response:
        """Counts and times, in Prometheus' text format."""
        return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE})


def _add_page(app: FastAPI) -> None:
    policy = {"Content-Security-Policy": PAGE_POLICY}

    @app.head("/", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html", headers=policy | {"Cache-Control": "no-cache"})

    @app.get("/docs", include_in_schema=False)
    async def docs() -> FileResponse:
        return FileResponse(STATIC / "docs.html", headers=policy)

    app.mount("/static", _Static(directory=STATIC), name="static")


class _Static(StaticFiles):
    """The page's files, under its policy; a new version is seen at the next visit."""

    def file_response(self, *arguments: Any, **options: Any) -> Response:
        response = super().file_response(*arguments, **options)
        response.headers.update({"Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-cache"})
        return response
