"""Models for the engine: a random one with experts, and chains whose every distribution is known in advance."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from luciola.model.language_model import LanguageModel
from luciola.text.tokenizer import Tokenizer

TINY: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "kv_lora_rank": 8,
    "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5, "n_routed_experts": 6, "num_experts_per_tok": 2,
    "moe_intermediate_size": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "initializer_range": 0.3,
    "max_position_embeddings": 96,
}  # fmt: skip


@pytest.fixture(scope="session")
def lm() -> LanguageModel:
    """Random weights, so large that likely tokens are clearly ahead; ends a text now and then."""
    tokenizer = Tokenizer.characters("abcdefghijklmnop ")
    return LanguageModel.create(TINY | {"vocab_size": tokenizer.vocab_size}, tokenizer)


@pytest.fixture(scope="session")
def chain() -> Callable[..., LanguageModel]:
    """`chain(logits_VV, tokenizer)`: a model whose next token depends on the last one alone, with these logits.

    Attention and feed-forward write nothing; the embedding is the unit matrix, the head the table.
    """

    def make(logits_VV: Tensor, tokenizer: Tokenizer | None = None, **config: Any) -> LanguageModel:
        V = len(logits_VV)
        shape = TINY | {"vocab_size": V, "hidden_size": V, "num_hidden_layers": 1} | config
        made = LanguageModel.create(shape, tokenizer)
        with torch.no_grad():
            for name, p in made.model.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
                    p.zero_()
            made.model.embed_tokens.weight.copy_(torch.eye(V))
            made.model.lm_head.weight.copy_(logits_VV.T / made.model.norm(torch.eye(V))[0, 0])
        return made

    return make


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
