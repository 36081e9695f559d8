"""Chat messages to prompt text, and completion text back to (thinking, answer).

Messages are OpenAI's: dicts with "role" and "content". The prompt's shape is the chat template's business, a jinja2
program which a model carries with it; `DEFAULT_TEMPLATE` is the one of DeepSeek-V3 and R1. Templates that came with a
model run in a worker process with limits of time and memory (`template.py` says why); our own runs right here.
"""

import atexit
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from luciola.text import template as program
from luciola.text.template import MAX_CHARACTERS, MEMORY_MB, SECONDS, render_here

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK, END_THINK = "<think>", "</think>"

# bos, the system texts, then turns without any space between them. Only the last message keeps its thinking: earlier
# thoughts are not part of the conversation.
DEFAULT_TEMPLATE = """\
{%- if tools %}{{ raise_exception("this template has no place for tools") }}{% endif %}
{{- bos_token }}
{%- for message in messages if message['role'] == 'system' %}
    {{- '' if loop.first else '\\n\\n' }}{{ message['content'] }}
{%- endfor %}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {{- '<｜User｜>' + message['content'] }}
    {%- elif message['role'] == 'assistant' %}
        {%- set text = message['content'] if loop.last else message['content'].split('</think>')[-1] %}
        {{- '<｜Assistant｜>' + text + eos_token }}
    {%- elif message['role'] != 'system' %}
        {{- raise_exception("role '" + message['role'] + "' is not one of system, user, assistant") }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}
"""

_START_SECONDS = 60.0  # for an interpreter to start on a machine that is busy with training
_MAX_REPLY_BYTES = 12 * MAX_CHARACTERS  # JSON writes a character beyond the basic plane in twelve bytes


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    bos_token: str | None = None,
    eos_token: str | None = None,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The prompt text which `template` (jinja2 source) makes of `messages`.

    `variables` are further names the template may ask for, such as `enable_thinking`.

    Raises:
        ValueError: in one sentence, when the template does not compile, refuses the messages, breaks out of the
            sandbox, or needs more than SECONDS, MEMORY_MB or MAX_CHARACTERS.
    """
    names = {
        **(variables or {}),
        "messages": list(messages),
        "tools": None if tools is None else list(tools),
        "add_generation_prompt": add_generation_prompt,
        "bos_token": bos_token or "",
        "eos_token": eos_token or "",
    }
    if template == DEFAULT_TEMPLATE:
        return render_here(template, names)
    try:
        request = json.dumps({"source": template, "variables": names})
    except TypeError as error:
        raise ValueError(f"Chat messages must be plain JSON values (text, numbers, lists, dicts): {error}") from error
    return _Worker.here().render(request)


def split_reasoning(text: str) -> tuple[str | None, str]:
    """A completion's (thinking, answer), split at the first `</think>`; thinking is None when there is none.

    The opening tag may be missing, as templates often end the prompt with it. An opening tag which is never closed
    gives everything after it as thinking and an empty answer. Blank space around the thinking, and before the answer,
    belongs to the markup and is dropped.
    """
    head, closed, answer = text.partition(END_THINK)
    opened = head.lstrip().startswith(THINK)
    if not closed and not opened:
        return None, text
    thinking = head.lstrip().removeprefix(THINK)
    return thinking.strip(), answer.lstrip()


class _Worker:
    """The process which renders foreign templates: started when first needed, replaced after it had to be killed."""

    _of_process: ClassVar["dict[int, _Worker]"] = {}  # by process id: a forked child must not share its parent's pipe
    _choosing = threading.Lock()

    @classmethod
    def here(cls) -> "_Worker":
        with cls._choosing:
            if os.getpid() not in cls._of_process:
                cls._of_process[os.getpid()] = cls()
            return cls._of_process[os.getpid()]

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self._stop)

    def render(self, request: str) -> str:
        """Send one line of JSON, return the text of the reply; ValueError for an error reply, or none in time."""
        with self._lock:
            if self._process is not None and self._process.poll() is not None:
                self._stop()  # somebody else has killed it
            process = self._process = self._process or self._start()
            assert process.stdin is not None
            try:
                process.stdin.write(request.encode() + b"\n")
                process.stdin.flush()
                reply = json.loads(self._read_line(process, SECONDS))
            except TimeoutError as error:
                self._stop()
                raise ValueError(
                    f"The chat template ran for more than {SECONDS:g} seconds and was ended; it may loop for ever."
                ) from error
            except (OSError, EOFError) as error:
                self._stop()
                raise ValueError(
                    f"The chat template ended its process: it needs more than {MEMORY_MB} MB of memory, or crashes."
                ) from error
            except BaseException:  # an interrupt must not leave this reply in the pipe for the next caller
                self._stop()
                raise
        if "error" in reply:
            raise ValueError(reply["error"])
        return str(reply["text"])

    def _start(self) -> "subprocess.Popen[bytes]":
        # The child sees the same modules (PYTHONPATH) but none of the user's environment, and stands in a session of
        # its own so that Ctrl-C reaches only the parent. -P keeps this folder's file names out of its imports.
        keep = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "TZ") if name in os.environ}
        process = subprocess.Popen(
            [sys.executable, "-P", program.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), **keep},
            start_new_session=True,
        )
        try:
            self._read_line(process, _START_SECONDS)
        except (TimeoutError, EOFError) as error:
            process.kill()
            process.communicate()
            raise RuntimeError("The process that renders chat templates did not start.") from error
        return process

    @staticmethod
    def _read_line(process: "subprocess.Popen[bytes]", seconds: float) -> bytes:
        assert process.stdout is not None
        descriptor, deadline, line = process.stdout.fileno(), time.monotonic() + seconds, bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError
                piece = os.read(descriptor, 1 << 20)
                if not piece or len(line) > _MAX_REPLY_BYTES:
                    raise EOFError
                line += piece
        return bytes(line)

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
