"""A request's settings as the engine's `SamplingParams`."""

from __future__ import annotations

import re
from typing import Any

from luciola import SamplingParams
from luciola.engine.grammar import Grammar
from luciola.serve.errors import ApiError, naming
from luciola.serve.prompts import check_known
from luciola.serve.protocol import ChatRequest, CompletionRequest, Sampling, StructuredOutputs
from luciola.serve.service import Service

OTHER_NAMES = {  # of the parts of structured_outputs
    "guided_json": "json", "json_schema": "json", "guided_regex": "regex", "regex": "regex", "guided_choice": "choice",
    "guided_grammar": "grammar",
}  # fmt: skip


def params_of(request: ChatRequest | CompletionRequest, service: Service, **chosen: Any) -> SamplingParams:
    """The settings that both kinds of requests have; `chosen` are those that differ.

    Raises:
        ApiError: `SamplingParams` refuses them, or there is no such token.
    """
    biases = {int(token): bias for token, bias in (request.logit_bias or {}).items()}
    check_known(service, biases, "logit_bias")
    check_known(service, request.stop_token_ids or (), "stop_token_ids")
    given: dict[str, Any] = {
        "n": request.n,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": None if request.top_k is None else max(request.top_k, 0),
        "min_p": request.min_p,
        "seed": request.seed,
        "stop": request.stop or None,
        "stop_token_ids": request.stop_token_ids,
        "frequency_penalty": request.frequency_penalty,
        "presence_penalty": request.presence_penalty,
        "repetition_penalty": request.repetition_penalty or request.repeat_penalty,
        "min_tokens": request.min_tokens,
        "ignore_eos": request.ignore_eos,
        "skip_special_tokens": request.skip_special_tokens,
        "prompt_logprobs": request.prompt_logprobs,
        "logit_bias": biases or None,
    }
    settings = service.settings
    defaults = {"temperature": settings.temperature, "top_p": settings.top_p}
    try:
        return SamplingParams(**defaults | {k: v for k, v in (given | chosen).items() if v is not None})
    except ValueError as error:
        raise naming(error, None) from error


def grammar_of(request: Sampling) -> Grammar | None:
    """What the text must follow, by `response_format` or `structured_outputs`; None: anything goes.

    Raises:
        ApiError: both are given, or what is given cannot be used.
    """
    schema = schema_of(request)
    field, wanted = structured_of(request)
    if wanted is not None and schema is not None:
        raise ApiError(f"response_format and {field} cannot be had together", param=field)
    try:
        if wanted is not None:
            return _structured(wanted)
        return None if schema is None else Grammar.json(schema, lenient=not strict(request))
    except ValueError as error:
        field = field or "response_format"
        raise ApiError(f"{field}: {error}", param=field) from error


def strict(request: Sampling) -> bool:
    """Whether the schema of `response_format` is to be kept in every point, or is refused."""
    form = request.response_format
    return form is not None and form.json_schema is not None and form.json_schema.strict is True


def structured_of(request: Sampling) -> tuple[str, StructuredOutputs | None]:
    """What the text must follow, other than by `response_format`, and the field that says so; "" and None: nothing.

    Raises:
        ApiError: several fields do.
    """
    asked = {name: {part: value} for name, part in OTHER_NAMES.items() if (value := getattr(request, name)) is not None}
    given = [*asked, *(["structured_outputs"] if request.structured_outputs is not None else [])]
    if len(given) > 1:
        raise ApiError(f"{' and '.join(given)} cannot be had together; give one", param=given[0])
    if not given:
        return "", None
    return given[0], request.structured_outputs or StructuredOutputs.model_validate(asked[given[0]])


def most_tokens(request: ChatRequest | CompletionRequest, default: int | None) -> int | None:
    """The longest completion that the request asks for, by any of the names; None: what the context holds."""
    names = ("max_completion_tokens", "max_tokens", "n_predict")
    given = (getattr(request, name, None) for name in names)
    asked = next((value for value in given if value is not None), default)
    return None if asked == -1 else asked


def schema_of(request: Sampling) -> dict[str, Any] | bool | None:
    """The JSON schema of `response_format`; None: it asks for text.

    Raises:
        ApiError: it does not say which.
    """
    form = request.response_format
    if form is None:
        return None
    given = form.json_schema.schema_ if form.json_schema is not None else form.schema_
    if form.type == "json_object":
        return {"type": "object"} if given is None else given
    if form.type == "json_schema" and given is None:
        raise ApiError("response_format: the type json_schema needs json_schema.schema", param="response_format")
    if form.type == "text" and given is not None:
        raise ApiError("response_format: a schema goes with the type json_schema", param="response_format")
    return given


def _structured(wanted: StructuredOutputs) -> Grammar:
    given = [name for name, value in wanted.model_dump().items() if value not in (None, False)]
    if len(given) != 1:
        told = " and ".join(given).replace("json_", "json") if given else "none of them"
        raise ValueError(f"give exactly one of json, json_object, regex, choice and grammar, not {told}")
    if wanted.json_ is not None:
        return Grammar.json(wanted.json_)
    if wanted.regex is not None:
        return Grammar.regex(wanted.regex)
    if wanted.choice is not None:
        return Grammar.regex("|".join(re.escape(choice) for choice in wanted.choice))
    if wanted.grammar is not None:
        return Grammar.lark(wanted.grammar)
    return Grammar.json()
