"""The engine: the slow twin of every completion is a full forward pass for each token."""

from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luciola.engine.engine import Engine
from luciola.engine.params import SamplingParams
from luciola.engine.sequence import Completion
from luciola.model.language_model import LanguageModel
from luciola.model.logprobs import token_logprobs
from luciola.text.bpe import train_bpe
from luciola.text.tokenizer import Tokenizer

SLOW = settings(max_examples=15, deadline=None, derandomize=True)
GQA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 29, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3, "max_position_embeddings": 96,
    "eos_token_id": 5,
}  # fmt: skip


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(6, 27, (n,), generator=generator).tolist() for n in lengths]


def ids(groups: list[list[Completion]]) -> list[list[list[int]]]:
    return [[c.token_ids for c in group] for group in groups]


def same(a: list[list[Completion]], b: list[list[Completion]]) -> None:
    """Log-probabilities may differ in the last bits: products over other batches round differently."""
    assert ids(a) == ids(b)
    for x, y in zip(chain.from_iterable(a), chain.from_iterable(b), strict=True):
        assert (x.text, x.finish_reason) == (y.text, y.finish_reason)
        assert (x.logprobs is None) == (y.logprobs is None)
        assert (x.logprobs or []) == pytest.approx(y.logprobs or [], abs=1e-5)
        assert (x.routes is None) == (y.routes is None)
        if x.routes is not None and y.routes is not None:
            assert torch.equal(x.routes.sort(-1).values, y.routes.sort(-1).values)


@torch.no_grad()
def greedy_by_hand(lm: LanguageModel, prompt: list[int], count: int, ends: tuple[int, ...]) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(lm.model(torch.tensor([tokens]))[0, -1].argmax()))
        if tokens[-1] in ends:
            break
    return tokens[len(prompt) :]


@pytest.mark.parametrize("kind", ["mla", "gqa"])
@given(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.integers(1, 20))
@SLOW
def test_greedy_is_the_argmax_of_full_forward_passes(
    lm: LanguageModel, kind: str, lengths: list[int], count: int
) -> None:
    model, ends = (lm, (1,)) if kind == "mla" else (LanguageModel.create(GQA), (5,))
    asked = prompts(*lengths)
    out = Engine(model, dtype="model").generate(asked, SamplingParams(temperature=0.0, max_tokens=count))
    for prompt, (completion,) in zip(asked, out, strict=True):
        assert completion.token_ids == greedy_by_hand(model, prompt, count, ends)
        assert completion.finish_reason == ("stop" if completion.token_ids[-1] in ends else "length")


def params_of(i: int, n: int = 2) -> SamplingParams:
    mixed = [
        {"temperature": 0.0},
        {"top_k": 3},
        {"top_p": 0.8, "temperature": 1.5},
        {"logprobs": True},
        {"stop": ["b"]},
    ]
    return SamplingParams(max_tokens=5 + 7 * i, n=n, seed=100 + i, routes=i % 2 == 0, **mixed[i % 5])


def test_a_completion_does_not_depend_on_what_else_is_in_the_batch(lm: LanguageModel) -> None:
    """Nor on the order of requests, the others' settings and seeds, or how many completions each one gets."""
    engine, asked = Engine(lm, dtype="model"), prompts(3, 11, 1, 7, 7)
    params = [params_of(i) for i in range(5)]
    together = engine.generate(asked, params)
    alone = [engine.generate([prompt], [p])[0] for prompt, p in zip(asked, params, strict=True)]
    same(together, alone)
    backwards = engine.generate(asked[::-1], params[::-1])
    assert ids(backwards[::-1]) == ids(together)
    more = engine.generate(asked, [params_of(i, n=5) for i in range(5)])
    assert [group[:2] for group in ids(more)] == ids(together)
    other = [SamplingParams(max_tokens=9, seed=7)] * 5
    assert ids(engine.generate([*asked, *asked], [*params, *other]))[:5] == ids(together)


def test_the_same_prompt_twice_gets_the_same_completions(lm: LanguageModel) -> None:
    engine, asked = Engine(lm, dtype="model"), prompts(4)
    out = engine.generate(asked * 2, SamplingParams(max_tokens=12, n=3, seed=3))
    assert ids(out[:1]) == ids(out[1:])
    assert len({tuple(c.token_ids) for c in out[0]}) == 3


def test_seeds(lm: LanguageModel) -> None:
    engine, asked = Engine(lm, dtype="model"), prompts(4)

    def tokens(seed: int | None) -> list[list[list[int]]]:
        return ids(engine.generate(asked, SamplingParams(max_tokens=20, seed=seed, ignore_eos=True)))

    assert tokens(5) == tokens(5)
    assert tokens(5) != tokens(6)
    assert tokens(None) != tokens(None)


@given(st.lists(st.integers(1, 16), min_size=1, max_size=5), st.floats(0.3, 2.0), st.integers(0, 99))
@SLOW
@torch.no_grad()
def test_log_probabilities_are_the_trainers(
    lm: LanguageModel, lengths: list[int], temperature: float, seed: int
) -> None:
    """Plain and tempered, against a full pass over prompt and completion: KL below 1e-6, and far below it in fact."""
    params = SamplingParams(max_tokens=20, temperature=temperature, n=3, seed=seed, logprobs=True, top_p=0.9)
    for prompt, group in zip(
        asked := prompts(*lengths), Engine(lm, dtype="model").generate(asked, params), strict=True
    ):
        for completion in group:
            row = torch.tensor([prompt + completion.token_ids])
            states = lm.model.hidden(row[:, :-1]).states[0, len(prompt) - 1 :]
            targets = torch.tensor(completion.token_ids)
            for found, t in ((completion.logprobs, 1.0), (completion.tempered_logprobs, temperature)):
                trainer = token_logprobs(states, lm.model.lm_head.weight, targets, t)
                d = (trainer - torch.tensor(found)).double()
                assert float((d.exp() - d - 1).mean()) < 1e-8


@torch.no_grad()
def test_routes_are_those_of_a_full_pass_and_can_be_replayed(lm: LanguageModel) -> None:
    params = SamplingParams(max_tokens=15, n=3, seed=0, logprobs=True, routes=True)
    for prompt, group in zip(asked := prompts(2, 9), Engine(lm, dtype="model").generate(asked, params), strict=True):
        for completion in group:
            row = torch.tensor([prompt + completion.token_ids])
            routes = completion.routes
            assert routes is not None
            assert routes.shape == (row.shape[1] - 1, 2, 2)  # T - 1, MoE layers, K
            hidden = lm.model.hidden(row[:, :-1])
            full = torch.stack([r.indices_BTK[0] for r in hidden.routings], dim=1)
            assert torch.equal(routes.long().sort(-1).values, full.sort(-1).values)
            replayed = lm.model.hidden(row[:, :-1], routes_BTLK=routes[None]).states[0, len(prompt) - 1 :]
            trainer = token_logprobs(replayed, lm.model.lm_head.weight, torch.tensor(completion.token_ids))
            torch.testing.assert_close(trainer, torch.tensor(completion.logprobs), atol=1e-5, rtol=0)


def test_nothing_is_recorded_that_was_not_asked_for(lm: LanguageModel) -> None:
    out = Engine(lm, dtype="model").generate(prompts(3), SamplingParams(max_tokens=4))[0][0]
    assert (out.logprobs, out.tempered_logprobs, out.routes) == (None, None, None)


@pytest.mark.parametrize("together", [1, 7, 4096])
@pytest.mark.parametrize("settings", [{}, {"parity": True}, {"chunk": 5}], ids=str)
def test_the_load_of_experts_is_that_of_all_tokens_computed(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], together: int
) -> None:
    monkeypatch.setattr("luciola.engine.expert_load.WAITING", together)
    engine = Engine(lm, dtype="model", prefix_cache=False, **settings)
    params = [SamplingParams(max_tokens=4 + 3 * i, seed=i, routes=True, ignore_eos=True) for i in range(5)]
    expected = torch.zeros(2, 6, dtype=torch.long)
    for _ in range(2):  # the steps of the second time repeat those of the first
        for (completion,) in engine.generate(prompts(3, 9, 1, 12, 5), params):
            assert completion.routes is not None
            for layer in (0, 1):
                expected[layer] += completion.routes[:, layer].flatten().long().bincount(minlength=6)
        assert engine.expert_load == {1: expected[0].tolist(), 2: expected[1].tolist()}


def test_a_model_without_experts_has_no_routes() -> None:
    engine = Engine(LanguageModel.create(GQA), dtype="model")
    assert engine.generate(prompts(3), SamplingParams(max_tokens=4, routes=True))[0][0].routes is None
    assert engine.expert_load == {}


ABC = Tokenizer.characters("abcdefghijkl")


def written(script: Callable[..., LanguageModel], text: str, first: str, **params: Any) -> Completion:
    """What a model whose only text is `text` writes after `first`."""
    engine = Engine(script(ABC, ABC.encode(text)), dtype="model")
    completion = engine.generate([first], SamplingParams(temperature=0.0, **params))[0][0]
    assert "".join(engine.stream(first, SamplingParams(temperature=0.0, **params))) == completion.text
    return completion


@pytest.mark.parametrize(
    ("stop", "text", "tokens"),
    [
        (["e"], "bcd", "bcde"),
        (["cd"], "b", "bcd"),  # across the border of tokens
        (["ghij", "hi"], "bcdefg", "bcdefghi"),  # complete first, though it begins later
        (["def", "c"], "b", "bc"),
        (["d", "bcd", "cd"], "", "bcd"),  # several at once: cut where the first begins
        (["x", "dg"], "bcdefghijk", "bcdefghijk"),  # never there
        (["b"], "", "b"),
    ],
)
def test_a_stop_text_ends_the_completion_and_is_not_part_of_it(
    script: Callable[..., LanguageModel], stop: list[str], text: str, tokens: str
) -> None:
    out = written(script, "abcdefghijkl", "a", stop=stop, max_tokens=10)
    assert out.text == text
    assert ABC.decode(out.token_ids) == tokens
    assert out.finish_reason == ("stop" if len(tokens) < 10 else "length")


def test_a_stop_text_inside_a_token_cuts_the_text_there(script: Callable[..., LanguageModel]) -> None:
    tokenizer = train_bpe(["hello world hello world and more"] * 50, 300)
    tokens = tokenizer.encode("hello world and more")
    assert len(tokens) < 12
    engine = Engine(script(tokenizer, tokens), dtype="model")
    first = tokenizer.decode(tokens[:1])
    for stop, expected in (("ld an", "hello wor"), ("w", "hello "), ("more", "hello world and ")):
        params = SamplingParams(temperature=0.0, max_tokens=len(tokens) - 1, stop=[stop])
        (completion,) = engine.generate([first], params)[0]
        assert first + completion.text == expected
        assert completion.finish_reason == "stop"
        assert "".join(engine.stream(first, params)) == completion.text


def test_the_end_token_is_a_token_but_no_text(script: Callable[..., LanguageModel]) -> None:
    engine = Engine(script(ABC, [*ABC.encode("abc"), 1, *ABC.encode("def")]), dtype="model")
    (out,) = engine.generate(["a"], SamplingParams(temperature=0.0, max_tokens=5))[0]
    assert (out.text, out.token_ids, out.finish_reason) == ("bc", [*ABC.encode("bc"), 1], "stop")
    (out,) = engine.generate(["a"], SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True))[0]
    assert (out.text, len(out.token_ids), out.finish_reason) == ("bcde", 5, "length")


def test_every_configured_end_token_ends(script: Callable[..., LanguageModel]) -> None:
    lm = script(ABC, ABC.encode("abcdef"))
    lm.model.config = lm.config.model_copy(update={"eos_token_id": [ABC.encode("d")[0], 1]})
    (out,) = Engine(lm, dtype="model").generate(["a"], SamplingParams(temperature=0.0, max_tokens=9))[0]
    assert ABC.decode(out.token_ids) == "bcd"


@given(st.data(), st.integers(0, 999))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_streamed_pieces_join_to_the_text(data: st.DataObject, seed: int) -> None:
    """A model of random bytes: half characters, bytes that form none, and stop texts of any kind."""
    engine = BYTES
    stop = data.draw(st.lists(st.text("abé你\ufffd ", min_size=1, max_size=3), max_size=3))
    params = SamplingParams(max_tokens=25, seed=seed, temperature=2.0, stop=stop)
    pieces = list(engine.stream("hé", params))
    (completion,) = engine.generate(["hé"], params)[0]
    assert "".join(pieces) == completion.text
    assert all(pieces)


def _bytes_engine() -> Engine:
    tokenizer = train_bpe(["aé你b "] * 3, 270)
    shape = {"vocab_size": tokenizer.vocab_size, "num_key_value_heads": 4, "initializer_range": 0.05}
    return Engine(LanguageModel.create(GQA | shape, tokenizer), dtype="model")


BYTES = _bytes_engine()


def test_the_models_context_is_the_limit(lm: LanguageModel) -> None:
    engine = Engine(lm, dtype="model")
    params = SamplingParams(max_tokens=50, ignore_eos=True, seed=0, n=2)
    short, long = engine.generate(prompts(10, 90), params)
    assert [len(c.token_ids) for c in short] == [50, 50]
    assert [len(c.token_ids) for c in long] == [6, 6]  # 96 positions in all
    assert {c.finish_reason for c in short + long} == {"length"}
    with pytest.raises(ValueError, match=r"prompt 1 has 96 tokens; the model's context of 96 leaves no room"):
        engine.generate(prompts(3, 96), params)


@pytest.mark.parametrize(
    ("prompt", "complaint"),
    [
        ([[5, 6], []], "prompt 1 is empty"),
        ([""], "prompt 0 is empty"),
        ([[5, 99]], "prompt 0 has token 99, outside the vocabulary of 27"),
        ([[-1]], "prompt 0 has token -1"),
        ("abc", "put the single prompt in brackets"),
        ([3, 4], "prompt 0 is neither a text nor a list of token ids"),
        ([[5], [3.7]], "prompt 1 is neither a text nor a list of token ids"),
        ([None], "prompt 0 is neither a text nor a list of token ids"),
        ([b"ab"], "prompt 0 is neither a text nor a list of token ids"),
        ([[5], [True]], "prompt 1 is neither a text nor a list of token ids"),
        (b"ab", "put the single prompt in brackets"),
        (None, "prompts=None must be a list of texts or lists of token ids"),
        (7, "prompts=7 must be a list"),
        ({"abc": 1}, "prompts={'abc': 1} must be a list"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(lm: LanguageModel, prompt: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Engine(lm, dtype="model").generate(prompt)


def test_what_needs_a_tokenizer_says_so() -> None:
    engine = Engine(LanguageModel.create(GQA), dtype="model")
    with pytest.raises(ValueError, match="give prompts as lists of token ids"):
        engine.generate(["abc"])
    with pytest.raises(ValueError, match="stop texts need a tokenizer"):
        engine.generate([[1]], SamplingParams(stop=["a"]))
    with pytest.raises(ValueError, match="use generate"):
        next(engine.stream([1]))
    assert engine.generate([[1]], SamplingParams(max_tokens=3))[0][0].text == ""


def test_params_are_one_for_all_or_one_each(lm: LanguageModel) -> None:
    engine = Engine(lm, dtype="model")
    with pytest.raises(ValueError, match="1 sampling params for 2 prompts"):
        engine.generate(prompts(1, 2), [SamplingParams()])
    with pytest.raises(ValueError, match="params must be SamplingParams"):
        engine.generate(prompts(1, 2), {"max_tokens": 3})  # type: ignore[arg-type]
    for wrong in (0, "", {}, False, [None], {"temperature": 0.0}):
        with pytest.raises(ValueError, match="params must be SamplingParams"):
            engine.generate(prompts(1), wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="params must be SamplingParams"):
            next(engine.stream("abc", wrong))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="0 sampling params for 1 prompts"):
        engine.generate(prompts(1), [])
    assert engine.generate([]) == []


def test_prompts_may_come_from_anything_that_can_be_listed(lm: LanguageModel) -> None:
    engine, params = Engine(lm, dtype="model"), SamplingParams(max_tokens=5, seed=0)
    asked = prompts(3, 5)
    listed = ids(engine.generate(asked, params))
    assert ids(engine.generate((prompt for prompt in asked), params)) == listed
    assert ids(engine.generate((iter(prompt) for prompt in asked), params)) == listed
    assert ids(engine.generate((torch.tensor(prompt) for prompt in asked), params)) == listed


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_the_cache_takes_exactly_what_is_announced(lm: LanguageModel, dtype: str, size: int) -> None:
    engine = Engine(lm, dtype=dtype)
    assert engine.cache_bytes_per_token == (8 + 4) * 3 * size  # (kv_lora_rank + qk_rope_head_dim) * layers * bytes
    pools = Engine(lm, dtype=dtype, max_cached_tokens=70, block_size=7)._cache.pools
    assert sum(pool.nbytes for pool in pools) == 70 * engine.cache_bytes_per_token
    grouped = Engine(LanguageModel.create(GQA), dtype=dtype)
    assert grouped.cache_bytes_per_token == 2 * 2 * 4 * 2 * size


def test_every_engine_samples_from_what_the_trainer_has_made_of_the_weights_since() -> None:
    """One made with dtype "model" uses the model itself, the others a copy that is made anew."""
    lm = LanguageModel.create(GQA)
    live, copied = Engine(lm, dtype="model"), Engine(lm, dtype="bfloat16")
    assert live.model is lm.model
    assert next(copied.model.parameters()).dtype == torch.bfloat16
    assert next(lm.model.parameters()).dtype == torch.float32
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    before = live.generate([[7]], params)[0][0].token_ids, copied.generate([[7]], params)[0][0].token_ids
    with torch.no_grad():
        lm.model.lm_head.weight.copy_(-lm.model.lm_head.weight)
    assert live.generate([[7]], params)[0][0].token_ids != before[0]
    anew = Engine(lm, dtype="bfloat16").generate([[7]], params)
    assert copied.generate([[7]], params) == anew != before[1]
    quantised = Engine(lm, dtype="model", quantize="int8")
    with torch.no_grad():
        lm.model.norm.weight.mul_(-1)
    anew = Engine(lm, dtype="model", quantize="int8").generate([[7]], params)
    assert quantised.generate([[7]], params) == anew


def test_generating_leaves_a_model_that_can_train(lm: LanguageModel) -> None:
    """Nothing made in inference mode (the table of angles, say) may reach autograd afterwards."""
    fresh = LanguageModel.create(lm.config, lm.tokenizer)
    Engine(fresh, dtype="model").generate(prompts(3), SamplingParams(max_tokens=4))
    fresh.model(torch.tensor([prompts(20)[0]])).sum().backward()
    assert all(p.grad is not None for p in fresh.model.parameters())


def test_bfloat16_generates(lm: LanguageModel) -> None:
    out = Engine(lm, dtype="bfloat16").generate(prompts(3, 9), SamplingParams(max_tokens=9, n=2, logprobs=True, seed=0))
    assert all(c.logprobs is not None and max(c.logprobs) <= 0 for group in out for c in group)


def test_a_stream_leaves_its_reader_outside_of_inference_mode(lm: LanguageModel) -> None:
    for _ in Engine(lm, dtype="model").stream("abc", SamplingParams(max_tokens=5, seed=0)):
        assert not torch.is_inference_mode_enabled()


def test_a_cache_takes_memory_only_where_it_is_written(forks: Any) -> None:
    """Also in a process that keeps freed memory, as every training run does."""
    process = forks.Process(target=_large_cache)
    process.start()
    process.join(60)
    assert process.exitcode == 0


def _large_cache() -> None:
    from luciola import hardware

    hardware.keep_freed_memory()
    lm = LanguageModel.create(GQA)
    before = hardware.peak_memory_bytes()
    engine = Engine(lm, dtype="model", max_cached_tokens=1 << 24)
    assert engine.max_cached_tokens * engine.cache_bytes_per_token >= 1 << 30
    engine.generate([[7, 8, 9]], SamplingParams(max_tokens=5))
    assert hardware.peak_memory_bytes() - before < 600 << 20


def test_completions_are_told_of_when_they_end(lm: LanguageModel) -> None:
    engine = Engine(lm, dtype="model")
    params = [SamplingParams(max_tokens=n, n=2, seed=n, ignore_eos=True) for n in (9, 3, 6)]
    told: list[tuple[int, Completion]] = []
    running: list[int] = []

    def ended(i: int, completion: Completion) -> None:
        told.append((i, completion))
        running.append(int(engine.stats["running"]))

    groups = engine.generate(prompts(4, 5, 6), params, ended=ended)
    assert [i for i, _ in told] == [1, 1, 2, 2, 0, 0], "the shortest first"
    assert running == [4, 4, 2, 2, 0, 0], "while the others are still at it"
    for i, group in enumerate(groups):
        assert [completion for place, completion in told if place == i] == group


def test_an_exception_of_the_listener_ends_the_call_alone(lm: LanguageModel) -> None:
    engine = Engine(lm, dtype="model")
    with pytest.raises(ZeroDivisionError):
        engine.generate(prompts(4, 5), SamplingParams(max_tokens=4), ended=lambda *_: 1 / 0)
    assert engine.blocks_used == 0
    assert engine.generate(prompts(4), SamplingParams(max_tokens=4))


def test_a_listener_that_is_none_is_refused(lm: LanguageModel) -> None:
    with pytest.raises(ValueError, match="ended=3 must be a function"):
        Engine(lm, dtype="model").generate(prompts(4), ended=3)  # type: ignore[arg-type]


def test_half_a_character_is_refused(lm: LanguageModel) -> None:
    with pytest.raises(ValueError, match=r"prompt 1 has half a character .* at place 2"):
        Engine(lm, dtype="model").generate([[7], "ab\ud800"])
