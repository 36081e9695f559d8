"""The loop behind `generate`, `stream` and `stream_async`: many at once, aborts at every stage, errors that stay with
the request they belong to."""

import asyncio
import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from luciola.engine.engine import Engine
from luciola.engine.loop import Loop
from luciola.engine.params import SamplingParams
from luciola.engine.sampler import NotFiniteError
from luciola.engine.sequence import Completion
from luciola.model.language_model import LanguageModel

LONG = SamplingParams(max_tokens=60, temperature=0.9, seed=1, ignore_eos=True)


def prompts(count: int) -> list[list[int]]:
    return [[3 + i % 17, *range(4, 5 + i % 7)] for i in range(count)]


async def collect(engine: Engine, prompt: Any, params: SamplingParams, **more: Any) -> list[Completion]:
    """All completions of a prompt, having checked that their deltas make them up."""
    texts, tokens, done = [""] * params.n, [[] for _ in range(params.n)], [None] * params.n  # type: ignore[var-annotated]
    async for delta in engine.stream_async(prompt, params, **more):
        texts[delta.index] += delta.text
        tokens[delta.index] += delta.token_ids
        if delta.completion is not None:
            done[delta.index] = delta.completion
    assert [c.text for c in done] == texts
    assert [c.token_ids for c in done] == tokens
    return done


def settle(engine: Engine) -> None:
    """Wait until nothing runs any more."""
    limit = time.monotonic() + 10
    while engine.stats["running"] or engine.stats["waiting"] or not engine._loop.idle:
        assert time.monotonic() < limit, engine.stats
        with engine._loop.held():
            pass
        time.sleep(0.001)


def all_blocks_are_back(engine: Engine) -> None:
    assert engine.blocks_used == 0
    assert (engine.stats["running"], engine.stats["waiting"]) == (0, 0)
    engine._pool.check([])


def test_many_streams_at_once_are_each_what_generate_gives(lm: LanguageModel) -> None:
    params = [SamplingParams(max_tokens=3 + i, temperature=0.8, seed=i, n=1 + i % 3) for i in range(12)]
    expected = Engine(lm, dtype="model").generate(prompts(12), params)
    engine = Engine(lm, dtype="model", max_cached_tokens=160, block_size=4)

    async def everybody() -> list[list[Completion]]:
        return list(await asyncio.gather(*(collect(engine, p, s) for p, s in zip(prompts(12), params, strict=True))))

    assert asyncio.run(everybody()) == expected
    settle(engine)
    all_blocks_are_back(engine)


def test_a_stream_that_is_left_frees_its_blocks_and_disturbs_nobody(lm: LanguageModel) -> None:
    """After its first delta, before it, and by cancelling the task that reads it."""
    engine = Engine(lm, dtype="model", block_size=4)
    (expected,) = engine.generate([prompts(1)[0]], LONG)

    async def leave_after(count: int) -> None:
        stream = engine.stream_async(prompts(3)[2], SamplingParams(max_tokens=80, n=3, ignore_eos=True))
        async for _ in stream:
            if count == 0:
                break
            count -= 1
        await stream.aclose()  # type: ignore[attr-defined]

    async def cancelled() -> None:
        task = asyncio.create_task(collect(engine, prompts(2)[1], SamplingParams(max_tokens=80, ignore_eos=True)))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def everybody() -> list[Completion]:
        stays = asyncio.create_task(collect(engine, prompts(1)[0], LONG))
        await asyncio.gather(leave_after(0), leave_after(5), cancelled())
        return await stays

    assert asyncio.run(everybody()) == expected
    settle(engine)
    all_blocks_are_back(engine)


def test_a_generator_left_early_gives_its_blocks_back(lm: LanguageModel) -> None:
    engine = Engine(lm, dtype="model")
    for count in (0, 1, 7):
        stream = engine.stream([3, 4, 5], LONG)
        for _ in range(count):
            next(stream)
        stream.close()  # type: ignore[attr-defined]
        all_blocks_are_back(engine)
    for _ in engine.stream([3, 4, 5], LONG):
        break
    gc.collect()
    all_blocks_are_back(engine)


@pytest.mark.parametrize("when", ["prefill", "decode"])
def test_ctrl_c_gives_everything_back_and_the_engine_goes_on(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    engine = Engine(lm, dtype="model", block_size=4)
    expected = engine.generate(prompts(5), LONG)
    name = "hidden" if when == "prefill" else "decode"
    real, calls = getattr(lm.model, name), iter(range(10**6))

    def interrupted(*arguments: Any, **more: Any) -> Any:
        if next(calls) == (0 if when == "prefill" else 4):
            raise KeyboardInterrupt
        return real(*arguments, **more)

    engine.forget()
    asked = [p * 10 for p in prompts(5)]  # too many tokens for a flat list
    with monkeypatch.context() as patch:
        patch.setattr(lm.model, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(asked, LONG)
    all_blocks_are_back(engine)
    assert engine.generate(prompts(5), LONG) == expected


def test_an_interrupted_step_loses_nobody_elses_tokens(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread's Ctrl-C lands in a step that serves another's request as well."""
    engine = Engine(lm, dtype="model", block_size=4)
    (expected,) = engine.generate([prompts(1)[0]], LONG)
    stream = engine.stream(prompts(1)[0], LONG)
    text = next(stream)
    real = engine._runner._record

    def interrupted(*arguments: Any) -> Any:
        real(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "_record", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate([prompts(2)[1]], LONG)
    assert text + "".join(stream) == expected[0].text
    all_blocks_are_back(engine)


def test_abort_ends_everybody_with_what_there_is(lm: LanguageModel) -> None:
    engine = Engine(lm, dtype="model", max_running=2)
    params = SamplingParams(max_tokens=85, temperature=0.9, seed=1, ignore_eos=True)
    found: list[list[list[Completion]]] = []
    thread = threading.Thread(target=lambda: found.append(engine.generate(prompts(6) * 30, params)))
    thread.start()
    while engine.stats["generated_tokens"] < 10:
        time.sleep(0.001)
    engine.abort()
    thread.join(10)
    reasons = [c.finish_reason for (c,) in found[0]]
    assert reasons.count("abort") > 100
    assert set(reasons) <= {"abort", "length"}
    all_blocks_are_back(engine)


def test_generate_from_several_threads_at_once(lm: LanguageModel) -> None:
    engine = Engine(lm, dtype="model")
    params = [SamplingParams(max_tokens=20, seed=i, n=2) for i in range(6)]
    expected = [engine.generate(prompts(3), p) for p in params]
    found: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda i=i, p=p: found.update({i: engine.generate(prompts(3), p)}))  # type: ignore[misc]
        for i, p in enumerate(params)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [found[i] for i in range(6)] == expected
    all_blocks_are_back(engine)


class Faulty:
    """A grammar whose third look fails."""

    finished, tokens, seconds = False, 0, 0.0

    def __init__(self, vocab_size: int) -> None:
        self.looks, self.vocab_size = 0, vocab_size

    def allowed_V(self) -> torch.Tensor:
        self.looks += 1
        if self.looks == 3:
            raise RuntimeError("the grammar broke")
        return torch.ones(self.vocab_size, dtype=torch.bool)

    def accept(self, token: int) -> None:
        pass


def test_an_error_in_one_request_stays_with_it(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(lm, dtype="model", block_size=4)
    expected = [c for (c,) in engine.generate(prompts(4), LONG)]
    real = engine._requests.sequences

    def sequences(asked: Any, *more: Any, **named: Any) -> Any:
        groups = real(asked, *more, **named)
        if asked == [[9, 9, 9]]:
            groups[0][0].grammar = Faulty(lm.config.vocab_size)
        return groups

    monkeypatch.setattr(engine._requests, "sequences", sequences)

    async def everybody() -> list[Any]:
        asked = [collect(engine, p, LONG) for p in [*prompts(2), [9, 9, 9], *prompts(4)[2:]]]
        return list(await asyncio.gather(*asked, return_exceptions=True))

    first, second, broken, third, fourth = asyncio.run(everybody())
    assert isinstance(broken, RuntimeError)
    assert [first[0], second[0], third[0], fourth[0]] == expected
    settle(engine)
    all_blocks_are_back(engine)
    with pytest.raises(RuntimeError, match="the grammar broke"):
        engine.generate([[9, 9, 9]], LONG)
    all_blocks_are_back(engine)


def test_logits_that_are_not_finite_end_their_own_request(chain: Callable[..., LanguageModel]) -> None:
    table = torch.randn(12, 12, generator=torch.Generator().manual_seed(0))
    lm = chain(table)
    with torch.no_grad():
        lm.model.embed_tokens.weight[7] = float("nan")
    table[:, 7] = -torch.inf
    lm2 = chain(table.clamp(min=-60))
    with torch.no_grad():
        lm2.model.embed_tokens.weight[7] = float("nan")
    engine = Engine(lm2, dtype="model")
    params = SamplingParams(max_tokens=5, seed=0, ignore_eos=True)
    (expected,) = engine.generate([[3, 4]], params)

    async def both() -> list[Any]:
        asked = [collect(engine, p, params) for p in ([3, 4], [3, 7])]
        return list(await asyncio.gather(*asked, return_exceptions=True))

    good, bad = asyncio.run(both())
    assert good == expected
    assert isinstance(bad, NotFiniteError)
    with pytest.raises(NotFiniteError):
        engine.generate([[3, 4], [3, 7]], params)
    settle(engine)
    all_blocks_are_back(engine)


def test_a_step_that_fails_ends_who_ran_and_the_engine_goes_on(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(lm, dtype="model", max_running=2)
    expected = engine.generate(prompts(2), LONG)
    with monkeypatch.context() as patch:
        patch.setattr(lm.model, "decode", lambda *_, **__: (_ for _ in ()).throw(MemoryError("no memory")))
        with pytest.raises(MemoryError):
            engine.generate(prompts(5), LONG)
    all_blocks_are_back(engine)
    assert engine.generate(prompts(2), LONG) == expected


def test_lower_numbers_are_served_first(lm: LanguageModel) -> None:
    engine = Engine(lm, dtype="model", max_running=1)
    order: list[int] = []

    async def ask(number: int, priority: int) -> None:
        await collect(engine, [3 + number, 4], SamplingParams(max_tokens=5, ignore_eos=True), priority=priority)
        order.append(number)

    async def everybody() -> None:
        with engine._loop.held():  # nobody is let in before all have asked
            tasks = [asyncio.create_task(ask(i, p)) for i, p in enumerate((0, 2, 1, 0))]
            await asyncio.sleep(0.05)
        await asyncio.gather(*tasks)

    asyncio.run(everybody())
    assert order == [0, 3, 2, 1]


def test_what_does_not_fit_into_the_cache_is_refused_and_what_just_fits_is_not(lm: LanguageModel) -> None:
    engine = Engine(lm, dtype="model", max_cached_tokens=16, block_size=4)
    with pytest.raises(ValueError, match=r"prompt 1 has 17 tokens; the cache has room for 16: .* max_cached_tokens"):
        engine.generate([[3] * 16, [3] * 17], LONG)
    full, part = engine.generate([[3] * 16, [3] * 10], LONG)
    assert (len(full[0].token_ids), full[0].finish_reason) == (1, "length")
    assert (len(part[0].token_ids), part[0].finish_reason) == (7, "length")
    all_blocks_are_back(engine)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"max_cached_tokens": 0}, "max_cached_tokens=0 must be a whole number, at least 1"),
        ({"chunk": 2.5}, "chunk=2.5 must be"),
        ({"block_size": True}, "block_size=True must be"),
        ({"quantize": "int3"}, "quantize='int3' is unknown; choose None, 'int8' or 'int4'"),
        ({"speculate": "magic"}, "speculate='magic' is unknown; choose None, 'mtp' or 'ngram'"),
        ({"speculate": "mtp"}, "needs a multi-token prediction module, and this model has none"),
        ({"parity": True, "dtype": "bfloat16"}, "parity=True needs float32 weights on a CPU"),
        ({"parity": True, "quantize": "int8"}, "parity=True needs float32 weights on a CPU, not quantised"),
        ({"parity": 1}, "parity=1 must be True or False"),
        ({"prefix_cache": None}, "prefix_cache=None must be True or False"),
        ({"quantize": "int8", "group_size": 48}, "group_size=48 must be one of 32, 64, 128"),
        ({"quantize": "int8", "group_size": 64.0}, "group_size=64.0 must be one of"),
        ({"group_size": 64}, "group_size=64 goes with quantize='int8' or 'int4'"),
        ({"block_size": 81, "max_cached_tokens": 80}, "block_size=81 must be at most max_cached_tokens=80"),
        ({"block_size": 10**9}, "block_size=1000000000 must be at most max_cached_tokens="),
        ({"max_cached_tokens": 10**9}, "max_cached_tokens=1000000000 needs more memory .* room for about"),
        ({"max_cached_tokens": 10**15}, "needs more memory than this machine has"),
        ({"max_cached_tokens": 10**9, "block_size": 10**9}, "needs more memory than this machine has"),
    ],
)
def test_engines_that_make_no_sense_are_refused(
    lm: LanguageModel, options: dict[str, Any], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("luciola.hardware.memory_bytes", lambda: 8 << 30)
    with pytest.raises(ValueError, match=complaint):
        Engine(lm, **{"dtype": "model", **options})


def test_the_cache_may_take_as_much_as_the_error_says(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luciola.hardware.memory_bytes", lambda: 32 << 20)
    for block_size in (1, 5, 16):
        with pytest.raises(ValueError, match="room for about") as refused:
            Engine(lm, dtype="model", max_cached_tokens=10**7, block_size=block_size)
        most = int(str(refused.value).rsplit(maxsplit=1)[-1])
        engine = Engine(lm, dtype="model", max_cached_tokens=most - block_size, block_size=block_size)
        assert engine.max_cached_tokens * engine.cache_bytes_per_token > 16 << 20
    assert Engine(lm, dtype="model", max_cached_tokens=10).max_cached_tokens == 16, "a block at the least"


def test_a_system_that_gives_less_memory_is_no_riddle(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("luciola.engine.cache._zeros", refused)
    with pytest.raises(ValueError, match="max_cached_tokens=500 needs more memory than the system gives"):
        Engine(lm, dtype="model", max_cached_tokens=500)


def test_an_engine_is_made_of_a_language_model(lm: LanguageModel) -> None:
    for other in ("runs/quickstart", lm.model, None):
        with pytest.raises(ValueError, match=r"must be a LanguageModel; luciola.load\(path\) gives one"):
            Engine(other)  # type: ignore[arg-type]


def test_weights_are_quantised_once(lm: LanguageModel) -> None:
    shape = {"model_type": "llama", "vocab_size": 40, "hidden_size": 128, "intermediate_size": 128}
    whole = LanguageModel.create(shape | {"num_hidden_layers": 1, "num_attention_heads": 2})
    quantised = LanguageModel(Engine(whole, dtype="float32", quantize="int8").model)
    for options, complaint in (
        ({"quantize": "int8"}, "the weights are quantised already; leave it out"),
        ({"quantize": "int4", "group_size": 64}, "the weights are quantised already"),
        ({"parity": True}, "parity=True needs float32 weights on a CPU, not quantised"),
    ):
        with pytest.raises(ValueError, match=complaint):
            Engine(quantised, dtype="float32", **options)
    assert len(Engine(quantised, dtype="float32").generate([[3]], LONG)[0]) == LONG.n


@pytest.mark.parametrize("priority", [-1, 1.5, True])
def test_a_priority_is_a_whole_number(lm: LanguageModel, priority: Any) -> None:
    with pytest.raises(ValueError, match=r"priority=.* must be a whole number"):
        Engine(lm, dtype="model").generate([[3]], priority=priority)


def test_what_another_thread_takes_in_at_the_last_moment_is_done_all_the_same() -> None:
    stepping, go, left = threading.Event(), threading.Event(), ["first"]
    done: list[str] = []

    def step() -> bool:
        if left:
            done.append(left.pop(0))
            stepping.set()
            assert go.wait(5)
        return bool(left)

    loop = Loop(step)
    loop.drive(lambda: None)
    assert stepping.wait(5)
    loop.drive(lambda: left.append("second"))  # the driver is at its last step, as it thinks
    with loop._starting:
        go.set()
        while "second" not in left:  # the step is over, and the driver about to go
            loop.ask(lambda: None)
    deadline = time.monotonic() + 5
    while not loop.idle and time.monotonic() < deadline:
        time.sleep(0.001)
    assert done == ["first", "second"]
