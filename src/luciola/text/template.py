"""Render one chat template with jinja2, and the worker process which does it for templates we did not write.

A chat template is a program that came with somebody's weights. Jinja's sandbox keeps it from Python's internals, but
nothing inside one process can end `{% for i in range(99999) %}` nested three deep, `'a'.center(10 ** 10)` or the
comparison of two lists nested forty times in themselves: the last two run in C, where no trace function, counter or
signal handler is looked at. So the bound is a process. `chat.py` keeps one worker alive, sends it a line of JSON for
each rendering (about a tenth of a millisecond) and kills it when it is late. The worker itself limits its memory,
and its processor time too, so that it ends even when its parent has died.

Started by file name (`python template.py`), it must not import anything from the package.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

SECONDS = 3.0
MEMORY_MB = 512
MAX_CHARACTERS = 16_000_000  # of the rendered text: four times the longest context anybody serves


class _Refused(Exception):
    """Raised by the template itself, through its `raise_exception` function."""


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` marks the assistant's text in some templates: render what it holds."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise _Refused(message)


def _to_json(value: object, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """As transformers defines the filter: jinja's own would escape `<`, `>` and `&` for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


@lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment.from_string(source)


def render_here(source: str, variables: Mapping[str, object]) -> str:
    """The text which the template `source` makes of `variables`, rendered in this process.

    Raises:
        ValueError: in one sentence, whatever goes wrong: the template does not compile, refuses the messages, uses
            something the sandbox forbids, or writes more than MAX_CHARACTERS.
    """
    try:
        pieces: list[str] = []
        room = MAX_CHARACTERS
        for piece in _compiled(source).generate(variables):
            pieces.append(piece)
            room -= len(piece)
            if room < 0:
                raise ValueError(f"The chat template wrote more than {MAX_CHARACTERS:,} characters.")
        return "".join(pieces)
    except _Refused as error:
        raise ValueError(f"The chat template refuses these messages: {error}") from error
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"The chat template does not compile: line {error.lineno}: {error.message}") from error
    except jinja2.exceptions.SecurityError as error:
        raise ValueError(f"The chat template does what no template may: {error}") from error
    except MemoryError as error:
        raise ValueError(f"The chat template needed more than {MEMORY_MB} MB of memory.") from error
    except ValueError:
        raise
    except Exception as error:  # a template is a program: it can fail in every way a program can
        raise ValueError(f"The chat template failed: {type(error).__name__}: {error}") from error


def _cpu_limiter() -> Callable[[], None]:
    """Limit this process's memory now; the function returned gives it SECONDS of processor time from each call on."""
    try:
        import resource
    except ImportError:  # not a POSIX system: there the parent's clock is the only bound
        return lambda: None
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_MB << 20, MEMORY_MB << 20))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]

    def limit() -> None:
        seconds = math.ceil(time.process_time() + SECONDS) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, hard))

    return limit


def _serve() -> None:
    """Answer JSON lines on standard input, {source, variables}, with lines {text} or {error}, until the input ends."""
    limit_cpu = _cpu_limiter()
    print("ready", flush=True)
    for line in sys.stdin:
        limit_cpu()
        request = json.loads(line)
        try:
            reply = {"text": render_here(request["source"], request["variables"])}
        except ValueError as error:
            reply = {"error": str(error)}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    _serve()
