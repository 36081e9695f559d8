"""SamplingParams: what makes no sense is named; what is given is copied, equal and unchangeable."""

import copy
import dataclasses
import pickle
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import luciola
from luciola.engine.grammar import Grammar
from luciola.engine.params import SamplingParams


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0), ("max_tokens", 2.5), ("max_tokens", "3"), ("min_tokens", -1), ("min_tokens", True),
        ("temperature", -0.1), ("temperature", float("inf")), ("temperature", float("nan")), ("temperature", "hot"),
        ("top_p", 0.0), ("top_p", 1.1), ("top_p", None), ("top_k", -1), ("top_k", 1.5), ("min_p", -0.1),
        ("min_p", 1.01), ("min_p", float("nan")), ("repetition_penalty", 0.0), ("repetition_penalty", float("inf")),
        ("repetition_penalty", -1), ("presence_penalty", 2.1), ("presence_penalty", None), ("frequency_penalty", -2.1),
        ("frequency_penalty", float("nan")), ("n", 0), ("n", True), ("seed", 1.5), ("stop", [""]), ("stop", [3]),
        ("stop", 3), ("stop_token_ids", 5), ("stop_token_ids", [-1]), ("stop_token_ids", [1.0]),
        ("stop_token_ids", "12"), ("stop_token_ids", None), ("top_logprobs", -1), ("top_logprobs", True),
        ("logprobs", 5), ("speculate", None), ("ignore_eos", "no"), ("routes", 0), ("logit_bias", 3),
        ("logit_bias", [1, 2]), ("logit_bias", "ab"), ("top_k", 2**63), ("max_tokens", 2**63), ("min_tokens", 10**400),
        ("n", 2**63), ("seed", 2**63), ("seed", -(2**63)), ("seed", 10**400), ("top_logprobs", np.uint64(2**63)),
        ("stop_token_ids", [2**63]), ("temperature", 10**400), ("temperature", Fraction(10**400)), ("top_p", 10**400),
        ("min_p", -(10**400)), ("presence_penalty", 10**400), ("frequency_penalty", -(10**400)),
        ("repetition_penalty", 10**400), ("repetition_penalty", 1e-40), ("repetition_penalty", 1e-300),
        ("repetition_penalty", 0.0099), ("repetition_penalty", 1.1e6),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{name}=.* must "):
        SamplingParams(**{name: value})  # type: ignore[arg-type]


def test_a_number_too_long_to_be_written_is_refused_in_a_sentence() -> None:
    for name in ("temperature", "seed", "top_k"):
        with pytest.raises(ValueError, match=f"^{name}=a number of thousands of digits must be"):
            SamplingParams(**{name: 10**5000})


def test_the_ends_of_every_range_are_taken() -> None:
    most = 2**63 - 1
    SamplingParams(max_tokens=most, min_tokens=most, top_k=most, n=65_536, seed=most, stop_token_ids=[most])
    SamplingParams(seed=-most, repetition_penalty=0.01, min_p=1, top_p=1, logit_bias={most: -100})
    SamplingParams(repetition_penalty=10**6, presence_penalty=-2, frequency_penalty=2, temperature=1e300)


@pytest.mark.parametrize(
    ("params", "complaint"),
    [
        ({"min_tokens": 6, "max_tokens": 5}, "min_tokens=6 must be at most max_tokens=5"),
        ({"logit_bias": {-1: 2.0}}, "logit_bias has token -1; tokens must be whole numbers"),
        ({"logit_bias": {"7": 2.0}}, "logit_bias has token '7'; tokens must be whole numbers"),
        ({"logit_bias": {7: float("inf")}}, "logit_bias of token 7 is inf; it must be a number between -100 and 100"),
        ({"logit_bias": {7: float("nan")}}, "logit_bias of token 7 is nan"),
        ({"logit_bias": {7: 100.5}}, "logit_bias of token 7 is 100.5"),
        ({"logit_bias": {7: 10**400}}, "logit_bias of token 7 is 1000.* it must be a number between -100 and 100"),
        ({"logit_bias": {2**63: 1}}, "logit_bias has token 9223372036854775808; tokens must be whole numbers"),
        ({"logit_bias": {7: None}}, "logit_bias of token 7 is None"),
        ({"logit_bias": [(3, 1.0), (3, 2.0)]}, "logit_bias names token 3 twice"),
    ],
)
def test_contradictions_are_said_in_a_sentence(params: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        SamplingParams(**params)


def test_tokens_beyond_a_models_vocabulary_are_named() -> None:
    SamplingParams(logit_bias={9: 1.0}, stop_token_ids=[9], top_logprobs=10).check_vocabulary(10)
    SamplingParams().check_vocabulary(1)
    with pytest.raises(ValueError, match="logit_bias names token 10, outside the vocabulary of 10"):
        SamplingParams(logit_bias={3: 1.0, 10: 1.0}).check_vocabulary(10)
    with pytest.raises(ValueError, match="stop_token_ids names token 12, outside the vocabulary of 10"):
        SamplingParams(stop_token_ids=[3, 12]).check_vocabulary(10)
    with pytest.raises(ValueError, match="top_logprobs=11 must be at most the vocabulary's size, 10"):
        SamplingParams(top_logprobs=11).check_vocabulary(10)


def test_one_stop_text_may_stand_alone() -> None:
    assert SamplingParams(stop="\n").stop == ("\n",)
    assert SamplingParams(stop=None).stop == ()  # type: ignore[arg-type]


def test_numbers_may_be_numpys() -> None:
    numpys = SamplingParams(
        max_tokens=np.int64(3), temperature=np.float32(0.5), seed=np.int64(1), min_p=np.float64(0.1),
        stop_token_ids=np.array([4, 2]), logit_bias={np.int32(3): np.float16(1.5)}, top_logprobs=np.int8(2),
        speculate=np.bool_(False),
    )  # type: ignore[arg-type]  # fmt: skip
    plain = SamplingParams(
        max_tokens=3, temperature=0.5, seed=1, min_p=0.1, stop_token_ids=[4, 2], logit_bias={3: 1.5}, top_logprobs=2,
        speculate=False,
    )  # fmt: skip
    assert numpys == plain
    assert hash(numpys) == hash(plain)


def test_the_likeliest_tokens_imply_log_probabilities() -> None:
    assert SamplingParams(top_logprobs=3).logprobs
    assert not SamplingParams(top_logprobs=0).logprobs


def test_what_is_given_is_copied_and_cannot_be_changed() -> None:
    stop, ids, bias = ["a", "b"], [3, 4, 3], {5: 1.0, 2: -1}
    params = SamplingParams(stop=stop, stop_token_ids=ids, logit_bias=bias)
    stop.append("c")
    ids.append(9)
    bias[5] = 7.0
    assert params.stop == ("a", "b")
    assert params.stop_token_ids == (3, 4)
    assert params.logit_bias == ((2, -1.0), (5, 1.0))
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.top_k = 3  # type: ignore[misc]


def test_copies_are_equal() -> None:
    params = SamplingParams(
        stop=["a"], logit_bias={5: 1.0}, min_p=0.2, presence_penalty=0.5, grammar=Grammar.regex("g"), speculate=False
    )
    for other in (copy.deepcopy(params), pickle.loads(pickle.dumps(params)), dataclasses.replace(params)):
        assert other == params
        assert hash(other) == hash(params)
    assert dataclasses.replace(params, min_p=0.3) != params


def test_what_history_is_needed_for() -> None:
    for params in ({"repetition_penalty": 1.1}, {"presence_penalty": -1}, {"frequency_penalty": 1}, {"min_tokens": 2}):
        assert SamplingParams(**params).needs_history
    assert not SamplingParams(logit_bias={1: 2.0}, top_k=5).needs_history


def test_the_public_name_is_this_class() -> None:
    assert luciola.SamplingParams is SamplingParams


@pytest.mark.parametrize("grammar", ["abc", {"type": "object"}, 3])
def test_a_grammar_must_be_one(grammar: Any) -> None:
    with pytest.raises(ValueError, match=r"grammar=.* must be a Grammar, such as Grammar.json"):
        SamplingParams(grammar=grammar)


def test_no_more_samples_than_can_be_kept() -> None:
    assert SamplingParams(n=65_536).n == 65_536
    with pytest.raises(ValueError, match="n=65537 must be a whole number from 1 to 65536"):
        SamplingParams(n=65_537)
