"""The same engine on a GPU: run with `pytest -m cuda` where there is one."""

from typing import Any

import pytest
import torch

from luciola.engine.engine import Engine
from luciola.engine.params import SamplingParams
from luciola.model.language_model import LanguageModel

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"),
]

DEEPSEEK: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 8,
    "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "initializer_range": 0.15, "max_position_embeddings": 400, "num_nextn_predict_layers": 1,
}  # fmt: skip
LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.15, "max_position_embeddings": 400,
}  # fmt: skip
PROMPTS = [list(range(5, 6 + 7 * i)) for i in range(6)]


@pytest.fixture(params=[DEEPSEEK, LLAMA], ids=["mla", "gqa"])
def pair(request: pytest.FixtureRequest) -> tuple[LanguageModel, LanguageModel]:
    """The same weights on the CPU and on the GPU."""
    cpu, gpu = (LanguageModel.create(request.param, seed=1) for _ in range(2))
    gpu.model.to("cuda")
    return cpu, gpu


def test_greedy_tokens_are_the_cpus(pair: tuple[LanguageModel, LanguageModel]) -> None:
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    on_cpu, on_gpu = (Engine(lm, dtype="float32").generate(PROMPTS, params) for lm in pair)
    assert [c.token_ids for (c,) in on_gpu] == [c.token_ids for (c,) in on_cpu]


def test_samples_do_not_depend_on_company(pair: tuple[LanguageModel, LanguageModel]) -> None:
    engine = Engine(pair[1], dtype="float32", block_size=4, chunk=10)
    params = SamplingParams(max_tokens=20, seed=3, n=3, ignore_eos=True, logprobs=True)
    together = engine.generate(PROMPTS, params)
    alone = [engine.generate([prompt], params)[0] for prompt in PROMPTS]
    assert [[c.token_ids for c in g] for g in alone] == [[c.token_ids for c in g] for g in together]
    assert engine.blocks_used == 0


@pytest.mark.parametrize("speculate", ["ngram", "mtp"])
def test_speculation_changes_no_token(pair: tuple[LanguageModel, LanguageModel], speculate: str) -> None:
    lm = pair[1]
    if speculate == "mtp" and not len(lm.model.mtp):
        pytest.skip("this model has no prediction module")
    params = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
    plain, fast = (Engine(lm, dtype="float32", speculate=s).generate(PROMPTS, params) for s in (None, speculate))
    assert [c.token_ids for (c,) in fast] == [c.token_ids for (c,) in plain]


def test_bfloat16_generates(pair: tuple[LanguageModel, LanguageModel]) -> None:
    out = Engine(pair[1], dtype="bfloat16").generate(PROMPTS, SamplingParams(max_tokens=9, n=2, logprobs=True, seed=0))
    assert all(c.logprobs is not None and max(c.logprobs) <= 0 for group in out for c in group)
