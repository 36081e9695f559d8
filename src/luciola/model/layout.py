"""Where each of N tokens stands in the rows that attention works on.

Everything but attention treats tokens one by one, so padding and repetition need not exist outside it: tokens live in
one flat list, and only queries, keys and values are spread over rows. A token may stand in several rows: sixteen
completions of one prompt are sixteen rows that begin with the same tokens, whose projections, norms and experts are
then computed once, and whose gradients are the sum over the rows.

Shapes: N tokens, B rows, T slots of a row (the longest), S = B T slots, M occupied ones, H heads, D features of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


class Layout:
    """Rows of tokens given by their numbers in the flat list, each row in order; every token stands in at least one.

    What a row has in common with others is a beginning, and the row before has it too. A token's position is its
    column, the same in each row it stands in. Slots beyond a row's end repeat token 0; they come after all real slots,
    so causal attention keeps them from influencing anything.

    Raises:
        ValueError: a token stands in two rows that do not share all up to it and follow each other.
    """

    def __init__(self, rows: Sequence[Tensor]) -> None:
        lengths_B = torch.tensor([len(row) for row in rows])
        self.shape = (len(rows), int(lengths_B.max()))
        self.tokens_M = torch.cat(list(rows))
        self.N = int(self.tokens_M.max()) + 1
        self.starts_B = F.pad(lengths_B.cumsum(0), (1, 0))  # of each row among the M slots, and the end of the last
        occupied_BT = torch.arange(self.shape[1]) < lengths_B[:, None]
        tokens_BT = torch.full(self.shape, -1).masked_scatter_(occupied_BT, self.tokens_M)
        same_BT = (tokens_BT[1:] == tokens_BT[:-1]) & occupied_BT[1:]
        self.shared_B = F.pad(same_BT.long().cumprod(1).sum(1), (1, 0))  # tokens that the row before begins with, too
        self.families = int((self.shared_B == 0).sum())  # of rows with a common beginning
        own_BT = occupied_BT & (torch.arange(self.shape[1]) >= self.shared_B[:, None])
        slots_BT = torch.arange(tokens_BT.numel()).view(self.shape)
        if int(own_BT.sum()) != self.N or len(tokens_BT[own_BT].unique()) != self.N:
            raise ValueError("rows that share tokens must follow each other, and share all up to the last of these")
        self.home_N = torch.empty(self.N, dtype=torch.long)  # a token's first slot
        self.home_N[tokens_BT[own_BT]] = slots_BT[own_BT]
        self.positions_1N = (self.home_N % self.shape[1]).unsqueeze(0)
        self._tokens_BT = tokens_BT

    @cached_property
    def slots_S(self) -> Tensor:
        """The token of each slot, of those beyond a row's end token 0."""
        return self._tokens_BT.flatten().clamp_min(0)

    @cached_property
    def by_token(self) -> tuple[Tensor, Tensor]:
        """Occupied slots sorted by token, (M,), and where each token's begin among them, (N,)."""
        occupied_M = (self._tokens_BT.flatten() >= 0).nonzero().squeeze(1)
        counts_N = self.tokens_M.bincount(minlength=self.N)
        return occupied_M[self.tokens_M.argsort(stable=True)], counts_N.cumsum(0) - counts_N

    def spread(self, x_1HND: Tensor) -> Tensor:
        """(1, H, N, D) to (B, H, T, D): each slot gets its token's value."""
        return _Spread.apply(x_1HND, self)  # type: ignore[no-any-return]

    def collect(self, y_BHTD: Tensor) -> Tensor:
        """(B, H, T, D) to (1, N, H, D): each token gets the value of one of its slots, which must all hold the same."""
        return _Collect.apply(y_BHTD, self)  # type: ignore[no-any-return]

    def _of_heads(self, slots: Tensor, heads: int) -> Tensor:
        """Numbers of `slots` (b, t) among the rows of (B, H, T, D), (slots, H)."""
        T = self.shape[1]
        return ((slots // T * heads)[:, None] + torch.arange(heads)) * T + (slots % T)[:, None]


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_1HND, layout):  # type: ignore[no-untyped-def]
        ctx.layout = layout
        _, H, N, D = x_1HND.shape
        B, T = layout.shape
        index_BHT = torch.arange(H)[:, None] * N + layout.slots_S.view(B, 1, T)
        return x_1HND.reshape(H * N, D).index_select(0, index_BHT.flatten()).view(B, H, T, D)

    @staticmethod
    def backward(ctx, g_BHTD):  # type: ignore[no-untyped-def]
        layout = ctx.layout
        H, D = g_BHTD.shape[1], g_BHTD.shape[-1]
        g_RD = g_BHTD.reshape(-1, D)
        if len(layout.tokens_M) == layout.N:
            dx_1NHD = g_RD.index_select(0, layout._of_heads(layout.home_N, H).flatten()).view(1, layout.N, H, D)
            return dx_1NHD.transpose(1, 2), None
        sorted_M, starts_N = layout.by_token
        index_HM = layout._of_heads(sorted_M, H).T
        starts_HN = torch.arange(H)[:, None] * index_HM.shape[1] + starts_N
        dx_RD = F.embedding_bag(index_HM.flatten(), g_RD, starts_HN.flatten(), mode="sum")
        return dx_RD.view(1, H, layout.N, D), None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_BHTD, layout):  # type: ignore[no-untyped-def]
        ctx.layout, ctx.shape = layout, y_BHTD.shape
        H, D = y_BHTD.shape[1], y_BHTD.shape[-1]
        ctx.index = layout._of_heads(layout.home_N, H).flatten()
        return y_BHTD.reshape(-1, D).index_select(0, ctx.index).view(1, layout.N, H, D)

    @staticmethod
    def backward(ctx, g_1NHD):  # type: ignore[no-untyped-def]
        B, H, T, D = ctx.shape
        dy_RD = g_1NHD.new_zeros(B * H * T, D).index_copy_(0, ctx.index, g_1NHD.reshape(-1, D))
        return dy_RD.view(ctx.shape), None
