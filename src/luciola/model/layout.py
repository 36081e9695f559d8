"""Where each of N tokens stands in the rows that attention works on.

Everything but attention treats tokens one by one, so padding and repetition need not exist outside it: tokens live in
one flat list, and only queries, keys and values are spread over rows. A token may stand in several rows: sixteen
completions of one prompt are sixteen rows that begin with the same tokens, whose projections, norms and experts are
then computed once, and whose gradients are the sum over the rows.

Shapes: N tokens, B rows, T slots of a row (the longest), M occupied slots of all rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class Layout:
    """Rows of tokens given by their numbers in the flat list, each row in order; every token stands in at least one.

    A token's position is its column, the same in each row it stands in. Slots beyond a row's end repeat token 0; they
    come after all real slots, so causal attention keeps them from influencing anything.
    """

    def __init__(self, rows: Sequence[Tensor]) -> None:
        lengths = torch.tensor([len(row) for row in rows])
        self.shape = (len(rows), int(lengths.max()))
        occupied_M = (torch.arange(self.shape[1]) < lengths[:, None]).flatten().nonzero().squeeze(1)
        self.tokens_M = torch.cat(list(rows))
        self.N = int(self.tokens_M.max()) + 1
        self.slots_S = torch.zeros(self.shape[0] * self.shape[1], dtype=torch.long)
        self.slots_S[occupied_M] = self.tokens_M
        # Slots sorted by token: a token's slots are neighbours, the first of them is its home.
        self.sorted_M = occupied_M[self.tokens_M.argsort(stable=True)]
        counts_N = self.tokens_M.bincount(minlength=self.N)
        self.starts_N = counts_N.cumsum(0) - counts_N
        self.home_N = self.sorted_M[self.starts_N]
        self.positions_1N = (self.home_N % self.shape[1]).unsqueeze(0)

    def spread(self, x_1N: Tensor) -> Tensor:
        """(1, N, ...) to (B, T, ...): each slot gets its token's value."""
        x_SF = _Spread.apply(x_1N.flatten(2).squeeze(0), self)
        return x_SF.view(*self.shape, *x_1N.shape[2:])  # type: ignore[no-any-return]

    def collect(self, y_BT: Tensor) -> Tensor:
        """(B, T, ...) to (1, N, ...): each token gets the value of one of its slots, which must all hold the same."""
        y_NF = _Collect.apply(y_BT.flatten(2).flatten(0, 1), self)
        return y_NF.view(1, self.N, *y_BT.shape[2:])  # type: ignore[no-any-return]


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_NF, layout):  # type: ignore[no-untyped-def]
        ctx.layout = layout
        return x_NF.index_select(0, layout.slots_S)

    @staticmethod
    def backward(ctx, g_SF):  # type: ignore[no-untyped-def]
        layout = ctx.layout
        if len(layout.sorted_M) == layout.N:
            return g_SF.index_select(0, layout.home_N), None
        return F.embedding_bag(layout.sorted_M, g_SF, layout.starts_N, mode="sum"), None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_SF, layout):  # type: ignore[no-untyped-def]
        ctx.layout = layout
        return y_SF.index_select(0, layout.home_N)

    @staticmethod
    def backward(ctx, g_NF):  # type: ignore[no-untyped-def]
        layout = ctx.layout
        return g_NF.new_zeros(len(layout.slots_S), g_NF.shape[1]).index_copy_(0, layout.home_N, g_NF), None
