"""Sampling: every setting against its definition, and randomness that belongs to a request alone."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from luciola.engine.engine import Engine
from luciola.engine.params import SamplingParams
from luciola.engine.sampler import (
    BLOCK,
    History,
    NotFiniteError,
    NothingAllowedError,
    Settings,
    UniformStream,
    derived_seed,
    largest,
    sample,
)
from luciola.model.language_model import LanguageModel

SETTINGS = settings(max_examples=100, deadline=None, derandomize=True)
ENDS = (1, 2)


def edited(logits: np.ndarray, p: SamplingParams, prompt: Sequence[int], generated: Sequence[int]) -> np.ndarray:
    """Masks, bias and penalties by the book, a token at a time."""
    out = logits.astype(np.float64)
    for token in range(len(out)):
        if len(generated) < p.min_tokens and (token in p.stop_token_ids or (token in ENDS and not p.ignore_eos)):
            out[token] = -np.inf
        out[token] += dict(p.logit_bias).get(token, 0.0)
        if token in prompt or token in generated:
            out[token] *= 1 / p.repetition_penalty if out[token] > 0 else p.repetition_penalty
        count = list(generated).count(token)
        out[token] -= p.presence_penalty * (count > 0) + p.frequency_penalty * count
    return out


def distribution(
    logits: np.ndarray, p: SamplingParams, prompt: Sequence[int] = (), generated: Sequence[int] = ()
) -> np.ndarray:
    """What a token is drawn from, in float64: edits, temperature, top-k, top-p, min-p."""
    scores = edited(logits, p, prompt, generated)
    q = np.exp((scores - scores.max()) / p.temperature)
    q /= q.sum()
    order = np.argsort(-q, kind="stable")[: p.top_k or len(q)]
    head = q[order] / q[order].sum()
    order = order[: int(np.searchsorted(np.cumsum(head), p.top_p, side="left")) + 1]
    kept = np.zeros_like(q)
    kept[order] = q[order] * (q[order] >= p.min_p * q.max())
    return kept / kept.sum()


def draw(logits: Tensor, params: list[SamplingParams], uniform: list[float], **more: Any) -> list[int]:
    return sample(logits, Settings.of(params, ENDS), torch.tensor(uniform), **more).tokens.tolist()


def fully_sorted(p_V: Tensor, params: SamplingParams, u: float) -> int:
    """The draw in float32, from probabilities sorted as a whole (stably: equal ones by id)."""
    sorted_p, order = p_V.sort(descending=True, stable=True)
    inside = torch.arange(len(p_V)) < (params.top_k or len(p_V))
    cumulative = torch.where(inside, sorted_p, 0.0).cumsum(-1)
    before = torch.cat([torch.zeros(1), cumulative[:-1]])
    if params.top_p < 1.0:
        inside &= before < torch.tensor(params.top_p) * (cumulative[-1] if params.top_k else torch.tensor(1.0))
    inside &= sorted_p >= torch.tensor(params.min_p) * sorted_p[0]
    kept = torch.zeros_like(p_V)
    kept[order[inside]] = sorted_p[inside]
    total = kept.cumsum(-1)
    threshold = torch.minimum(torch.tensor(u) * total[-1], total[-1].nextafter(torch.tensor(0.0)))
    return int(torch.searchsorted(total, threshold, right=True))


@given(
    st.sampled_from([1, 2, 255, 256, 257, 1000, 5000, 16_384, 17_003]),
    st.sampled_from([0, 1, 2, 3, 100, 255, 256, 257, 1000, 4095, 4096, 4097, 9999]),
    st.sampled_from([1e-9, 0.01, 0.3, 0.9, 0.95, 0.999, 0.9999999, 1.0]),
    st.sampled_from([0.0, 1e-3, 0.05, 0.5, 1.0]),
    st.sampled_from([None, 0.0, 0.5, 2.0]),
    st.sampled_from([0.0, 0.01, 1.0, 3.0, 30.0]),
    st.integers(0, 999),
)
@settings(max_examples=400, deadline=None, derandomize=True)
def test_a_few_candidates_give_what_sorting_everything_gives(
    V: int, top_k: int, top_p: float, min_p: float, step: float | None, spread: float, seed: int
) -> None:
    """Exactly: also where many tokens are equally likely (logits in steps), and for distributions sharp and flat."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, V, generator=generator) * spread
    if step is not None:
        logits = (logits / (step or spread + 1)).round() * (step or spread + 1)
    params = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p)
    p = logits.softmax(-1)
    for _ in range(4):
        u = torch.rand(3, generator=generator).tolist()
        assert draw(logits, [params] * 3, u) == [fully_sorted(p[b], params, u[b]) for b in range(3)]


def test_equally_likely_tokens_are_kept_by_id() -> None:
    """Two of 600 equal tokens are inside; whichever of them a partial sort comes upon first."""
    logits = torch.zeros(1, 600)
    logits[0, 590] = 1.0
    for u in torch.linspace(0, 0.999, 50).tolist():
        assert draw(logits, [SamplingParams(top_k=3)], [u])[0] in (0, 1, 590)
        assert draw(logits, [SamplingParams(top_k=300)], [u])[0] in {*range(299), 590}
        assert draw(logits, [SamplingParams(top_k=400)], [u])[0] in {*range(399), 590}


@given(
    st.lists(st.integers(0, 11), max_size=8), st.lists(st.integers(0, 11), max_size=12),
    st.dictionaries(st.integers(0, 11), st.floats(-100, 100), max_size=4),
    st.floats(0.1, 10), st.floats(-2, 2), st.floats(-2, 2), st.integers(0, 12), st.booleans(), st.integers(0, 99),
)  # fmt: skip
@SETTINGS
def test_masks_bias_and_penalties_are_their_definitions(
    prompt: list[int], generated: list[int], bias: dict[int, float], repetition: float, presence: float,
    frequency: float, min_tokens: int, ignore_eos: bool, seed: int,
) -> None:  # fmt: skip
    """Read off the order in which greedy decoding would take the tokens: each is taken, then barred."""
    params = SamplingParams(
        temperature=0.0, logit_bias=bias, repetition_penalty=repetition, presence_penalty=presence,
        frequency_penalty=frequency, min_tokens=min_tokens, ignore_eos=ignore_eos, stop_token_ids=[4],
    )  # fmt: skip
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(seed)) * 3
    before = logits.clone()
    history = History(prompt)
    for token in generated:
        history.push(token)
    expected = edited(logits[0].numpy(), params, prompt, generated)
    allowed = torch.ones(12, dtype=torch.bool)
    for _ in range(int(np.isfinite(expected).sum())):
        (token,) = draw(logits, [params], [0.5], histories=[history], allowed={0: allowed})
        best = np.where(allowed, expected, -np.inf)
        np.testing.assert_allclose(best[token], best.max(), rtol=1e-5, atol=1e-4)
        allowed[token] = False
    with pytest.raises(NothingAllowedError):
        draw(logits, [params], [0.5], histories=[history], allowed={0: allowed})
    assert torch.equal(logits, before)


def test_a_history_knows_what_came_behind_a_draft() -> None:
    history = History([5, 6, 5])
    for token in range(100, 300):
        history.push(token)
    further = history.followed_by([5, 7, 7])
    assert (history.length, further.length) == (200, 203)
    for h, expected in ((history, {}), (further, {5: 1.0, 7: 2.0})):
        tokens, counts = h.columns(torch.device("cpu"))
        found = dict(zip(tokens.tolist(), counts.tolist(), strict=True))
        assert found == {5: 0.0, 6: 0.0, **dict.fromkeys(range(100, 300), 1.0), **expected}


def test_a_row_that_needs_a_history_says_so() -> None:
    with pytest.raises(ValueError, match="needs its History"):
        draw(torch.zeros(1, 5), [SamplingParams(presence_penalty=1.0)], [0.5])


@given(st.integers(1, 20), st.floats(0.05, 1.0), st.integers(0, 20), st.floats(0.0, 1.0, exclude_max=True, width=32))
@SETTINGS
def test_every_draw_is_a_token_that_was_kept(V: int, top_p: float, top_k: int, u: float) -> None:
    logits = torch.randn(1, V, generator=torch.Generator().manual_seed(V))
    token = draw(logits, [SamplingParams(top_p=top_p, top_k=top_k)], [u])[0]
    assert 0 <= token < V
    assert distribution(logits[0].numpy(), SamplingParams(top_k=top_k, top_p=min(1.0, top_p + 1e-6)))[token] > 0


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(top_k=4), SamplingParams(top_p=0.99, min_p=0.1)])
def test_impossible_tokens_are_never_drawn_whatever_the_number(params: SamplingParams) -> None:
    """Not even at the very ends of [0, 1), where rounding meets tokens of probability 0."""
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    for u in (0.0, 1e-30, 0.25, 0.5, 0.75, float(np.nextafter(np.float32(1), np.float32(0)))):
        assert draw(logits, [params], [u])[0] == (1 if u < 0.5 else 3)


MIXED = [
    SamplingParams(temperature=0.0),
    SamplingParams(top_k=2),
    SamplingParams(top_p=0.3),
    SamplingParams(temperature=2.0),
    SamplingParams(),
    SamplingParams(top_p=0.95, temperature=0.6, top_logprobs=5),
    SamplingParams(min_p=0.1, logit_bias={3: 2.0}),
    SamplingParams(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.1, top_k=300),
    SamplingParams(temperature=0.0, min_tokens=5, stop_token_ids=[7]),
    SamplingParams(top_p=0.999, top_logprobs=2),
]


@pytest.mark.parametrize("V", [12, 1001, 40_000])
def test_a_row_is_the_same_bit_for_bit_whatever_its_neighbours_are(V: int) -> None:
    B = len(MIXED)
    generator = torch.Generator().manual_seed(V)
    logits = torch.randn(B, V, generator=generator) * 2
    histories = [History([1, 2]).followed_by([3, 3, 4]) for _ in range(B)]
    allowed = {2: torch.rand(V, generator=generator) < 0.5}
    together = Settings.of(MIXED, ENDS)
    for _ in range(5):
        uniform = torch.rand(B, generator=generator)
        all_rows = sample(logits, together, uniform, True, histories, allowed)
        assert all_rows.tokens.tolist() == sample(logits, together, uniform, False, histories, allowed).tokens.tolist()
        for b in range(B):
            alone = sample(
                logits[b : b + 1], Settings.of([MIXED[b]], ENDS), uniform[b : b + 1], True, [histories[b]],
                {0: allowed[b]} if b in allowed else {},
            )  # fmt: skip
            for whole, part in zip(all_rows[:3], alone[:3], strict=True):
                assert torch.equal(whole[b : b + 1], part)
            assert all_rows.top_logprobs.get(b) == alone.top_logprobs.get(0)


def test_more_likeliest_tokens_than_there_are_are_all() -> None:
    logits = torch.randn(1, 500, generator=torch.Generator().manual_seed(1)).expand(9, -1)
    uniform = [i / 9 for i in range(9)]
    for most in (500, 10**6, 2**63 - 1):
        assert draw(logits, [SamplingParams(top_k=most)] * 9, uniform) == draw(logits, [SamplingParams()] * 9, uniform)


def test_a_huge_temperature_draws_evenly_among_what_is_allowed() -> None:
    logits = torch.tensor([[5.0, -5.0, 0.0, 3.0]])
    allowed = {0: torch.tensor([True, False, True, True])}
    for temperature in (1e30, 1e39, 1e300):
        for u, token in ((0.2, 0), (0.5, 2), (0.9, 3)):
            params = [SamplingParams(temperature=temperature)]
            assert sample(logits, Settings.of(params), torch.tensor([u]), allowed=allowed).tokens.tolist() == [token]


def test_the_strongest_repetition_penalties_make_no_infinities() -> None:
    logits = torch.tensor([[1000.0, -1000.0, 0.0, 3.0]])
    for penalty in (0.01, 1e6):
        out = sample(
            logits, Settings.of([SamplingParams(repetition_penalty=penalty)]), torch.tensor([0.0]), False,
            [History([0, 1, 2, 3])],
        )  # fmt: skip
        assert out.tokens.tolist() == [0]


def test_the_first_of_equally_likely_tokens_is_the_greedy_one() -> None:
    logits = torch.zeros(2, 1000)
    logits[0, [30, 700]] = 1.0
    for logprobs in (False, True):
        assert draw(logits, [SamplingParams(temperature=0.0)] * 2, [0.9, 0.9], logprobs=logprobs) == [30, 0]


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-30, 1e-40, 1e-60])
def test_a_tiny_temperature_is_the_likeliest_token(temperature: float) -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [300.0, -300.0, 299.0]])
    for top_p in (1.0, 0.5, 1e-60):
        params = SamplingParams(temperature=temperature, top_p=top_p)
        assert draw(logits, [params] * 2, [0.7, 0.7]) == [1, 0]


@given(st.floats(0.1, 3.0), st.integers(0, 999), st.booleans())
@SETTINGS
def test_log_probabilities_are_the_models_own(temperature: float, seed: int, edits: bool) -> None:
    """Of the whole vocabulary, before masks, bias, penalties, top-k, top-p and min-p; tempered ones at the sampling
    temperature."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 9, generator=generator).mul(4).round().div(4)  # with equal ones
    bias = {"logit_bias": {3: 5.0}, "presence_penalty": 1.0} if edits else {}
    params = [
        SamplingParams(temperature=temperature, top_k=3, top_p=0.8, min_p=0.1, top_logprobs=k, **bias)
        for k in (4, 0, 9)
    ]
    histories = [History([1]).followed_by([2, 3])] * 3
    drawn = sample(logits, Settings.of(params), torch.rand(3, generator=generator), True, histories)
    for found, t in ((drawn.logprobs, 1.0), (drawn.tempered_logprobs, temperature)):
        expected = (logits / t).log_softmax(-1).gather(1, drawn.tokens[:, None]).squeeze(1)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert drawn.top_logprobs is not None
    assert set(drawn.top_logprobs) == {0, 2}
    for b, k in ((0, 4), (2, 9)):
        expected, order = logits[b].log_softmax(-1).sort(descending=True, stable=True)
        tokens, found = zip(*drawn.top_logprobs[b], strict=True)
        assert list(tokens) == order[:k].tolist()
        torch.testing.assert_close(torch.tensor(found), expected[:k], atol=1e-5, rtol=1e-5)
        token = int(drawn.tokens[b])
        assert dict(drawn.top_logprobs[b]).get(token, float(drawn.logprobs[b])) == float(drawn.logprobs[b])


CHI_SQUARE_11 = 37.4  # exceeded with probability 1e-4 by chance, with 11 degrees of freedom


def fits(observed: np.ndarray, p: np.ndarray) -> bool:
    """Pearson's chi-square; and nothing where there should be nothing."""
    kept, count = p > 0, observed.sum()
    return observed[~kept].sum() == 0 and ((observed - count * p)[kept] ** 2 / (count * p[kept])).sum() < CHI_SQUARE_11


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 4},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"temperature": 1.3, "top_k": 6, "top_p": 0.85, "min_p": 0.15},
        {"logit_bias": {3: 2.0, 4: -100.0}},
        {"repetition_penalty": 1.8},
        {"repetition_penalty": 0.5},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.7},
        {"frequency_penalty": -0.4, "presence_penalty": -1.0},
        {"min_tokens": 9, "stop_token_ids": [6, 7]},
        {"min_tokens": 9, "ignore_eos": True},
        {
            "temperature": 0.8, "top_k": 9, "top_p": 0.95, "min_p": 0.02, "logit_bias": {0: 1.0},
            "repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.2, "min_tokens": 9,
        },
    ],
)  # fmt: skip
def test_draws_have_the_distribution_of_their_settings(params: dict[str, Any]) -> None:
    """20,000 draws from a vocabulary of 12."""
    count, prompt, generated = 20_000, [3, 5, 5], [0, 5, 8, 8, 8]
    p = SamplingParams(**params)
    logits = torch.randn(12, generator=torch.Generator().manual_seed(5))
    stream = UniformStream(1, 0, prompt)
    histories = [History(prompt).followed_by(generated)] * 500
    settings = Settings.of([p] * 500, ENDS)
    observed = np.zeros(12)
    for i in range(0, count, 500):
        uniform = torch.tensor([stream.number(j) for j in range(i, i + 500)])
        tokens = sample(logits.expand(500, -1), settings, uniform, histories=histories).tokens
        observed += np.bincount(tokens, minlength=12)
    assert fits(observed, distribution(logits.numpy(), p, prompt, generated))


@pytest.mark.parametrize("params", [{}, {"temperature": 1.7}, {"temperature": 1.3, "top_k": 6, "top_p": 0.85}])
def test_the_engine_draws_from_the_distribution(chain: Callable[..., LanguageModel], params: dict[str, Any]) -> None:
    """4,000 samples of a vocabulary of 12, through prefill, head and sampler."""
    logits = torch.randn(12, 12, generator=torch.Generator().manual_seed(5))
    out = Engine(chain(logits), dtype="model").generate([[3]], SamplingParams(max_tokens=1, n=4000, seed=1, **params))
    observed = np.bincount([c.token_ids[0] for c in out[0]], minlength=12)
    assert fits(observed, distribution(logits[3].numpy(), SamplingParams(**params)))


def test_a_stream_depends_on_seed_sample_and_prompt_only() -> None:
    def numbers(seed: int | None, number: int, prompt: list[int]) -> list[float]:
        stream = UniformStream(seed, number, prompt)
        return [stream.number(i) for i in range(2 * BLOCK)]

    base = numbers(7, 0, [1, 2])
    assert len(set(base)) == 2 * BLOCK
    assert all(0.0 <= u < 1.0 for u in base)
    assert numbers(7, 0, [1, 2]) == base
    others = [numbers(8, 0, [1, 2]), numbers(7, 1, [1, 2]), numbers(7, 0, [1, 3]), numbers(7, 0, [1])]
    others += [numbers(None, 0, [1, 2]), numbers(None, 0, [1, 2]), numbers(-7, 0, [1, 2])]
    assert all(not set(other) & set(base) for other in others)
    assert others[4] != others[5]


def test_numbers_of_a_stream_may_be_asked_for_in_any_order_and_again() -> None:
    stream, other = UniformStream(7, 0, [1]), UniformStream(7, 0, [1])
    places = [300, 0, 5, 300, 64, 63, 0, 301]
    assert [stream.number(i) for i in places] == [[other.number(i) for i in range(302)][i] for i in places]


def test_derived_seeds_differ_wherever_their_parts_do() -> None:
    parts = [(s, t, i) for s in (0, 1, 2**40) for t in range(20) for i in range(20)]
    seeds = {derived_seed(*p) for p in parts}
    assert len(seeds) == len(parts)
    assert all(0 <= s < 2**63 for s in seeds)
    assert derived_seed(3, 1, 4) == derived_seed(3, 1, 4)


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_p": 0.9}, {"top_k": 2, "logit_bias": {1: 1.0}}])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("logprobs", [False, True])
def test_logits_that_are_not_finite_are_an_error_that_names_the_rows(
    params: dict[str, Any], value: float, logprobs: bool
) -> None:
    logits = torch.zeros(4, 5)
    logits[[1, 3], 3] = value
    with pytest.raises(NotFiniteError, match="the model's logits are not finite numbers") as caught:
        draw(logits, [SamplingParams(**params)] * 4, [0.5] * 4, logprobs=logprobs)
    assert caught.value.rows == (1, 3)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_may_draw_nothing_are_told_from_damaged_ones(temperature: float) -> None:
    logits = torch.zeros(3, 5)
    params = [SamplingParams(temperature=temperature)] * 3
    nothing = torch.zeros(5, dtype=torch.bool)
    with pytest.raises(NothingAllowedError, match="forbids all of them") as caught:
        draw(logits, params, [0.5] * 3, allowed={1: nothing})
    assert caught.value.rows == (1,)
    logits[2, 0] = torch.nan
    with pytest.raises(NotFiniteError) as damaged:
        draw(logits, params, [0.5] * 3, allowed={1: nothing})
    assert damaged.value.rows == (2,)


@pytest.mark.parametrize("V", [1, 5, 16, 33, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_largest_is_the_first_of_the_largest(V: int, dtype: torch.dtype) -> None:
    x_NV = torch.randn(6, 2 * V).mul(3).round().to(dtype)[:, :V]  # many are equal, and rows lie apart
    x_NV[0], x_NV[1] = -torch.inf, torch.inf
    values_N, places_N = largest(x_NV)
    assert torch.equal(values_N, x_NV.amax(-1))
    assert places_N.tolist() == [row.index(max(row)) for row in x_NV.tolist()]


@pytest.mark.parametrize("place", [0, 15, 16, 39])
def test_a_row_with_nan_has_no_largest_number(place: int) -> None:
    x_NV = torch.randn(2, 40)
    x_NV[1, place] = torch.nan
    values_N, places_N = largest(x_NV)
    assert values_N[1].isnan() and values_N[0] == x_NV[0].amax() and 0 <= places_N[1] < 40
