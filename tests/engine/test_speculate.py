"""Speculation: the same tokens, sooner. Drafts may be anything; only how many of them count depends on them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luciola.engine.engine import Engine
from luciola.engine.params import SamplingParams
from luciola.engine.speculate import LONGEST_GRAM, Clock, Pace, Speculator, look_up
from luciola.model.language_model import LanguageModel

SHAPE: dict[str, Any] = {
    "vocab_size": 27, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
    "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5, "n_routed_experts": 8,
    "num_experts_per_tok": 3, "moe_intermediate_size": 8, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "initializer_range": 0.3, "max_position_embeddings": 200, "num_nextn_predict_layers": 1,
}  # fmt: skip
METHODS = pytest.mark.parametrize("method", ["mtp", "ngram"])


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel.create(SHAPE, seed=1)


@METHODS
@given(
    st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=20), min_size=1, max_size=4),
    st.fixed_dictionaries({"block_size": st.integers(1, 5), "max_cached_tokens": st.sampled_from([60, 100, 2000])}),
    st.sampled_from([{"temperature": 0.0}, {}, {"temperature": 0.6, "top_p": 0.9}, {"frequency_penalty": 1.0}]),
    st.integers(0, 99),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_the_tokens_are_those_without_speculation(
    model: LanguageModel, method: str, prompts: list[list[int]], options: dict[str, int], sampling: Any, seed: int
) -> None:
    """Greedy and sampled, with penalties, in a cache that is too small for all; and their log-probabilities."""
    params = SamplingParams(max_tokens=30, seed=seed, n=2, logprobs=True, top_logprobs=2, ignore_eos=True, **sampling)
    plain = Engine(model, dtype="model").generate(prompts, params)
    engine = Engine(model, dtype="model", speculate=method, **options)
    for a, b in zip(plain, engine.generate(prompts, params), strict=True):
        for x, y in zip(a, b, strict=True):
            assert x.token_ids == y.token_ids
            assert x.logprobs == pytest.approx(y.logprobs, abs=1e-4)
            assert [list(top) for top in x.top_logprobs or []] == [list(top) for top in y.top_logprobs or []]
    assert engine.blocks_used == 0
    engine._pool.check([])


class Guesses(Speculator):
    """Guesses at random, from few tokens: about one in four is right."""

    def __init__(self) -> None:
        self.method, self.layers, self.most, self.drafted, self.accepted = "any", 0, 3, 0, 0
        self.rng = np.random.default_rng(0)

    def draft(self, runner: Any, sequences: Any, news: Any, states_ND: Any) -> None:
        for sequence in sequences:
            room = sequence.max_tokens - sequence.generated - 1
            sequence.drafts = self.rng.integers(0, 4, min(3, room)).tolist()

    def judge(self, sequence: Any, drafted: int, accepted: int, sequences: int) -> None:
        self.drafted += drafted
        self.accepted += accepted

    class clock:
        note = staticmethod(lambda *_: None)


CHI_SQUARE_63 = 124.0  # exceeded by chance with probability 1e-5, with 63 degrees of freedom


def test_the_distribution_is_the_models_whatever_is_drafted(chain: Callable[..., LanguageModel]) -> None:
    """Pearson's chi-square over the 64 texts of three tokens from four, against the product of the model's own
    probabilities; with different random numbers than any engine without drafts would use."""
    logits = torch.randn(4, 4, generator=torch.Generator().manual_seed(2))
    lm = chain(logits)
    engine = Engine(lm, dtype="model")
    guesses = Guesses()
    engine._speculator = engine._runner.speculator = guesses
    count = 20_000
    (out,) = engine.generate([[1]], SamplingParams(max_tokens=3, n=count, seed=5, ignore_eos=True))
    seen = np.bincount([16 * a + 4 * b + c for a, b, c in (x.token_ids for x in out)], minlength=64)
    p = logits.double().softmax(-1).numpy()
    expected = count * np.array([p[1, a] * p[a, b] * p[b, c] for a in range(4) for b in range(4) for c in range(4)])
    assert guesses.accepted > 1000
    assert guesses.drafted > 2 * guesses.accepted
    assert float(((seen - expected) ** 2 / expected).sum()) < CHI_SQUARE_63


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 8), st.data())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_look_up_finds_the_latest_longest_match(tokens: list[int], most: int, data: st.DataObject) -> None:
    """Against a search of the whole text; asked after every few tokens, as an engine does."""

    class Text:
        pace = Pace()

    text: Any = Text()
    text.pace = Pace()
    for end in sorted({*data.draw(st.lists(st.integers(1, len(tokens)), max_size=4)), len(tokens)}):
        text.tokens = tokens[:end]
        expected: list[int] = []
        for length in range(min(LONGEST_GRAM, end), 0, -1):
            places = [i for i in range(length, end) if text.tokens[i - length : i] == text.tokens[end - length :]]
            if places:
                expected = text.tokens[places[-1] : places[-1] + most]
                break
        assert look_up(text, most) == expected


def test_a_text_that_repeats_is_foreseen(script: Callable[..., LanguageModel]) -> None:
    from luciola.text.tokenizer import Tokenizer

    abc = Tokenizer.characters("abcdefgh")
    lm = script(abc, abc.encode("abcdefgh"))
    engine = Engine(lm, dtype="model", speculate="ngram")
    params = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
    (out,) = engine.generate(["abcdefghab"], params)[0]
    assert out.text == ("cdefghab" * 8)[:60]
    stats = engine.stats
    assert stats["accepted"] > 0.9 * stats["drafted"]
    assert stats["steps"] < 25


@METHODS
def test_every_completion_has_its_own_account_of_drafts(
    model: LanguageModel, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Clock, "cost", lambda *_: 1.0)  # drafts cost nothing, however busy the machine is
    engine = Engine(model, dtype="model", speculate=method)
    params = [SamplingParams(max_tokens=40, n=2, seed=i, ignore_eos=True, speculate=i < 3) for i in range(4)]
    groups = engine.generate([[1, 2, 3, 1, 2, 3]] * 4, params)
    completions = [completion for group in groups for completion in group]
    assert sum(c.drafted for c in completions) == engine.stats["drafted"] > 0
    assert sum(c.accepted for c in completions) == engine.stats["accepted"] > 0
    assert all(0 <= c.accepted <= c.drafted for c in completions)
    assert len({c.drafted for c in completions}) > 2, "a share of the whole would be the same for all"
    assert [(c.drafted, c.accepted) for c in groups[3]] == [(0, 0)] * 2
    plain = Engine(model, dtype="model").generate([[1, 2, 3, 1, 2, 3]] * 4, params)
    assert plain == groups, "the account is no part of what is compared"


def test_speculation_that_does_not_pay_is_given_up_for_that_request() -> None:
    wasteful, useful = Pace(), Pace()
    for _ in range(30):
        if wasteful.paying:
            wasteful.judge(drafted=1, accepted=0, most=4, cost=1.3)
        useful.judge(drafted=useful.drafts, accepted=useful.drafts, most=4, cost=1.3)
    assert not wasteful.paying
    assert wasteful.steps < 12
    assert useful.paying
    assert useful.drafts == 4


def test_a_request_may_opt_out(model: LanguageModel) -> None:
    engine = Engine(model, dtype="model", speculate="mtp")
    engine.generate([[1, 2, 3]], SamplingParams(max_tokens=20, speculate=False, ignore_eos=True))
    assert engine.stats["drafted"] == 0


def test_the_prediction_modules_layer_is_in_the_account(model: LanguageModel) -> None:
    assert Engine(model, dtype="model", speculate="mtp").cache_bytes_per_token == (12 + 4) * 3 * 4
    assert Engine(model, dtype="model", speculate="ngram").cache_bytes_per_token == (12 + 4) * 2 * 4
