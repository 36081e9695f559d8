"""Log-probabilities of the prompt's own tokens, against a full forward pass."""

from typing import Any

import pytest
import torch

from luciola.engine import runner
from luciola.engine.engine import Engine
from luciola.engine.params import SamplingParams
from luciola.engine.sampler import NotFiniteError
from luciola.engine.sequence import Completion
from luciola.model.language_model import LanguageModel

LENGTHS = (1, 2, 5, 17, 40, 70)


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(6, 27, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def right(lm: LanguageModel, tokens: list[int], out: Completion, k: int) -> None:
    """Whether the record is what a full pass over the prompt says."""
    logp = lm.model(torch.tensor([tokens]))[0].log_softmax(-1)
    assert out.prompt_logprobs is not None
    assert out.prompt_top_logprobs is not None
    assert len(out.prompt_logprobs) == len(out.prompt_top_logprobs) == len(tokens)
    assert out.prompt_logprobs[0] is None
    assert out.prompt_top_logprobs[0] is None
    for i, token in enumerate(tokens[1:]):
        assert out.prompt_logprobs[i + 1] == pytest.approx(float(logp[i, token]), abs=1e-4)
        likeliest = out.prompt_top_logprobs[i + 1]
        assert likeliest is not None
        assert list(likeliest.values()) == pytest.approx(logp[i].topk(k).values.tolist(), abs=1e-4)
        assert [float(logp[i, t]) for t in likeliest] == pytest.approx(list(likeliest.values()), abs=1e-4)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"chunk": 7},
        {"chunk": 1},
        {"parity": True},
        {"speculate": "ngram"},
        {"prefix_cache": False},
        {"max_cached_tokens": 130, "block_size": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("k", [0, 3])
def test_they_are_those_of_a_full_pass(lm: LanguageModel, how: dict[str, Any], k: int) -> None:
    asked = [prompt(length, length) for length in LENGTHS]
    params = SamplingParams(max_tokens=12, n=2, seed=0, prompt_logprobs=k, ignore_eos=True)
    engine = Engine(lm, dtype="model", **how)
    for tokens, group in zip(asked, engine.generate(asked, params), strict=True):
        for out in group:
            right(lm, tokens, out, k)
    if "max_cached_tokens" in how:
        assert engine.stats["preemptions"] > 0


def test_a_prefix_in_the_cache_hides_nothing_and_the_completion_is_the_same(lm: LanguageModel) -> None:
    engine, tokens = Engine(lm, dtype="model", block_size=4), prompt(40)
    plain = SamplingParams(max_tokens=20, seed=1)
    (before,) = engine.generate([tokens], plain)[0]
    (scored,) = engine.generate([tokens], SamplingParams(max_tokens=20, seed=1, prompt_logprobs=2))[0]
    (after,) = engine.generate([tokens], plain)[0]
    right(lm, tokens, scored, 2)
    assert before.token_ids == scored.token_ids == after.token_ids
    assert (scored.cached_tokens, after.cached_tokens) == (0, 36)
    assert before.prompt_logprobs is before.prompt_top_logprobs is None


def test_logits_of_a_prompt_are_never_all_there(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of so many numbers at most, once a prompt however many completions it has."""
    most = 10 * lm.config.vocab_size
    monkeypatch.setattr(runner, "CHUNK_NUMBERS", most)
    seen: list[int] = []
    engine = Engine(lm, dtype="model")
    real = lm.model.head

    def head(states: torch.Tensor, **more: Any) -> torch.Tensor:
        logits = real(states, **more)
        seen.append(logits.numel())
        return logits

    monkeypatch.setattr(lm.model, "head", head)
    tokens = prompt(70)
    group = engine.generate([tokens], SamplingParams(max_tokens=1, n=4, prompt_logprobs=1))[0]
    for out in group:
        right(lm, tokens, out, 1)
    assert max(seen) <= most
    assert sum(seen) == (69 + 4) * lm.config.vocab_size


def test_nothing_but_the_prompt_counts_after_giving_way(lm: LanguageModel) -> None:
    """A sequence that is read again with what it has generated records no more than its prompt."""
    asked = [prompt(10, i) for i in range(8)]
    engine = Engine(lm, dtype="model", max_cached_tokens=120, block_size=4)
    params = SamplingParams(max_tokens=60, seed=0, prompt_logprobs=0, ignore_eos=True)
    for tokens, (out,) in zip(asked, engine.generate(asked, params), strict=True):
        right(lm, tokens, out, 0)
    assert engine.stats["preemptions"] > 0


def test_a_damaged_model_is_told_of(chain: Any) -> None:
    lm = chain(torch.full((20, 20), float("nan")))
    with pytest.raises(NotFiniteError):
        Engine(lm, dtype="model").generate([[3, 4, 5]], SamplingParams(max_tokens=2, n=2, prompt_logprobs=1))


def test_numbers_out_of_range_are_refused(lm: LanguageModel) -> None:
    for wrong in (-1, True, 1.5, "1"):
        with pytest.raises(ValueError, match="prompt_logprobs="):
            SamplingParams(prompt_logprobs=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prompt_logprobs=1000 must be at most"):
        Engine(lm, dtype="model").generate([[3]], SamplingParams(prompt_logprobs=1000))
