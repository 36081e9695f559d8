"""Multi-token prediction (V3 report, section 2.2): which state meets which token, and what it is asked for.

One row of six tokens t0..t5, of which the model reads t0..t4:

    depth 0   state of   t0 t1 t2 t3      depth 1   state of   t0 t1 t2
              joined to  t1 t2 t3 t4                joined to  t2 t3 t4
              predicts   t2 t3 t4 t5                predicts   t3 t4 t5
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from luciola.data.packing import Batch
from luciola.model.config import ModelConfig
from luciola.model.transformer import Transformer
from luciola.train.loop import forward

CONFIG: dict[str, Any] = {
    "vocab_size": 23, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 8, "num_nextn_predict_layers": 2, "initializer_range": 0.3,
}  # fmt: skip
ROUNDING = 1e-5  # an expert's product over other rows rounds differently


@pytest.fixture
def model() -> Transformer:
    model = Transformer(ModelConfig.model_validate(CONFIG))
    model.initialize(0)
    return model


def row(length: int) -> Tensor:
    return torch.randint(0, 23, (1, length), generator=torch.Generator().manual_seed(1))


def logits(model: Transformer, tokens: Tensor, segments: Tensor | None = None) -> list[Tensor]:
    """Logits of both depths."""
    states, found = model.hidden(tokens, segments_BT=segments).states, []
    for depth, module in enumerate(model.mtp):
        states = model.mtp_hidden(states, tokens, depth, segments).states
        found.append(model.lm_head(module.norm(states)))
    return found


@torch.no_grad()
def test_each_depth_reads_one_token_further(model: Transformer) -> None:
    tokens = row(5)
    before = logits(model, tokens)
    assert [x.shape[1] for x in before] == [4, 3]
    for t in range(5):
        changed = tokens.clone()
        changed[0, t] = (changed[0, t] + 1) % 23
        for depth, (a, b) in enumerate(zip(before, logits(model, changed), strict=True)):
            influenced = ((a - b).abs().amax(-1)[0] > ROUNDING).tolist()
            first = max(0, t - depth - 1)  # column i has read tokens up to i + depth + 1
            assert influenced == [i >= first for i in range(4 - depth)], (t, depth)


@torch.no_grad()
def test_joined_are_the_embedding_first_and_the_state_second(model: Transformer) -> None:
    """The order of the released weights; the embedding half alone lets t_{i+1} through."""
    module, tokens = model.mtp[0], row(5)
    states = model.hidden(tokens).states
    module.eh_proj.weight[:, 16:] = 0.0
    assert torch.equal(
        model.mtp_hidden(states, tokens, 0).states, model.mtp_hidden(torch.randn_like(states), tokens, 0).states
    )


def reference_losses(model: Transformer, tokens: Tensor) -> list[Tensor]:
    """Sum of -log p of t_{i + depth + 2} at column i."""
    found = []
    for depth, x in enumerate(logits(model, tokens[:, :-1])):
        logp = x.log_softmax(-1).gather(-1, tokens[:, depth + 2 :, None])
        found.append(-logp.sum())
    return found


@torch.no_grad()
def test_losses_ask_for_the_tokens_of_the_table(model: Transformer) -> None:
    """Divided by the number of trained tokens of the step, as the main loss is."""
    tokens = row(6)
    trained = torch.ones(1, 6, dtype=torch.bool)
    trained[0, 0] = False
    passed = forward(model, Batch(tokens, trained, None), targets=5, mtp=True)
    for ours, expected in zip(passed.mtp_losses, reference_losses(model, tokens), strict=True):
        torch.testing.assert_close(ours, expected / 5)
    assert len(passed.routings) == 3  # one main layer, two modules


@torch.no_grad()
def test_packed_documents_are_not_asked_across_their_border(model: Transformer) -> None:
    documents = [row(6), row(4).flip(1), row(2)]
    tokens = torch.cat(documents, dim=1)
    segments = torch.cat([torch.full((1, d.shape[1]), i) for i, d in enumerate(documents)], dim=1)
    trained = torch.ones_like(tokens, dtype=torch.bool)
    for start in (0, 6, 10):
        trained[0, start] = False
    passed = forward(model, Batch(tokens, trained, segments), targets=1, mtp=True)
    for depth in range(2):
        alone = sum(reference_losses(model, d)[depth] for d in documents if d.shape[1] > depth + 2)
        torch.testing.assert_close(passed.mtp_losses[depth], alone, atol=1e-4, rtol=1e-5)


def test_without_weight_the_main_model_learns_as_if_there_were_no_modules(model: Transformer) -> None:
    tokens = row(8)
    batch = Batch(tokens, torch.ones_like(tokens, dtype=torch.bool), None)
    forward(model, batch, targets=7, mtp=False).loss.backward()
    assert all(p.grad is None for p in model.mtp.parameters())
    plain = Transformer(ModelConfig.model_validate(CONFIG | {"num_nextn_predict_layers": 0}))
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("mtp.")})
    forward(plain, batch, targets=7, mtp=True).loss.backward()
    for name, p in plain.named_parameters():
        assert torch.equal(p.grad, model.get_parameter(name).grad), name
