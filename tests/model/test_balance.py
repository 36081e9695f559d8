"""Balance losses by hand, and the bias that balances without one (DeepSeekMoE, V2 and V3 reports)."""

import pytest
import torch
from torch import Tensor

from luciola.model import balance
from luciola.model.config import ModelConfig
from luciola.model.moe import MoE, Routing


def routing(chosen: list[list[list[int]]], scores: Tensor) -> Routing:
    return Routing(torch.tensor(chosen), scores)


def even() -> Routing:
    """Two sequences of four tokens, each of four experts chosen twice, all scores alike."""
    one = [[0, 1], [2, 3], [0, 1], [2, 3]]
    return routing([one, one], torch.full((2, 4, 4), 0.25))


# One sequence of four tokens, top-2 of four experts; experts 0 and 1 are device 0, experts 2 and 3 are device 1.
CHOSEN = [[[0, 1], [0, 1], [0, 2], [0, 1]]]  # counts 4, 3, 1, 0
SCORES = torch.tensor([[[0.4, 0.3, 0.2, 0.1]] * 4])  # P = 0.4, 0.3, 0.2, 0.1
# f = E/(K T) * counts = 4/8 * (4, 3, 1, 0) = 2, 1.5, 0.5, 0


def test_even_load_costs_one_a_layer() -> None:
    assert float(balance.expert_loss([even()])) == pytest.approx(1.0)
    assert float(balance.expert_loss([even(), even(), even()])) == pytest.approx(3.0)
    assert float(balance.device_loss([even()], groups=2)) == pytest.approx(1.0)
    # every token goes to one of two devices: D/(M T) * T/2 = 1 where M = 1
    assert float(balance.communication_loss([even()], groups=2, limit=1)) == pytest.approx(1.0)


def test_expert_loss_by_hand() -> None:
    assert float(balance.expert_loss([routing(CHOSEN, SCORES)])) == pytest.approx(2 * 0.4 + 1.5 * 0.3 + 0.5 * 0.2)


def test_device_loss_by_hand() -> None:
    """f'_d = mean f in d = 1.75, 0.25; P'_d = sum P in d = 0.7, 0.3."""
    assert float(balance.device_loss([routing(CHOSEN, SCORES)], groups=2)) == pytest.approx(1.75 * 0.7 + 0.25 * 0.3)


def test_communication_loss_by_hand() -> None:
    """Tokens sent: 4 to device 0, 1 to device 1; f''_d = D/(M T) * sent = 2/(2*4) * (4, 1) = 1, 0.25."""
    loss = balance.communication_loss([routing(CHOSEN, SCORES)], groups=2, limit=2)
    assert float(loss) == pytest.approx(1.0 * 0.7 + 0.25 * 0.3)


def test_sigmoid_scores_are_shares_first() -> None:
    """V3: s' = s / sum s, so that the loss does not reward small scores."""
    r = routing(CHOSEN, SCORES)
    assert float(balance.expert_loss([routing(CHOSEN, SCORES * 3)])) == pytest.approx(float(balance.expert_loss([r])))


def test_each_sequence_is_balanced_by_itself() -> None:
    """Two lopsided sequences that even out over the batch still cost more than 1."""
    scores = torch.tensor([[[0.9, 0.1]] * 4, [[0.1, 0.9]] * 4])
    batch = routing([[[0]] * 4, [[1]] * 4], scores)
    assert float(balance.expert_loss([batch])) == pytest.approx(2 * 0.9)


def test_gradient_flows_through_the_mean_score_alone() -> None:
    """d loss / d s_it = f_i / T for normalised scores: counts are constants."""
    logits = SCORES.log().requires_grad_()
    (ours,) = torch.autograd.grad(balance.expert_loss([routing(CHOSEN, logits.softmax(-1))]), logits)
    f = torch.tensor([2.0, 1.5, 0.5, 0.0])
    (expected,) = torch.autograd.grad((f * logits.softmax(-1).mean(1)).sum(), logits)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("loss", ["expert", "device", "communication"])
def test_padding_does_not_vote(loss: str) -> None:
    def value(r: Routing, mask: Tensor | None = None) -> float:
        if loss == "expert":
            return float(balance.expert_loss([r], mask))
        if loss == "device":
            return float(balance.device_loss([r], 2, mask))
        return float(balance.communication_loss([r], 2, 2, mask))

    padded = routing([[*CHOSEN[0], [3, 2], [3, 2]]], torch.cat((SCORES, SCORES[:, :2].flip(-1)), dim=1))
    mask = torch.tensor([[True] * 4 + [False] * 2])
    assert value(padded, mask) == pytest.approx(value(routing(CHOSEN, SCORES)))
    assert balance.load(padded, mask).tolist() == [4, 3, 1, 0]


def test_load_and_violation() -> None:
    load = balance.load(routing(CHOSEN, SCORES))
    assert load.tolist() == [4, 3, 1, 0]
    assert balance.max_violation(load) == pytest.approx((4 - 2) / 2)
    assert balance.max_violation(torch.zeros(4)) == 0.0
    assert balance.max_violation(torch.ones(4)) == 0.0


def layer(experts: int = 16) -> MoE:
    sizes = {
        "vocab_size": 8,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    sizes |= {"kv_lora_rank": 4, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 4}
    sizes |= {"n_routed_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": 2}
    moe = MoE(ModelConfig.model_validate(sizes))
    torch.nn.init.normal_(moe.gate.weight, generator=torch.Generator().manual_seed(0))
    return moe


def test_the_bias_goes_down_for_busy_experts_and_up_for_idle_ones() -> None:
    moe = layer(4)
    balance.update_bias(moe, torch.tensor([4.0, 3.0, 1.0, 0.0]), speed=0.001)
    assert moe.gate.e_score_correction_bias.tolist() == pytest.approx([-0.001, -0.001, 0.001, 0.001])
    balance.update_bias(moe, torch.tensor([2.0, 2.0, 2.0, 2.0]), speed=0.001)
    assert moe.gate.e_score_correction_bias.tolist() == pytest.approx([-0.001, -0.001, 0.001, 0.001])


def test_the_bias_evens_out_a_skewed_gate() -> None:
    """The toy run of the spec: 16 experts, top-2, 1024 tokens a step, speed 0.01, a mean that favours some experts."""
    moe, generator = layer(), torch.Generator().manual_seed(1)
    drift = torch.randn(8, generator=generator)
    violations = []
    for _ in range(200):
        x = torch.randn(1024, 8, generator=generator) + 0.3 * drift
        scores = moe.gate.scores(x)
        load = balance.load(Routing(moe.gate.choose(scores)[None], scores[None]))
        violations.append(balance.max_violation(load))
        balance.update_bias(moe, load, speed=0.01)
    assert violations[0] > 0.5
    assert sum(violations[-20:]) / 20 < 0.3
