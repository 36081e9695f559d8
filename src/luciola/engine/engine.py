"""The engine: prompts in, completions out, from the very model object that training updates.

One loop serves everybody: `generate` (wait for all), `stream` (read one as it grows), `stream_async` (many at once,
from an event loop). Each call adds its sequences; whoever waits drives the loop, and every step continues all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch

from luciola import hardware
from luciola.engine.blocks import BlockPool
from luciola.engine.cache import PagedCache
from luciola.engine.loop import Loop, interrupts
from luciola.engine.params import SamplingParams
from luciola.engine.requests import Prompt, Requests
from luciola.engine.runner import Runner
from luciola.engine.scheduler import Scheduler
from luciola.engine.sequence import Completion, Delta
from luciola.engine.sequence import Sequence as Row
from luciola.engine.speculate import Speculator
from luciola.engine.weights import Weights
from luciola.model.language_model import LanguageModel
from luciola.model.native import build
from luciola.model.quant import BLOCK, GROUPS
from luciola.model.quant_layers import Report, is_quantised
from luciola.model.transformer import Transformer
from luciola.text.untrusted import shortened

BLOCK_SIZE = 16  # tokens of a block
MAX_RUNNING = 1024  # sequences that run at once
CHUNK = 8192  # prompt tokens that one step reads
MOST_TOKENS = 1 << 20  # that the cache holds unless more are asked for
BOOKS = 64  # bytes that a block takes in the books of the pool


class Engine:
    """Batched generation with a `LanguageModel`.

    Args:
        lm: the model; it is used in place unless `dtype` or `quantize` ask for other weights. Then a copy is used,
            which is made anew at the first request after training has changed the model.
        dtype: "auto" measures which precision this machine multiplies fastest; "float32", "bfloat16", or "model" to
            take the weights as they are.
        quantize: None: weights as they are. "int8" or "int4": matrices in groups of 8 or 4 bit numbers, each with the
            fewest bits that a measured error allows (`engine.quantization` says which). Weights that were loaded with
            `quantized=True` are quantised already: leave it None.
        group_size: with `quantize`, numbers that share a scale: 32, 64 or 128. More take less memory, less exactly.
        max_cached_tokens: tokens that the cache has room for; what does not fit waits. None: as many as fit into a
            quarter of the memory that is free now, a million at the most.
        speculate: None, "mtp" (guess with the model's multi-token prediction modules) or "ngram" (guess that what
            followed the last tokens before will follow again). It changes the speed, never the tokens.
        prefix_cache: keep what has been computed, for prompts that begin in the same way.
        chunk: prompt tokens that one step reads, so that long prompts do not hold up those who are being answered.
        max_running: sequences that are continued at once.
        block_size: tokens of a block of the cache, not more than it holds.
        parity: compute every token, of prompts too, by the kernels whose result for a row never depends on other rows,
            so that logits equal those of `lm.model.exact_logits` bit for bit (float32, CPU, C compiler).

    Raises:
        ValueError: an argument makes no sense or needs what this model or machine lacks.
    """

    def __init__(
        self,
        lm: LanguageModel,
        dtype: str = "auto",
        quantize: str | None = None,
        max_cached_tokens: int | None = None,
        *,
        group_size: int = BLOCK,
        speculate: str | None = None,
        prefix_cache: bool = True,
        chunk: int = CHUNK,
        max_running: int = MAX_RUNNING,
        block_size: int = BLOCK_SIZE,
        parity: bool = False,
    ) -> None:
        if not isinstance(lm, LanguageModel):
            raise ValueError(f"lm={shortened(lm)} must be a LanguageModel; luciola.load(path) gives one")
        numbers = {
            "max_cached_tokens": max_cached_tokens,
            "chunk": chunk,
            "max_running": max_running,
            "block_size": block_size,
        }
        for name, number in numbers.items():
            if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
                raise ValueError(f"{name}={shortened(number)} must be a whole number, at least 1")
        for name, flag in (("prefix_cache", prefix_cache), ("parity", parity)):
            if not isinstance(flag, bool):
                raise ValueError(f"{name}={shortened(flag)} must be True or False")
        if quantize not in (None, "int8", "int4"):
            raise ValueError(f"quantize={quantize!r} is unknown; choose None, 'int8' or 'int4'")
        if not isinstance(group_size, int) or group_size not in GROUPS:
            raise ValueError(f"group_size={shortened(group_size)} must be one of {', '.join(map(str, GROUPS))}")
        if group_size != BLOCK and quantize is None:
            raise ValueError(f"group_size={group_size} goes with quantize='int8' or 'int4'; give one of them too")
        quantised = is_quantised(lm.model)
        if quantised and quantize is not None:
            raise ValueError(
                f"quantize={quantize!r} cannot be had: the weights are quantised already; leave it out, or load the "
                "model without quantized=True"
            )
        self.tokenizer, self.config = lm.tokenizer, lm.config
        parameter = next(lm.model.parameters())
        wanted = parameter.dtype if dtype == "model" else getattr(torch, hardware.choose_dtype(dtype)[0])
        if parity and (reason := _no_parity(wanted, parameter.device, quantised or quantize is not None)):
            raise ValueError(f"parity=True needs {reason}")
        self.dtype, self.device = wanted, parameter.device
        bits = {"int8": 8, "int4": 4}.get(quantize or "")
        self._weights = Weights(lm.model, wanted, bits, group_size)
        self._speculator = Speculator(self.model, speculate) if speculate is not None else None
        layers = self.config.num_hidden_layers + (self._speculator.layers if self._speculator else 0)
        self.cache_bytes_per_token = self.config.cached_per_token_and_layer * layers * (torch.finfo(wanted).bits // 8)
        if max_cached_tokens is None:
            fits = hardware.available_memory_bytes() // 4 // self.cache_bytes_per_token
            max_cached_tokens = min(MOST_TOKENS, max(4096, fits))
        blocks = _blocks(max_cached_tokens, block_size, self.cache_bytes_per_token, self.device)
        self.max_cached_tokens = blocks * block_size
        max_running = min(max_running, blocks)
        self._pool = BlockPool(blocks, block_size)
        self._scheduler = Scheduler(self._pool, max_running, chunk)
        try:
            self._cache = PagedCache(self.config, layers, blocks, block_size, max_running, wanted, self.device)
        except (OSError, MemoryError) as error:  # a limit of the process, say
            raise ValueError(
                f"max_cached_tokens={max_cached_tokens} needs more memory than the system gives; make it smaller"
            ) from error
        self._ends = frozenset(_end_tokens(lm))
        self._runner = Runner(
            self.model, lm.tokenizer, self._scheduler, self._cache, self._ends, self._speculator, prefix_cache, parity
        )
        self._requests = Requests(self.config, lm.tokenizer, self.max_cached_tokens, self._ends)
        self._loop = Loop(self._step)

    @property
    def model(self) -> Transformer:
        """What is computed with: the model that was given, or a copy of it in another form."""
        return self._weights.model

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The tokens that end a completion."""
        return self._ends

    @property
    def quantization(self) -> Report | None:
        """Which matrices have how many bits; None without `quantize`."""
        return self._weights.report

    @property
    def blocks_used(self) -> int:
        """Blocks of the cache that running sequences hold."""
        return self._pool.used

    @property
    def blocks_free(self) -> int:
        """Blocks that can be had, those included that keep a prefix for later."""
        return self._pool.free

    @property
    def expert_load(self) -> dict[int, list[int]]:
        """Of each layer with experts, how many tokens each expert was given since the engine was made."""
        load = self._runner.expert_load
        return dict(zip(load.layers, load.counts().tolist(), strict=True))

    @property
    def stats(self) -> dict[str, int | float]:
        """Counts since the engine was made: steps, tokens of prompts that were computed and that the cache saved,
        generated tokens, tokens read in all, preemptions; drafts of speculation, their tokens, and how many of these
        the model accepted; tokens drawn under a grammar and the seconds that took; requests running and waiting now;
        blocks of the cache, and how many of them running sequences hold now."""
        return self._runner.counts() | {
            "preemptions": self._scheduler.preemptions,
            "running": len(self._scheduler.running),
            "waiting": sum(1 + len(row.followers) for row in self._scheduler.waiting),
            "blocks_total": self._pool.blocks,
            "blocks_used": self._pool.used,
        }

    def generate(
        self,
        prompts: Iterable[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        priority: int = 0,
        ended: Callable[[int, Completion], None] | None = None,
    ) -> list[list[Completion]]:
        """Complete every prompt; result[i] holds the n completions of prompts[i].

        Args:
            prompts: texts, encoded as they are (use `lm.tokenizer.chat` for conversations), or lists of token ids.
            params: one for all prompts, or one for each; None: the defaults of `SamplingParams`.
            priority: 0 or more; lower numbers are served first.
            ended: called with i and a completion of prompts[i] as soon as it is there, while others are still being
                generated; an exception of its own ends them all.

        Raises:
            ValueError: a prompt is empty, has a token outside the vocabulary or leaves no room in the model's context
                or in the cache; a grammar cannot be satisfied.
            NotFiniteError: the model's logits are infinite or NaN.
            Where one request fails while it runs the others are finished all the same: the exception's `completions`
            holds the result, that of the failed one as far as it came.
        """
        if isinstance(prompts, str | bytes | bytearray):
            raise ValueError("prompts must be a list; put the single prompt in brackets")
        if not isinstance(prompts, Iterable) or isinstance(prompts, Mapping):
            raise ValueError(f"prompts={shortened(prompts)} must be a list of texts or lists of token ids")
        if ended is not None and not callable(ended):
            raise ValueError(f"ended={shortened(ended)} must be a function of (i, completion), or None")
        groups = self._requests.sequences(list(prompts), params, priority)
        rows = [row for group in groups for row in group]
        places = {id(row): i for i, group in enumerate(groups) for row in group}
        with interrupts.held(), contextlib.closing(self._run(rows)) as steps:
            for done in steps:
                if ended is None or not done:
                    continue
                with interrupts.let_go():
                    for row in done:
                        if row.error is None:
                            ended(places[id(row)], row.completion(self.tokenizer))
        completions = [[row.completion(self.tokenizer) for row in group] for group in groups]
        for row in rows:
            if row.error is not None:
                row.error.completions = completions  # type: ignore[attr-defined]
                raise row.error
        return completions

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, priority: int = 0) -> Iterator[str]:
        """Yield the text of one completion as it grows; a character is held back until it is whole, a text that may
        become a stop text until it is known."""
        if params is None:
            params = SamplingParams()
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer, so its tokens cannot be streamed as text; use generate")
        if isinstance(params, SamplingParams) and params.n != 1:
            raise ValueError(f"one completion can be streamed, not n={params.n}; use generate")
        ((row,),) = self._requests.sequences([prompt], params, priority, streamed=True)
        told: deque[Delta | Exception] = deque()  # another thread may be adding to it
        row.listener = told.append
        with contextlib.closing(self._run([row])) as steps:
            for _ in steps:
                while told:
                    message = told.popleft()
                    if isinstance(message, Exception):
                        raise message
                    if message.text:
                        yield message.text

    async def stream_async(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        priority: int = 0,
        stop_thinking: threading.Event | None = None,
        inside: bool | None = None,
    ) -> AsyncGenerator[Delta, None]:
        """Yield what each step adds to the completions of a prompt; the last delta of each brings the whole.

        Many of these may run at once, in one or several event loops: one thread of the engine serves them together, and
        prompts are made ready (encoded, grammars compiled) in threads of asyncio's, so that no event loop waits.
        Once `stop_thinking` is set, thinking ends at the next token, as if its budget were spent. `inside` says whether
        the prompt ends in the midst of thinking, for those who know; None: if it ends with `<think>`.
        Closing the iterator, or cancelling the task that reads it, ends the request and frees its blocks within a step.
        """
        prepare = partial(self._requests.sequences, [prompt], params, priority, True, stop_thinking, inside)
        (rows,) = await asyncio.to_thread(prepare)  # cancelled meanwhile, nothing has begun
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Delta | Exception] = asyncio.Queue()

        def tell(message: Delta | Exception) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(queue.put_nowait, message)

        for row in rows:
            row.listener = tell
        self._loop.drive(partial(self._begin, rows))
        left = len(rows)
        try:
            while left:
                message = await queue.get()
                if isinstance(message, Exception):
                    raise message
                left -= message.completion is not None
                yield message
        finally:
            if left:
                self._loop.ask(partial(self._end, rows))

    @property
    def step_sizes(self) -> list[int]:
        """How many steps read so many tokens, prompts' and drafts included: [i] those of less than 2^i, but not of less
        than 2^(i-1)."""
        return list(self._runner.step_sizes)

    def abort(self) -> None:
        """End every request at once; whoever waits for one gets what there is, with finish_reason "abort"."""
        with self._loop.held():
            rows = [*self._scheduler.running, *self._scheduler.waiting]
            self._end([*rows, *(follower for row in rows for follower in row.followers)])

    def forget(self) -> None:
        """Forget all prefixes. Needed only where weights were changed behind autograd's back (through `p.data`)."""
        with self._loop.held():
            self._pool.forget()

    def _run(self, rows: list[Row]) -> Generator[list[Row], None, None]:
        """Drive the loop until these have ended; yields those that have, after every step. Left early, they are
        ended."""
        left = rows
        try:
            self._loop.ask(partial(self._begin, rows))
            while left:
                self._loop.turn()
                done = [row for row in left if row.done]
                if done:
                    left = [row for row in left if not row.done]
                yield done
        finally:
            if left:
                self._loop.ask(partial(self._end, left))

    def _step(self) -> bool:
        """One step of the loop; returns whether there is more to do."""
        scheduler = self._scheduler
        if not scheduler.running and not scheduler.waiting:
            return False
        try:
            self._runner.step()
        except BaseException as error:
            # What fails for all at once (memory, say) ends those that ran, and the engine goes on; what only breaks the
            # step off ends nobody. Either may have left the books half written.
            if isinstance(error, Exception):
                failed = list(scheduler.running)
                for row in failed:
                    row.error = _own(error)
                self._runner.finish(failed)
            scheduler.recover()
            if not isinstance(error, Exception):
                raise
        return bool(scheduler.running or scheduler.waiting)

    def _begin(self, rows: list[Row]) -> None:
        try:
            if self._weights.follow():
                self._pool.forget()  # what the cache keeps was computed with other weights
                self._runner.take(self.model)
        except Exception as error:
            for row in rows:
                row.error = _own(error)
            self._runner.finish(rows)
            return
        now = time.perf_counter()
        for row in rows:
            row.arrived = now
            if row.leader is None:
                self._scheduler.add(row)

    def _end(self, rows: list[Row]) -> None:
        ended = [row for row in rows if not row.ended]
        for row in ended:
            row.finish = "abort"
        self._runner.finish(ended)


def _blocks(tokens: int, block_size: int, bytes_per_token: int, device: torch.device) -> int:
    """The blocks of a cache for so many tokens, if there can be such a cache."""
    if block_size > max(tokens, BLOCK_SIZE):
        raise ValueError(f"block_size={block_size} must be at most max_cached_tokens={tokens}")
    blocks = -(-tokens // block_size)
    # Only what is written takes memory, so that the cache may be larger than what is free now.
    most = hardware.memory_bytes()
    if device.type == "cpu" and blocks * (block_size * bytes_per_token + BOOKS) > most:
        fit = most // (bytes_per_token + -(-BOOKS // block_size))
        raise ValueError(
            f"max_cached_tokens={tokens} needs more memory than this machine has; it has room for about {fit}"
        )
    return blocks


def _own(error: Exception) -> Exception:
    """A copy for one request: who catches it may write on it, and raising it lengthens its traceback."""
    twin: Exception | None = None
    with contextlib.suppress(Exception):  # what an exception needs to be made again is up to its class
        twin = copy.copy(error)
    if twin is None or type(twin) is not type(error) or twin is error or str(twin) != str(error):
        twin = RuntimeError(str(error) or type(error).__name__)
        twin.__cause__ = error
        return twin
    twin.__cause__, twin.__context__ = error.__cause__, error.__context__
    return twin.with_traceback(error.__traceback__)


def _no_parity(dtype: torch.dtype, device: torch.device, quantised: bool) -> str:
    """What parity lacks here; empty if nothing."""
    if dtype != torch.float32 or device.type != "cpu" or quantised:
        return "float32 weights on a CPU, not quantised"
    return build.reason() and f"the native kernels ({build.reason()})"


def _end_tokens(lm: LanguageModel) -> list[int]:
    """Every token that ends a text, by the tokenizer's word or the configuration's."""
    ends = set(lm.tokenizer.eos_token_ids) if lm.tokenizer is not None else set()
    configured = lm.config.eos_token_id
    if configured is not None:
        ends |= {configured} if isinstance(configured, int) else set(configured)
    return sorted(ends)
