"""Which experts the tokens that an engine computes are given to.

Shapes: N tokens, K experts a token, L MoE layers, E routed experts.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from luciola.model.moe import MoE, Routing
from luciola.model.transformer import Transformer

WAITING = 4096  # tokens whose experts are counted together: counting those of one token costs as much


class ExpertLoad:
    """Counts tokens by expert; one thread adds, any thread may ask.

    Attributes:
        layers: those with experts, by their number in the model.
    """

    def __init__(self, model: Transformer) -> None:
        self.layers = [i for i, block in enumerate(model.layers) if isinstance(block.mlp, MoE)]
        self._experts = model.config.n_routed_experts or 0
        self._counts_X = torch.zeros(len(self.layers) * self._experts, dtype=torch.int64)
        self._first_L11 = (torch.arange(len(self.layers)) * self._experts).view(-1, 1, 1)
        self._waiting: list[Tensor] = []
        self._tokens = 0
        self._lock = threading.Lock()

    def add(self, routings: Sequence[Routing], mask_BT: Tensor | None = None) -> None:
        """Count a pass of the model: of a flat one all tokens, of one over rows those of the mask."""
        if not routings:
            return
        chosen_LNK = torch.stack([routing.indices_BTK for routing in routings])  # a copy: the next step overwrites them
        if mask_BT is not None:
            chosen_LNK = chosen_LNK[:, mask_BT]
        with self._lock:
            self._waiting.append(chosen_LNK)
            self._tokens += chosen_LNK.shape[1]
            if self._tokens >= WAITING:
                self._count()

    def counts(self) -> Tensor:
        """Tokens given to each expert so far, (L, E) int64."""
        with self._lock:
            self._count()
            return self._counts_X.view(len(self.layers), self._experts).clone()

    def _count(self) -> None:
        if self._waiting:
            chosen_X = (torch.cat(self._waiting, dim=1).cpu() + self._first_L11).flatten()
            self._counts_X += torch.bincount(chosen_X, minlength=len(self._counts_X))
            self._waiting, self._tokens = [], 0
