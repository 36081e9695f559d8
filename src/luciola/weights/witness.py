"""Other programs' view of a model, for comparison: transformers in this process, llama.cpp in one of its own.

Neither is needed to run Luciola; both come with the extra `bench` and are imported when asked for.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_START_SECONDS, _REPLY_SECONDS = 600.0, 600.0

# llama.cpp ends its process where an assertion of its fails, so it has a process of its own, which lives for as long as
# its standard input is open. Where its numbers are compared, keys and values stay float32; where its speed is, it has
# its own defaults (float16, its fused attention).
_SERVE = """
import sys, xllamacpp
path, (context, threads, slots, exact) = sys.argv[1], map(int, sys.argv[2:])
params = xllamacpp.CommonParams()
params.verbosity = 1
params.model.path, params.n_ctx, params.n_parallel = path, context * slots, slots
params.port, params.warmup = 0, False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
if exact:
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
else:
    params.n_threads_http = slots + 2
server = xllamacpp.Server(params)
print("\\nlistening at", server.listening_address, flush=True)
sys.stdin.read()
"""


class LlamaCpp:
    """llama.cpp's own server (PyPI: xllamacpp) for one GGUF file; use it in a `with` block.

    Args:
        context: longest sequence, in tokens.
        slots: sequences that are continued together; more requests wait.
        exact: compute in float32 throughout; otherwise as its users run it.

    Attributes:
        address: the URL at which it listens.

    Raises:
        ValueError: llama.cpp cannot load the file; its reason is in the sentence.
    """

    def __init__(self, path: Path, context: int = 512, threads: int = 1, *, slots: int = 1, exact: bool = True) -> None:
        import xllamacpp  # noqa: F401  # so that a missing package is said by its name

        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `close`
        self._path = path
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, str(path), *map(str, (context, threads, slots, int(exact)))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        )
        assert self._process.stdout is not None
        alarm = threading.Timer(_START_SECONDS, self._process.kill)
        alarm.start()
        try:
            for line in self._process.stdout:
                if line.startswith(b"listening at "):
                    self.address = line.removeprefix(b"listening at ").decode().strip()
                    return
        finally:
            alarm.cancel()
        reason = self._last_words()
        self.close()
        raise ValueError(f"llama.cpp cannot load {path}: {reason}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End llama.cpp's process."""
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def _last_words(self) -> str:
        self._process.kill()
        self._process.wait()
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines()]
        telling = [line for line in lines if "error" in line.lower() or "assert" in line.lower()]
        return (telling or [line for line in lines if line] or ["it says nothing"])[0]

    def _post(self, path: str, **body: Any) -> Any:
        request = urllib.request.Request(self.address + path, json.dumps(body).encode())
        try:
            with urllib.request.urlopen(request, timeout=_REPLY_SECONDS) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            raise ValueError(f"llama.cpp refuses {path}: {error.read().decode(errors='replace')[:300]}") from error
        except (OSError, urllib.error.URLError) as error:
            if self._process.poll() is None:
                raise
            raise ValueError(f"llama.cpp ended while running {self._path}: {self._last_words()}") from error

    def tokenize(self, text: str, add_special: bool = False) -> list[int]:
        """The token ids of `text`; special tokens written in it are recognised, others only added if asked for."""
        ids: list[int] = self._post("/tokenize", content=text, add_special=add_special, parse_special=True)["tokens"]
        return ids

    def detokenize(self, ids: list[int]) -> str:
        """The text of token ids."""
        text: str = self._post("/detokenize", tokens=ids)["content"]
        return text

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """The likeliest token, `count` times; tokens that would end the text are never taken."""
        ids: list[int] = self.complete(prompt, count)["tokens"]
        return ids

    def complete(self, prompt: list[int], count: int) -> dict[str, Any]:
        """The server's whole reply to a greedy request from scratch: "tokens", and "timings" as it took them itself."""
        options = {"n_predict": count, "temperature": 0, "return_tokens": True, "ignore_eos": True}
        reply: dict[str, Any] = self._post("/completion", prompt=prompt, cache_prompt=False, **options)
        return reply

    def next_logprobs(self, prompt: list[int], count: int = 10) -> dict[int, float]:
        """Log-probabilities of the likeliest `count` next tokens; none if the likeliest is no whole character."""
        reply = self._post("/completion", prompt=prompt, n_predict=1, temperature=0, n_probs=count, cache_prompt=True)
        steps = reply.get("completion_probabilities", [])
        return {top["id"]: top["logprob"] for step in steps for top in step["top_logprobs"]}


def transformers_model(folder: Path) -> Any:
    """The model in a Hugging Face folder as transformers' own class loads it, float32, for evaluation.

    Raises:
        ValueError: transformers has no class for this family, or does not load the folder.
    """
    import transformers as library

    transformers: Any = library
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        # eager experts: the grouped matrix product takes only widths that are multiples of four
        options = {"dtype": "float32", "experts_implementation": "eager", "trust_remote_code": False}
        return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"transformers {transformers.__version__} does not load {folder}: {reason}") from error
