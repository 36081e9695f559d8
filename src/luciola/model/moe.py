"""DeepSeekMoE: shared experts for everyone, routed experts for some (DeepSeekMoE paper, section 3; V3 report, section
2.1.2).

    h' = FFN_shared(u) + sum over chosen i of w_i FFN_i(u)

    V2: s = softmax(W_g u),  chosen by s,      w = routed_scaling_factor * s           (not renormalised)
    V3: s = sigmoid(W_g u),  chosen by s + b,  w = routed_scaling_factor * s / sum s   (b steers the choice, never the
    weight)

Where n_group > 1 the choice is limited to the best `topk_group` groups of consecutive experts (a group is a device or
node).

Shapes: B batch, T time, N = B*T tokens, D hidden, E routed experts, K chosen a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luciola.model.config import ModelConfig
from luciola.model.experts import Experts
from luciola.model.mlp import SwiGLU


class Routing(NamedTuple):
    """What one MoE layer decided: the experts of each token, int64, and every expert's affinity, float32."""

    indices_BTK: Tensor
    scores_BTE: Tensor


class Gate(nn.Module):
    """Chooses K of E experts for each token and weighs them; always computed in float32."""

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.n_routed_experts is not None and config.num_experts_per_tok is not None
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        if config.topk_method == "noaux_tc":
            # Not a parameter: no gradient reaches it. Training moves it by `balance.update_bias`.
            self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Casting the model leaves the bias in float32: its steps of 0.001 vanish in bfloat16."""
        bias = getattr(self, "e_score_correction_bias", None)
        super()._apply(fn, recurse)
        if bias is not None:
            self.e_score_correction_bias = fn(bias).to(torch.float32) if bias.is_meta else bias.to(self.weight.device)
        return self

    def scores(self, x_ND: Tensor) -> Tensor:
        """Affinity of every token to every expert, (N, E) float32."""
        logits_NE = F.linear(x_ND.float(), self.weight.float())
        return logits_NE.sigmoid() if self.config.scoring_func == "sigmoid" else logits_NE.softmax(-1)

    @torch.no_grad()
    def choose(self, scores_NE: Tensor) -> Tensor:
        """The experts of each token, (N, K) int64, in no particular order."""
        config = self.config
        choice_NE = scores_NE
        if config.topk_method == "noaux_tc":
            choice_NE = scores_NE + self.e_score_correction_bias
        if config.n_group > 1 and config.topk_method != "greedy":
            choice_NGe = choice_NE.unflatten(-1, (config.n_group, -1))
            best = min(2, choice_NGe.shape[-1]) if config.topk_method == "noaux_tc" else 1
            group_NG = choice_NGe.topk(best, dim=-1).values.sum(-1)
            kept_NG = torch.zeros_like(group_NG, dtype=torch.bool)
            kept_NG.scatter_(-1, group_NG.topk(config.topk_group, dim=-1, sorted=False).indices, True)
            choice_NE = choice_NGe.masked_fill(~kept_NG.unsqueeze(-1), -torch.inf).flatten(1)
        assert config.num_experts_per_tok is not None
        return choice_NE.topk(config.num_experts_per_tok, dim=-1, sorted=False).indices

    def weigh(self, scores_NE: Tensor, indices_NK: Tensor) -> Tensor:
        """Weights of the chosen experts, (N, K) float32: from the affinities, without the bias."""
        weights_NK, config = scores_NE.gather(-1, indices_NK), self.config
        softmax = config.scoring_func == "softmax"
        if config.norm_topk_prob and not (softmax and config.num_experts_per_tok == 1):
            weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + 1e-20)
            if softmax:
                return weights_NK  # V2's code either normalises or scales
        return weights_NK * config.routed_scaling_factor


class MoE(nn.Module):
    """Gate, routed experts, and the shared experts as one SwiGLU of n_shared_experts times the inner width."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.n_routed_experts is not None and config.moe_intermediate_size is not None
        self.gate = Gate(config)
        self.experts = Experts(config.n_routed_experts, config.hidden_size, config.moe_intermediate_size)
        if config.n_shared_experts:
            self.shared_experts = SwiGLU(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)

    def forward(self, x_BTD: Tensor, routes_BTK: Tensor | None = None) -> tuple[Tensor, Routing]:
        """Returns the layer's output and its routing.

        `routes_BTK` replays a choice made before (in a rollout): the weights still come from the live affinities, so
        gradients reach the gate, but no token can change its experts between sampling and update.
        """
        B, T, _ = x_BTD.shape
        x_ND = x_BTD.flatten(0, 1)
        scores_NE = self.gate.scores(x_ND)
        indices_NK = self.gate.choose(scores_NE) if routes_BTK is None else routes_BTK.flatten(0, 1).long()
        y_ND = self.experts(x_ND, self.gate.weigh(scores_NE, indices_NK), indices_NK)
        if hasattr(self, "shared_experts"):
            y_ND = y_ND + self.shared_experts(x_ND)
        return y_ND.view_as(x_BTD), Routing(indices_NK.view(B, T, -1), scores_NE.view(B, T, -1))
