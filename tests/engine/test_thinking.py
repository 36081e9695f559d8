"""Thinking that ends when its budget is spent or somebody says so: the tag is written in the model's place, and all
else is as it would have been."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from luciola.engine.engine import Engine
from luciola.engine.grammar import Grammar
from luciola.engine.params import SamplingParams
from luciola.engine.sequence import Completion, Delta
from luciola.engine.thinking import Thinking, closing_tokens, thinking_tokens, thought
from luciola.model.language_model import LanguageModel
from luciola.text.chat import END_THINK, THINK
from luciola.text.tokenizer import Tokenizer

ABC = Tokenizer.characters("abcdefghijklmnop<>/thinkABC0123 \n")  # with a token for each tag
SPELLED = Tokenizer.characters("abcdefghijklmnop<>/thinkABC0123 \n", added_tokens=())  # letter by letter
Chain = Callable[..., LanguageModel]


def random_chain(chain: Chain, tokenizer: Tokenizer, seed: int = 0, bar: str = "") -> LanguageModel:
    """Random distributions of single characters; the tags, the tokens of `bar` and special ones never come by
    themselves."""
    V = tokenizer.vocab_size
    logits = torch.randn(V, V, generator=torch.Generator().manual_seed(seed))
    first = tokenizer.encode("a")[0]
    logits[:, :first] = -60.0
    for character in bar:
        logits[:, tokenizer.encode(character)[0]] = -60.0
    return chain(logits, tokenizer, max_position_embeddings=512)


def complete(lm: LanguageModel, prompt: str, engine: dict[str, Any] | None = None, **params: Any) -> list[Completion]:
    return Engine(lm, dtype="model", **engine or {}).generate([prompt], SamplingParams(**params))[0]


@pytest.mark.parametrize("tokenizer", [ABC, SPELLED], ids=["one token", "letters"])
@pytest.mark.parametrize("budget", [0, 1, 7])
@pytest.mark.parametrize("start", [THINK, THINK + "\n", THINK + " \n\n"])
def test_a_budget_ends_thinking_that_the_prompt_has_opened(
    chain: Chain, tokenizer: Tokenizer, budget: int, start: str
) -> None:
    lm = random_chain(chain, tokenizer, bar="<")
    free = complete(lm, "ab" + start, max_tokens=40, seed=3, n=3)
    bound = complete(lm, "ab" + start, max_tokens=40, seed=3, n=3, thinking_budget=budget)
    tag = closing_tokens(tokenizer)
    for a, b in zip(free, bound, strict=True):
        assert b.token_ids[:budget] == a.token_ids[:budget]  # the same numbers are drawn
        assert b.token_ids[budget : budget + len(tag)] == tag
        assert tokenizer.decode(b.token_ids).count(END_THINK) == 1
        assert b.thinking_tokens == budget + len(tag)
        assert a.thinking_tokens == len(a.token_ids) == len(b.token_ids) == 40


@pytest.mark.parametrize("tokenizer", [ABC, SPELLED], ids=["one token", "letters"])
def test_draws_behind_the_tag_use_the_numbers_of_their_positions(chain: Chain, tokenizer: Tokenizer) -> None:
    """What follows depends on the last token alone in a chain, so where the two texts meet they stay together."""
    lm = random_chain(chain, tokenizer, bar="<")
    free = complete(lm, THINK, max_tokens=200, seed=1)[0].token_ids
    bound = complete(lm, THINK, max_tokens=200, seed=1, thinking_budget=5)[0].token_ids
    after = 5 + len(closing_tokens(tokenizer))
    same = [a == b for a, b in zip(free[after:], bound[after:], strict=True)]
    assert True in same
    assert all(same[same.index(True) :])


@pytest.mark.parametrize("tokenizer", [ABC, SPELLED], ids=["one token", "letters"])
@pytest.mark.parametrize(
    ("prompt", "spent"),
    [
        ("<think>", 0),
        ("<think>\n \n", 0),
        ("<think>a", 1),
        ("<think>\nabc", 4),
        ("<think>ab</think>c <think>" + 100 * "ab", 200),
        ("abc", 0),
        ("a think>b", 0),
    ],
)
def test_what_a_prompt_has_thought_is_counted_from_its_last_tag(tokenizer: Tokenizer, prompt: str, spent: int) -> None:
    assert thought(tokenizer, tokenizer.encode(prompt)) == spent


@pytest.mark.parametrize("tokenizer", [ABC, SPELLED], ids=["one token", "letters"])
@pytest.mark.parametrize("already", [0, 3, 5, 9])
def test_a_budget_counts_what_the_prompt_has_thought_already(chain: Chain, tokenizer: Tokenizer, already: int) -> None:
    engine = Engine(random_chain(chain, tokenizer, bar="<"), dtype="model")
    params = SamplingParams(max_tokens=30, seed=3, thinking_budget=5)

    async def write() -> list[int]:
        deltas = engine.stream_async("ab" + THINK + "k" * already, params, inside=True)
        return [token async for delta in deltas for token in delta.token_ids]

    tokens, tag = asyncio.run(write()), closing_tokens(tokenizer)
    left = max(0, 5 - already)
    assert tokens[left : left + len(tag)] == tag
    assert not any(tokens[i : i + len(tag)] == tag for i in range(left))


def test_a_budget_counts_from_where_the_model_opens_its_thinking(script: Callable[..., LanguageModel]) -> None:
    lm = script(SPELLED, SPELLED.encode("b<think>acdefglm"))
    out = complete(lm, "b", temperature=0.0, max_tokens=25, thinking_budget=4)[0]
    assert SPELLED.decode(out.token_ids).startswith("<think>acde</think>")
    assert out.thinking_tokens == len("<think>acde</think>")


def test_a_text_that_does_not_begin_with_thinking_is_left_alone(script: Callable[..., LanguageModel]) -> None:
    lm = script(SPELLED, SPELLED.encode("bcm<think>adef"))
    free, bound = (complete(lm, "b", temperature=0.0, max_tokens=30, thinking_budget=b)[0] for b in (None, 0))
    assert free == bound
    assert free.thinking_tokens == 0


def test_thinking_that_ends_by_itself_is_within_its_budget(chain: Chain) -> None:
    logits = torch.full((ABC.vocab_size, ABC.vocab_size), -50.0)
    path = [ABC.encode(c)[0] for c in "abc"] + [ABC.encode(END_THINK)[0]] + [ABC.encode(c)[0] for c in "defg"]
    for a, b in zip([ABC.encode(THINK)[0], *path], path, strict=False):
        logits[a, b] = 50.0
    lm = chain(logits, ABC)
    outs = [complete(lm, THINK, temperature=0.0, max_tokens=8, thinking_budget=b)[0] for b in (None, 4, 100)]
    assert outs[0] == outs[1] == outs[2]
    assert outs[0].text == "abc</think>defg"
    assert outs[0].thinking_tokens == 4


@pytest.mark.parametrize("begun", range(1, 8))
def test_of_a_tag_that_is_begun_only_the_rest_is_written(begun: int) -> None:
    thinking = Thinking(SPELLED, closing_tokens(SPELLED), True, budget=2 + begun)
    for token in SPELLED.encode("ab" + END_THINK[:begun]):
        assert thinking.forced() is None
        thinking.accept(token)
    written = []
    while not thinking.over:
        token = thinking.forced()
        assert token is not None
        written.append(token)
        thinking.accept(token)
    assert SPELLED.decode(written) == END_THINK[begun:]


def test_recorded_log_probabilities_of_the_tag_are_the_models_own(chain: Chain) -> None:
    lm = random_chain(chain, ABC, bar="<")
    prompt = ABC.encode(THINK)
    out = complete(lm, THINK, max_tokens=20, seed=0, thinking_budget=3, logprobs=True, top_logprobs=2, top_p=0.5)[0]
    with torch.no_grad():
        logp: Tensor = lm.model(torch.tensor([prompt + out.token_ids]))[0].log_softmax(-1)
    expected = [float(logp[len(prompt) - 1 + i, token]) for i, token in enumerate(out.token_ids)]
    assert out.logprobs == pytest.approx(expected, abs=1e-4)
    assert out.logprobs is not None
    assert out.logprobs[3] < -40
    assert out.top_logprobs is not None
    assert len(out.top_logprobs) == 20


HARD: dict[str, Any] = {
    "repetition_penalty": 3.0, "presence_penalty": 2.0, "frequency_penalty": 2.0, "min_tokens": 30, "top_k": 3,
    "top_p": 0.7, "min_p": 0.2, "temperature": 1.7,
}  # fmt: skip


@pytest.mark.parametrize("tokenizer", [ABC, SPELLED], ids=["one token", "letters"])
@pytest.mark.parametrize("extra", [{}, HARD, {"temperature": 0.0}, {"ignore_eos": True}, {"kept_tokens": True}])
def test_company_drafts_and_preemption_change_nothing(
    chain: Chain, tokenizer: Tokenizer, extra: dict[str, Any]
) -> None:
    lm = random_chain(chain, tokenizer)
    params = [
        SamplingParams(**({"max_tokens": 60, "n": 2, "seed": i, "thinking_budget": b} | extra))
        for i, b in enumerate([0, 2, 3, 11, 20, None])
    ]
    asked = [f"{'abcdef'[i]}{THINK}" for i in range(6)]
    alone = [Engine(lm, dtype="model").generate([a], [p])[0] for a, p in zip(asked, params, strict=True)]
    tight = Engine(lm, dtype="model", max_cached_tokens=200, block_size=4, speculate="ngram")
    together = tight.generate(asked, params)
    assert tight.stats["preemptions"] > 0
    assert [[c.token_ids for c in g] for g in together] == [[c.token_ids for c in g] for g in alone]
    assert [[c.thinking_tokens for c in g] for g in together] == [[c.thinking_tokens for c in g] for g in alone]
    for group, p in zip(together, params, strict=True):
        for c in group:
            if p.thinking_budget is not None:
                text = tokenizer.decode(c.token_ids, False)
                assert text.index(END_THINK) <= p.thinking_budget


@pytest.mark.parametrize("tokenizer", [ABC, SPELLED], ids=["one token", "letters"])
@pytest.mark.parametrize("budget", range(9))
def test_drafts_do_not_slip_past_the_budget(chain: Chain, tokenizer: Tokenizer, budget: int) -> None:
    """A model that writes the same few characters again and again: nearly every draft is right."""
    V = tokenizer.vocab_size
    logits = torch.full((V, V), -50.0)
    circle = [tokenizer.encode(c)[0] for c in "abcd"]
    for a, b in zip(circle, [*circle[1:], circle[0]], strict=True):
        logits[a, b] = 50.0
    logits[:, circle[0]] += 40.0
    lm = chain(logits, tokenizer)
    prompt = "abcdabcdabcd" + THINK
    engine = Engine(lm, dtype="model", speculate="ngram")
    params = SamplingParams(max_tokens=60, temperature=0.0, thinking_budget=20 + budget)
    (with_drafts,) = engine.generate([prompt], params)
    assert engine.stats["accepted"] > 10
    assert (
        with_drafts[0].token_ids
        == complete(lm, prompt, temperature=0.0, max_tokens=60, thinking_budget=20 + budget)[0].token_ids
    )
    assert tokenizer.decode(with_drafts[0].token_ids).index(END_THINK) == 20 + budget


def test_drafts_of_a_prediction_module_do_not_slip_past_either(lm: LanguageModel) -> None:
    tokenizer = Tokenizer.characters("abcdefghijklmnop ")
    config = lm.config
    shape = {
        name: getattr(config, name)
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "kv_lora_rank",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "v_head_dim",
            "initializer_range",
            "max_position_embeddings",
        )
    }
    shape |= {"vocab_size": tokenizer.vocab_size, "num_nextn_predict_layers": 1}
    model = LanguageModel.create(shape, tokenizer)
    for budget in (0, 5, 12):
        params = {
            "max_tokens": 40,
            "seed": budget,
            "thinking_budget": budget,
            "ignore_eos": True,
            "n": 3,
            "logit_bias": {tokenizer.token_id(END_THINK): -100.0},
        }
        plain = complete(model, "a" + THINK, **params)
        drafted = complete(model, "a" + THINK, {"speculate": "mtp"}, **params)
        assert [c.token_ids for c in plain] == [c.token_ids for c in drafted]
        assert {c.thinking_tokens for c in drafted} == {budget + 1}


@pytest.mark.parametrize("tokenizer", [ABC, SPELLED], ids=["one token", "letters"])
@pytest.mark.parametrize("budget", [0, 6])
def test_a_grammar_begins_behind_the_tag(chain: Chain, tokenizer: Tokenizer, budget: int) -> None:
    lm = random_chain(chain, tokenizer, bar="<")
    grammar = Grammar.regex("[0-3]{4}").after(END_THINK)
    for out in complete(lm, THINK, max_tokens=60, n=3, seed=1, thinking_budget=budget, grammar=grammar):
        thought, answer = tokenizer.decode(out.token_ids, True).split(END_THINK)
        assert len(thought) == budget
        assert len(answer) == 4
        assert set(answer) <= set("0123")
        assert out.finish_reason == "stop"


def test_a_grammar_without_room_for_the_tag_has_the_last_word(chain: Chain) -> None:
    lm = random_chain(chain, SPELLED)
    params = {"max_tokens": 30, "seed": 1, "thinking_budget": 0}
    (out,) = complete(lm, THINK, grammar=Grammar.regex("[ab]{5}"), **params)
    assert set(out.text) <= set("ab")
    assert len(out.text) == 5
    (out,) = complete(lm, THINK, grammar=Grammar.regex("[ab]{5}</think>[0-3]"), **params)
    assert out.text[5:-1] == END_THINK


def test_a_stop_text_ends_the_completion_at_the_tag(chain: Chain) -> None:
    lm = random_chain(chain, ABC, bar="<")
    (out,) = complete(lm, THINK, max_tokens=30, seed=0, thinking_budget=3, stop=[END_THINK])
    assert (len(out.text), out.finish_reason, out.thinking_tokens) == (3, "stop", 4)


async def read(engine: Engine, at: int, stop: threading.Event, params: SamplingParams) -> list[Delta]:
    """The deltas of a stream, told to stop thinking once `at` tokens are there."""
    deltas, seen = [], 0
    if at == 0:
        stop.set()
    async for delta in engine.stream_async("ab" + THINK, params, stop_thinking=stop):
        deltas.append(delta)
        seen += len(delta.token_ids)
        if seen >= at:
            stop.set()
    return deltas


@pytest.mark.parametrize("speculate", [None, "ngram"])
@pytest.mark.parametrize("at", [0, 5])
def test_thinking_stops_when_told(chain: Chain, speculate: str | None, at: int) -> None:
    lm = random_chain(chain, ABC, bar="<")
    engine = Engine(lm, dtype="model", speculate=speculate)
    params = SamplingParams(max_tokens=400, seed=4)
    out = asyncio.run(read(engine, at, threading.Event(), params))[-1].completion
    assert out is not None
    assert at < out.thinking_tokens < 400
    assert out.text.count(END_THINK) == 1
    (free,) = engine.generate(["ab" + THINK], params)[0:1]
    before = out.thinking_tokens - 1
    assert out.token_ids[:before] == free[0].token_ids[:before]
    if at == 0:
        assert before == 0


def test_an_event_that_nobody_sets_changes_nothing(chain: Chain, lm: LanguageModel) -> None:
    thinker, params = random_chain(chain, ABC), SamplingParams(max_tokens=50, seed=2)
    for model, prompt in ((thinker, "ab" + THINK), (thinker, "ab"), (lm, "ab")):
        engine = Engine(model, dtype="model")

        async def last(engine: Engine = engine, prompt: str = prompt) -> Completion | None:
            stream = engine.stream_async(prompt, params, stop_thinking=threading.Event())
            return [delta async for delta in stream][-1].completion

        assert asyncio.run(last()) == engine.generate([prompt], params)[0][0]


def test_a_model_that_does_not_think_has_no_budget() -> None:
    plain = Tokenizer.characters("abc", chat_template="{{ messages }}", added_tokens=())
    unable = Tokenizer.characters("abc", added_tokens=())  # its template speaks of a tag that it cannot write
    config = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4,
        "v_head_dim": 5,
    }
    for tokenizer in (plain, unable, None):
        model = LanguageModel.create(config | {"vocab_size": plain.vocab_size}, tokenizer)
        engine, params = Engine(model, dtype="model"), SamplingParams(thinking_budget=3, max_tokens=3)
        with pytest.raises(ValueError, match="this model does not think"):
            engine.generate([[4, 5]], params)
        assert engine.generate([[4, 5]], SamplingParams(max_tokens=3))[0][0].thinking_tokens in (0, 3)


def test_settings_that_contradict_each_other_are_refused(chain: Chain) -> None:
    lm = random_chain(chain, ABC)
    tag = ABC.token_id(END_THINK)
    with pytest.raises(ValueError, match="min_tokens forbids"):
        complete(lm, THINK, min_tokens=5, stop_token_ids=[tag], thinking_budget=3)
    for wrong in (-1, 1.5, True, "3", float("nan")):
        with pytest.raises(ValueError, match="thinking_budget="):
            SamplingParams(thinking_budget=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "opened", "count"),
    [
        ("abc", False, 0),
        ("abc", True, 3),
        ("<think>abc", False, 10),
        (" \n<think>ab", False, 11),
        ("abc</think>ab", False, 0),
        ("abc</think>ab", True, 11),
        ("</think>", True, 8),
        ("a<think>b", False, 0),
        ("", True, 0),
    ],
)
def test_the_tokens_of_thinking(text: str, opened: bool, count: int) -> None:
    assert thinking_tokens(SPELLED, SPELLED.encode(text), text, opened) == count
    if THINK not in text and END_THINK in text:
        one = text.index(END_THINK) + 1
        assert thinking_tokens(ABC, ABC.encode(text), text, opened) == (one if opened else 0)
