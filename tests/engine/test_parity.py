"""Parity mode: what the engine draws from are the model's logits bit for bit, whatever else it does at the time."""

from typing import Any

import pytest
import torch

from luciola.engine.engine import Engine
from luciola.engine.params import SamplingParams
from luciola.engine.sampler import Settings, UniformStream, sample
from luciola.model.language_model import LanguageModel
from luciola.model.native import build

pytestmark = pytest.mark.skipif(bool(build.reason()), reason=f"no native kernels: {build.reason()}")

DEEPSEEK: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 4,
    "q_lora_rank": 24, "kv_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 11,
    "n_routed_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "initializer_range": 0.2, "max_position_embeddings": 300,
}  # fmt: skip
QWEN: dict[str, Any] = {
    "model_type": "qwen3", "vocab_size": 61, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10, "initializer_range": 0.2,
    "max_position_embeddings": 300,
}  # fmt: skip


@pytest.fixture(scope="module", params=[DEEPSEEK, QWEN], ids=["mla+moe", "gqa"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return LanguageModel.create(request.param, seed=3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunk": 7, "block_size": 5},
        {"max_cached_tokens": 320, "block_size": 16},
        {"max_running": 3},
        {"prefix_cache": False},
    ],
    ids=str,
)
def test_every_logprob_is_the_full_passs_to_the_last_bit(model: LanguageModel, options: dict[str, Any]) -> None:
    """Also of prompts in pieces, among others, after giving way, from a prefix in the cache; and of 50 rows at once,
    where a matrix library would change its ways."""
    engine = Engine(model, dtype="model", parity=True, **options)
    generator = torch.Generator().manual_seed(0)
    stem = torch.randint(0, 61, (40,), generator=generator).tolist()
    prompts = [[*stem[: 1 + 3 * i], i] for i in range(13)]
    params = [SamplingParams(max_tokens=12, seed=i, n=4, logprobs=True, ignore_eos=True) for i in range(13)]
    for _ in range(2):
        for prompt, p, group in zip(prompts, params, engine.generate(prompts, params), strict=True):
            for j, completion in enumerate(group):
                text = torch.tensor([prompt + completion.token_ids[:-1]])
                logits_TV = model.model.exact_logits(text)[0, len(prompt) - 1 :]
                stream = UniformStream(p.seed, j, prompt)
                numbers = torch.tensor([stream.number(i) for i in range(12)])
                drawn = sample(logits_TV, Settings.of([p] * 12), numbers, logprobs=True)
                assert drawn.tokens.tolist() == completion.token_ids
                assert drawn.logprobs is not None
                assert drawn.logprobs.tolist() == completion.logprobs


def test_a_position_does_not_depend_on_what_follows_or_stands_beside_it(model: LanguageModel) -> None:
    rows = torch.randint(0, 61, (3, 70), generator=torch.Generator().manual_seed(1))
    whole = model.model.exact_logits(rows)
    assert torch.equal(model.model.exact_logits(rows[1:2, :33]), whole[1:2, :33])
    assert torch.equal(model.model.exact_logits(rows[2:, :1]), whole[2:, :1])
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(model.model.exact_logits(rows), whole)
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
@pytest.mark.parametrize(
    ("tokens", "complaint"),
    [
        (torch.tensor([[3, 61]]), "tokens_BT has token 61, outside the vocabulary of 61"),
        (torch.tensor([[3], [-1]]), "tokens_BT has token -1, outside the vocabulary of 61"),
        (torch.tensor([1, 2, 3]), r"tokens_BT=\[3\], torch.int64 must be rows of at least one token id"),
        (torch.zeros(1, 0, dtype=torch.long), r"tokens_BT=\[1, 0\], torch.int64 must be rows"),
        (torch.zeros(0, 4, dtype=torch.long), r"tokens_BT=\[0, 4\], torch.int64 must be rows"),
        (torch.ones(1, 3), r"tokens_BT=\[1, 3\], torch.float32 must be rows"),
        ([[1, 2]], "tokens_BT=<class 'list'> must be rows"),
        (torch.zeros(1, 301, dtype=torch.long), "rows of 301 tokens; the model's context has room for 300"),
    ],
)
def test_tokens_that_have_no_exact_logits_are_named(model: LanguageModel, tokens: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        model.model.exact_logits(tokens)


def test_the_whole_context_has_exact_logits(model: LanguageModel) -> None:
    assert model.model.exact_logits(torch.full((1, 300), 60)).shape == (1, 300, 61)


def test_the_trainers_pass_is_the_same_but_for_rounding(model: LanguageModel) -> None:
    rows = torch.randint(0, 61, (2, 50), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(model.model.exact_logits(rows), model.model(rows), atol=3e-4, rtol=1e-4)
