"""Sampling: temperature, top-k and top-p against their definitions, and randomness that belongs to a request alone."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luciola.engine.engine import Engine
from luciola.engine.sampler import (
    BLOCK,
    NotFiniteError,
    SamplingParams,
    Settings,
    UniformStream,
    derived_seed,
    sample,
)
from luciola.model.language_model import LanguageModel

SETTINGS = settings(max_examples=100, deadline=None, derandomize=True)


def reference(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """The distribution by the book: temperature, the k likeliest, then the shortest head that reaches p."""
    p = np.exp((logits - logits.max()) / temperature)
    order = np.argsort(-p, kind="stable")[: top_k or len(p)]
    head = p[order] / p[order].sum()
    keep = int(np.searchsorted(np.cumsum(head), top_p, side="left")) + 1
    q = np.zeros_like(p)
    q[order[:keep]] = head[:keep]
    return q / q.sum()


@given(st.integers(1, 30), st.integers(0, 35), st.floats(0.01, 1.0), st.floats(0.2, 3.0), st.integers(0, 999))
@SETTINGS
def test_truncation_is_the_definition(V: int, top_k: int, top_p: float, temperature: float, seed: int) -> None:
    logits = np.random.default_rng(seed).normal(size=V) * 2
    expected = reference(logits, temperature, top_k, top_p)
    p = torch.from_numpy(logits)[None].div(temperature).softmax(-1)
    kept = truncate(p, torch.tensor([[top_k]]), torch.tensor([[top_p]], dtype=torch.float64))
    np.testing.assert_allclose((kept / kept.sum()).numpy()[0], expected, atol=1e-12)


def draw(logits: torch.Tensor, params: list[SamplingParams], uniform: list[float]) -> list[int]:
    return sample(logits, Settings.of(params), torch.tensor(uniform), logprobs=False).tokens.tolist()


@given(st.integers(1, 20), st.floats(0.05, 1.0), st.integers(0, 20), st.floats(0.0, 1.0, exclude_max=True, width=32))
@SETTINGS
def test_every_draw_is_a_token_that_was_kept(V: int, top_p: float, top_k: int, u: float) -> None:
    logits = torch.randn(1, V, generator=torch.Generator().manual_seed(V))
    token = draw(logits, [SamplingParams(top_p=top_p, top_k=top_k)], [u])[0]
    assert 0 <= token < V
    assert reference(logits[0].double().numpy(), 1.0, top_k, min(1.0, top_p + 1e-6))[token] > 0


def test_impossible_tokens_are_never_drawn_whatever_the_number() -> None:
    """Not even at the very ends of [0, 1), where rounding meets tokens of probability 0."""
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    for u in (0.0, 1e-30, 0.25, 0.5, 0.75, float(np.nextafter(np.float32(1), np.float32(0)))):
        assert draw(logits, [SamplingParams()], [u])[0] == (1 if u < 0.5 else 3)


def test_rows_of_a_batch_have_settings_of_their_own() -> None:
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(0)).expand(5, -1)
    params = [
        SamplingParams(temperature=0.0),
        SamplingParams(top_k=2),
        SamplingParams(top_p=0.3),
        SamplingParams(temperature=2.0),
        SamplingParams(),
    ]
    for u in torch.linspace(0, 0.999, 40).tolist():
        together = draw(logits, params, [u] * 5)
        assert together == [draw(logits[:1], [p], [u])[0] for p in params]
        assert together[0] == int(logits[0].argmax())


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-30, 1e-40, 1e-60])
def test_a_tiny_temperature_is_the_likeliest_token(temperature: float) -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [300.0, -300.0, 299.0]])
    assert draw(logits, [SamplingParams(temperature=temperature)] * 2, [0.7, 0.7]) == [1, 0]


@given(st.floats(0.1, 3.0), st.integers(0, 999))
@SETTINGS
def test_log_probabilities_are_of_the_whole_vocabulary(temperature: float, seed: int) -> None:
    """Before top-k and top-p cut it; plain ones at temperature 1, tempered ones at the sampling temperature."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 9, generator=generator)
    params = [SamplingParams(temperature=temperature, top_k=3, top_p=0.8)] * 3
    drawn = sample(logits, Settings.of(params), torch.rand(3, generator=generator), logprobs=True)
    for found, t in ((drawn.logprobs, 1.0), (drawn.tempered_logprobs, temperature)):
        expected = (logits / t).log_softmax(-1).gather(1, drawn.tokens[:, None]).squeeze(1)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


CHI_SQUARE_11 = 37.4  # exceeded with probability 1e-4 by chance, with 11 degrees of freedom


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.7},
        {"top_k": 4},
        {"top_p": 0.7},
        {"temperature": 1.3, "top_k": 6, "top_p": 0.85},
    ],
)
def test_the_engine_draws_from_the_distribution(chain: Callable[..., LanguageModel], params: dict[str, Any]) -> None:
    """Pearson's chi-square over 4,000 samples of a vocabulary of 12, through prefill, head and sampler."""
    logits = torch.randn(12, 12, generator=torch.Generator().manual_seed(5))
    lm = chain(logits)
    count = 4000
    out = Engine(lm, dtype="model").generate([[3]], SamplingParams(max_tokens=1, n=count, seed=1, **params))
    observed = np.bincount([c.token_ids[0] for c in out[0]], minlength=12)
    p = reference(logits[3].double().numpy(), *(params.get(k, d) for k, d in DEFAULTS.items()))
    assert observed[p == 0].sum() == 0
    kept = p > 0
    assert float(((observed - count * p)[kept] ** 2 / (count * p[kept])).sum()) < CHI_SQUARE_11


DEFAULTS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}


def test_a_stream_depends_on_seed_sample_and_prompt_only() -> None:
    def numbers(seed: int | None, number: int, prompt: list[int]) -> list[float]:
        stream = UniformStream(seed, number, prompt)
        return [*stream.block().tolist(), *stream.block().tolist()]

    base = numbers(7, 0, [1, 2])
    assert len(set(base)) == 2 * BLOCK
    assert all(0.0 <= u < 1.0 for u in base)
    assert numbers(7, 0, [1, 2]) == base
    others = [numbers(8, 0, [1, 2]), numbers(7, 1, [1, 2]), numbers(7, 0, [1, 3]), numbers(7, 0, [1])]
    others += [numbers(None, 0, [1, 2]), numbers(None, 0, [1, 2]), numbers(-7, 0, [1, 2])]
    assert all(not set(other) & set(base) for other in others)
    assert others[4] != others[5]


def test_derived_seeds_differ_wherever_their_parts_do() -> None:
    parts = [(s, t, i) for s in (0, 1, 2**40) for t in range(20) for i in range(20)]
    seeds = {derived_seed(*p) for p in parts}
    assert len(seeds) == len(parts)
    assert all(0 <= s < 2**63 for s in seeds)
    assert derived_seed(3, 1, 4) == derived_seed(3, 1, 4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0), ("temperature", -0.1), ("temperature", float("inf")), ("temperature", float("nan")),
        ("top_p", 0.0), ("top_p", 1.1), ("top_k", -1), ("n", 0), ("stop", [""]), ("stop", [3]), ("max_tokens", 2.5),
        ("max_tokens", "3"), ("temperature", "hot"), ("top_p", None), ("top_k", 1.5), ("n", True), ("seed", 1.5),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{name}=.* must be"):
        SamplingParams(**{name: value})  # type: ignore[arg-type]


def test_one_stop_text_may_stand_alone() -> None:
    assert SamplingParams(stop="\n").stop == ("\n",)
    assert SamplingParams(stop=None).stop == ()  # type: ignore[arg-type]


def test_numbers_may_be_numpys() -> None:
    SamplingParams(max_tokens=np.int64(3), temperature=np.float32(0.5), seed=np.int64(1))  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error_and_no_token(temperature: float, value: float) -> None:
    logits = torch.zeros(2, 5)
    logits[1, 3] = value
    settings = Settings.of([SamplingParams(temperature=temperature)] * 2)
    with pytest.raises(NotFiniteError, match="the model's logits are not finite numbers"):
        sample(logits, settings, torch.full((2,), 0.5), logprobs=True)
