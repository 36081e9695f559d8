"""What breaks into the engine from outside: Ctrl-C, weights that change meanwhile, other threads, collected garbage,
the end of the process."""

import asyncio
import copy
import gc
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from luciola.engine.engine import Engine
from luciola.engine.params import SamplingParams
from luciola.engine.sampler import NothingAllowedError
from luciola.engine.speculate import TRIAL, Pace
from luciola.model.language_model import LanguageModel

LONG = SamplingParams(max_tokens=40, temperature=0.9, seed=1, ignore_eos=True, logprobs=True)
PROMPT = [3, 4, 5, 6, 7, 8, 9, 10, 11]


@pytest.fixture
def own(lm: LanguageModel) -> LanguageModel:
    """A model that the test may change."""
    return LanguageModel(copy.deepcopy(lm.model), lm.tokenizer)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt even where it was ignored when the tests were started, as shells do for what
    runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupts(seed: int) -> Iterator[float]:
    """Times until the next Ctrl-C, in seconds."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield 1e-4 + 4e-3 * torch.rand((), generator=generator).item()


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_at_any_time_leaves_the_books_in_order(lm: LanguageModel) -> None:
    engine = Engine(lm, dtype="model", block_size=2, max_cached_tokens=160)
    expected = engine.generate([PROMPT] * 3, LONG)
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    broken = 0
    for delay, _ in zip(interrupts(0), range(60), strict=False):
        try:
            signal.setitimer(signal.ITIMER_REAL, delay)
            engine.generate([PROMPT] * 3, LONG)
        except KeyboardInterrupt:
            broken += 1
        finally:
            try:
                signal.setitimer(signal.ITIMER_REAL, 0)
                time.sleep(0)  # one that is on its way arrives here
            except KeyboardInterrupt:
                pass
        engine._pool.check([])
        assert engine.stats["running"] == engine.stats["waiting"] == 0
        assert signal.getsignal(signal.SIGINT) is before
    assert broken > 8
    assert engine.generate([PROMPT] * 3, LONG) == expected


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_waits_for_the_end_of_the_step(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(lm, dtype="model")
    real, reached = engine._runner._record, []

    def record(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        reached.append(1)
        return real(*arguments)

    monkeypatch.setattr(engine._runner, "_record", record)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([PROMPT], LONG)
    assert reached == [1]
    engine._pool.check([])


def test_what_was_begun_with_other_weights_is_never_found(own: LanguageModel) -> None:
    engine = Engine(own, dtype="model", block_size=4)
    stream = engine.stream(PROMPT, LONG)
    next(stream)
    with torch.no_grad():
        own.model.embed_tokens.weight.mul_(-0.5)
    engine.generate([[*PROMPT, 3]], SamplingParams(max_tokens=1))
    row = engine._scheduler.running[0]
    for _ in stream:  # goes on, and fills blocks of which the first tokens are of before
        pass
    assert row.done and len(row.tokens) > 40
    again = engine.generate([row.tokens], LONG)[0][0]
    assert again.cached_tokens <= len(PROMPT)
    anew = Engine(own, dtype="model", prefix_cache=False).generate([row.tokens], LONG)[0][0]
    assert again.token_ids == anew.token_ids
    torch.testing.assert_close(again.logprobs, anew.logprobs, rtol=1e-4, atol=1e-4)


def test_a_router_bias_that_changes_is_noticed(own: LanguageModel) -> None:
    engine = Engine(own, dtype="model", block_size=2)
    engine.generate([PROMPT], LONG)
    gate: Any = own.model.moe_layers[0].gate
    with torch.no_grad():
        gate.e_score_correction_bias.copy_(torch.linspace(3, -3, 6))
    found = engine.generate([PROMPT], LONG)[0][0]
    assert found.cached_tokens == 0
    assert found == Engine(own, dtype="model").generate([PROMPT], LONG)[0][0]


def test_abort_reaches_those_whose_prompt_another_one_reads(lm: LanguageModel) -> None:
    engine = Engine(lm, dtype="model", chunk=1)
    found: list[Any] = []
    params = SamplingParams(n=4, max_tokens=20, ignore_eos=True)
    thread = threading.Thread(target=lambda: found.append(engine.generate([PROMPT * 7], params)))
    thread.start()
    while not engine.stats["steps"]:
        time.sleep(0.0001)
    engine.abort()
    thread.join(10)
    assert [(c.finish_reason, len(c.token_ids)) for c in found[0][0]] == [("abort", 0)] * 4
    engine._pool.check([])


def test_weights_that_cannot_be_prepared_are_the_callers_error_and_nobody_hangs(own: LanguageModel) -> None:
    engine = Engine(own, dtype="model")
    expected = engine.generate([PROMPT], LONG)
    layer: Any = own.model.layers[0]
    good = layer.self_attn.o_proj.weight.data

    async def ask() -> list[Any]:
        return [delta async for delta in engine.stream_async(PROMPT, LONG)]

    layer.self_attn.o_proj.weight.data = torch.zeros(3)
    for _ in range(2):
        with pytest.raises(ValueError, match="weight must be a matrix"):
            asyncio.run(asyncio.wait_for(ask(), 10))
        with pytest.raises(ValueError, match="weight must be a matrix"):
            engine.generate([PROMPT], LONG)
    layer.self_attn.o_proj.weight.data = good
    assert asyncio.run(asyncio.wait_for(ask(), 10))[-1].completion == expected[0][0]


def test_whoever_waits_for_another_threads_step_sees_it_whole(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(lm, dtype="model")
    params = SamplingParams(max_tokens=30, temperature=0.9, seed=1, stop=["zzzz"])
    expected = engine.generate([PROMPT], params)[0][0].text
    real = engine._runner.finish

    def finish(sequences: Any) -> None:
        time.sleep(0.12)  # longer than a waiting thread's patience
        real(sequences)

    monkeypatch.setattr(engine._runner, "finish", finish)

    async def another() -> None:
        async for _ in engine.stream_async([3], SamplingParams(max_tokens=85, ignore_eos=True)):
            pass

    for _ in range(3):
        thread = threading.Thread(target=lambda: asyncio.run(another()))
        thread.start()
        assert "".join(engine.stream(PROMPT, params)) == expected
        assert engine.generate([PROMPT], params)[0][0].text == expected
        thread.join()


def test_a_stream_that_the_collector_finds_within_a_step_ends(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(lm, dtype="model")

    class Cycle:
        pass

    cycle: Any = Cycle()
    cycle.itself, cycle.stream = cycle, engine.stream(PROMPT, LONG)
    next(cycle.stream)
    real = engine._runner._record

    def record(*arguments: Any) -> Any:
        if engine.stats["steps"] < 3:
            gc.collect()
        return real(*arguments)

    monkeypatch.setattr(engine._runner, "_record", record)
    del cycle
    done: list[Any] = []
    thread = threading.Thread(target=lambda: done.append(engine.generate([[3]], LONG)), daemon=True)
    thread.start()
    thread.join(20)
    assert done, "the step waits for itself"
    engine._pool.check([])


def test_the_process_ends_while_streams_run() -> None:
    program = """
        import asyncio
        from luciola.engine.engine import Engine
        from luciola.engine.params import SamplingParams
        from luciola.model.language_model import LanguageModel
        shape = {"model_type": "llama", "vocab_size": 2000, "hidden_size": 64, "intermediate_size": 128,
                 "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 4096}
        engine = Engine(LanguageModel.create(shape), dtype="float32")
        async def first():
            streams = [engine.stream_async([i], SamplingParams(max_tokens=4000, ignore_eos=True)) for i in range(8)]
            print(*[(await anext(s)).token_ids for s in streams])
            import os; os.write(1, b"out\\n")
            raise SystemExit(0)
        asyncio.run(first())
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.endswith("out\n")


def test_one_request_that_fails_does_not_lose_the_others(lm: LanguageModel) -> None:
    engine = Engine(lm, dtype="model")
    V = lm.config.vocab_size
    bad = SamplingParams(max_tokens=9, min_tokens=3, stop_token_ids=tuple(range(V)))
    good = engine.generate([PROMPT], LONG)[0]
    with pytest.raises(NothingAllowedError) as caught:
        engine.generate([PROMPT, PROMPT, PROMPT], [LONG, bad, LONG])
    completions: Any = caught.value.completions  # type: ignore[attr-defined]
    assert [completions[0], completions[2]] == [good, good]
    assert completions[1][0].token_ids == []


def test_short_prompts_count_as_prompts(lm: LanguageModel) -> None:
    """However many there are, a step reads `chunk` tokens of prompts at the most."""
    engine = Engine(lm, dtype="model", chunk=5)
    read = [0]
    for _ in engine._run([row for group in engine._requests.sequences([[3, 4, 5]] * 20, LONG, 0) for row in group]):
        read.append(int(engine.stats["prompt_tokens"] + engine.stats["cached_tokens"]))
    assert max(b - a for a, b in itertools.pairwise(read)) <= 5
    assert read[-1] == 60


def test_drafts_of_which_none_was_ever_right_stop_however_cheap() -> None:
    pace, lucky = Pace(), Pace()
    for step in range(TRIAL):
        assert pace.paying and lucky.paying
        pace.judge(2, 0, 8, cost=0.9)
        lucky.judge(2, int(step == 0), 8, cost=0.9)
    assert not pace.paying and lucky.paying


def test_threads_leave_no_memory_behind(lm: LanguageModel) -> None:
    engine = Engine(lm, dtype="model")

    def resident() -> int:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE")

    def call() -> None:
        thread = threading.Thread(target=engine.generate, args=([PROMPT] * 8, SamplingParams(max_tokens=3)))
        thread.start()
        thread.join()

    for _ in range(60):
        call()
    before = resident()
    for _ in range(240):
        call()
    assert resident() - before < 12 << 20


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_reaches_a_listener_at_once_and_no_block_is_lost(lm: LanguageModel) -> None:
    """What is called when a completion ends may take its time, or hang."""
    engine, began = Engine(lm, dtype="model"), time.monotonic()

    def hangs(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)
        time.sleep(60)

    with pytest.raises(KeyboardInterrupt):
        engine.generate([[3, 4, 5], [6, 7]], SamplingParams(max_tokens=4, ignore_eos=True), ended=hangs)
    assert time.monotonic() - began < 30
    assert engine.blocks_used == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert engine.generate([[3, 4, 5]], SamplingParams(max_tokens=4))
