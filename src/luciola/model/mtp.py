"""Multi-token prediction (V3 report, section 2.2, equations 21 to 25).

    h'_i = M [RMSNorm(Emb(t_{i+k})) ; RMSNorm(h_i)],   h^k = Block(h'),   P(t_{i+k+1}) = Head(RMSNorm(h^k_i))

Embedding and head are the main model's own. The order embedding first and the norm before the shared head are those of
the released weights (the report prints the pair the other way round and no norm). h^0 is the main model's state after
its final norm, as the release's inference code feeds it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from luciola.model.attention import Context, Extend
from luciola.model.config import ModelConfig
from luciola.model.joined import weight_of
from luciola.model.moe import Routing
from luciola.model.native.attention import Step
from luciola.model.native.linear import Product
from luciola.model.norm import RMSNorm


class MTPStates(NamedTuple):
    """`states` go through `MTPModule.norm` to the head; as they are, to the next depth."""

    states: Tensor
    routing: Routing | None


class MTPModule(nn.Module):
    """One depth of multi-token prediction around a block of its own."""

    def __init__(self, config: ModelConfig, block: nn.Module) -> None:
        super().__init__()
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.block = block
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, states_BTD: Tensor, embedded_BTD: Tensor, context: Context, extend: Extend | None = None
    ) -> MTPStates:
        """Join the previous depth's states with the embeddings of the tokens that came after them."""
        joined = torch.cat((self.enorm(embedded_BTD), self.hnorm(states_BTD)), dim=-1)
        return MTPStates(*self.block(self.eh_proj(joined), context, extend))

    def prepare(self, head: nn.Module) -> None:
        """Make ready for `decode`; the head is the main model's."""
        W_token, W_state = self.eh_proj.weight.chunk(2, dim=1)
        self.from_token, self.from_state = Product(W_token, norm=self.enorm), Product(W_state, norm=self.hnorm)
        self.head = Product(weight_of(head), norm=self.norm)

    def decode(self, states_ND: Tensor, embedded_ND: Tensor, step: Step, pool_PC: Tensor) -> Tensor:
        """The same for N new tokens of any sequences against a cache of its own; returns the states (N, D)."""
        joined_ND = self.from_state(states_ND, self.from_token(embedded_ND))
        states_ND, _ = self.block.decode(joined_ND, step, pool_PC)  # type: ignore[operator]
        return states_ND
