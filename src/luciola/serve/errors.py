"""Errors as OpenAI's clients expect them: {"error": {"message", "type", "param", "code"}}, and the status to each."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from luciola.serve.protocol import UNSUPPORTED, ChatRequest, CompletionRequest
from luciola.serve.replies import ErrorBody, ErrorReply
from luciola.text.untrusted import printable, shortened

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """A request that is answered with an error.

    Attributes:
        status: of HTTP.
        param: the field at fault.
        code: a name that programs can tell it by, such as "context_length_exceeded".
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    def body(self) -> bytes:
        """The JSON text of the reply."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return ErrorReply(error=ErrorBody(message=str(self), type=kind, param=self.param, code=self.code)).json_bytes()

    def response(self) -> Response:
        """The reply."""
        return Response(self.body(), self.status, dict(self.headers or {}), "application/json")


async def answer(request: Request, error: Exception) -> Response:
    """FastAPI's handler of ApiError."""
    assert isinstance(error, ApiError)
    return error.response()


def naming(error: ValueError, field: str | None) -> ApiError:
    """The error of a request whose sentence begins with the field at fault; `field`: where it begins otherwise."""
    place = re.match(r"[a-z_]+(\[\d+\]|\.[a-z_]+)*", str(error))
    first = re.split(r"[.\[]", place[0])[0] if place else ""
    known = first in (*ChatRequest.model_fields, *CompletionRequest.model_fields)
    return ApiError(str(error), param=place[0] if place and known else field)


def overloaded(waiting: int) -> ApiError:
    """The queue is full."""
    return ApiError(
        f"the server is busy: {waiting} completions are waiting; try again in a moment",
        429,
        code="queue_full",
        headers={"Retry-After": "1"},
    )


def shutting_down() -> ApiError:
    """The server drains. The code tells a client that the same request may be sent again, soon."""
    return ApiError(
        "the server is shutting down; ask again later", 503, code="shutting_down", headers={"Retry-After": "5"}
    )


def unknown_model(name: str, known: str) -> ApiError:
    """A model that is not served here."""
    return ApiError(
        f"the model {shortened(name)} does not exist here; this server has {known!r}", 404, "model", "model_not_found"
    )


def of_validation(faults: Sequence[Mapping[str, Any]]) -> ApiError:
    """One sentence about the first of pydantic's faults, which names the field."""
    first = max(faults, key=_meant)
    field = _field(first["loc"][1:])  # the first part says that it was in the body
    known = field.partition("[")[0]
    if known in UNSUPPORTED:
        return ApiError(f"{known} is {UNSUPPORTED[known]}; leave it out", param=known)
    message = printable(first["msg"].removeprefix("Value error, "), 400)
    what = message[:1].lower() + message[1:]
    return ApiError(f"{field or 'the body'}: {what}{_instead(first)}", param=field or None)


def _meant(fault: Mapping[str, Any]) -> tuple[bool, int, list[int]]:
    """Of a union's branches the one that was meant has the largest: its types fit, and it went deepest and furthest."""
    location = fault["loc"]
    return not fault["type"].endswith("_type"), len(location), [part for part in location if isinstance(part, int)]


def _instead(fault: Mapping[str, Any]) -> str:
    """What was given, but for lists and objects, which may be megabytes."""
    given = fault["input"]
    if isinstance(given, list | dict):
        return (
            f", not {'a list' if isinstance(given, list) else 'an object'}" if fault["type"].endswith("_type") else ""
        )
    if fault["type"] in ("missing", "value_error"):
        return ""
    return f", not {shortened(given[:100] if isinstance(given, str) else given)}"


def _field(location: tuple[Any, ...]) -> str:
    """messages[2].content of ("messages", 2, "user", "content", "str"): pydantic also names the branches of unions."""
    name = ""
    for place, part in enumerate(location):
        if isinstance(part, int):
            name += f"[{part}]"
        elif not name:
            name = part
        elif not _is_branch(part, location[place - 1]):
            name += f".{part}"
    return printable(name, 200)


def _is_branch(part: str, before: Any) -> bool:
    return part in _BRANCHES or "[" in part or (part in _ROLES and isinstance(before, int))


_ROLES = ("system", "developer", "user", "assistant", "tool")
_BRANCHES = (
    "str", "int", "bool", "dict", "none", "constrained-str", "constrained-int", "NamedTool", "AllowedChoice",
    "TextPart", "RefusalPart",
)  # fmt: skip
