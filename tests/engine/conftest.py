"""Models for the engine: a random one with experts, and one that writes a known text."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from luciola.model.language_model import LanguageModel
from luciola.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def lm(tiny: dict[str, Any]) -> LanguageModel:
    """Random weights, so large that likely tokens are clearly ahead; ends a text now and then."""
    tokenizer = Tokenizer.characters("abcdefghijklmnop ")
    return LanguageModel.create(tiny | {"vocab_size": tokenizer.vocab_size}, tokenizer)


@pytest.fixture(scope="session")
def script(chain: Callable[..., LanguageModel]) -> Callable[..., LanguageModel]:
    """`script(tokenizer, ids)`: a model that writes these tokens, all different, one after the other."""

    def make(tokenizer: Tokenizer, ids: Sequence[int]) -> LanguageModel:
        assert len(set(ids)) == len(ids)
        logits = torch.full((tokenizer.vocab_size, tokenizer.vocab_size), -50.0)
        for token, following in zip(ids, [*ids[1:], ids[0]], strict=True):
            logits[token, following] = 50.0
        return chain(logits, tokenizer)

    return make
