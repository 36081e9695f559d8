"""The key-value cache of a batch of rows: one tensor a layer, (rows, columns, C), allocated once.

C is all a token keeps in a layer: kv_lora_rank + qk_rope_head_dim numbers with MLA, keys and values with GQA. Rows are
aligned at the right, so that every row's newest token is in the same column and one slice serves the whole batch;
columns left of a row's first token are masked.

Shapes: B rows, S columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from luciola.model.config import ModelConfig


class Cache:
    """Room for `rows` rows of `columns` tokens; `length` columns are in use."""

    def __init__(self, config: ModelConfig, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (rows, columns, config.cached_per_token_and_layer)
        self.layers = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.mask = torch.zeros(rows, columns, dtype=dtype, device=device)
        self.masked = False
        self.length = 0

    def fill(self, prompts: Sequence[Tensor], lengths: Sequence[int], copies: Sequence[int]) -> None:
        """Copy prefilled prompts in: `prompts` is one (P, T, C) tensor a layer, prompt p goes to `copies[p]` rows."""
        self.length = max(lengths)
        row = 0
        for p, (length, count) in enumerate(zip(lengths, copies, strict=True)):
            rows, pad = slice(row, row + count), self.length - length
            for layer, prompt in zip(self.layers, prompts, strict=True):
                layer[rows, :pad] = 0.0  # masked, yet 0 * garbage could be NaN
                layer[rows, pad : self.length] = prompt[p, :length]
            self.mask[rows, :pad] = -torch.inf
            self.masked |= pad > 0
            row += count

    def grow(self) -> None:
        """Open the next column."""
        self.length += 1

    def views(self) -> list[Tensor]:
        """The columns in use of every layer."""
        return [layer[:, : self.length] for layer in self.layers]

    def mask_BS(self) -> Tensor | None:
        """0 where a row may look and -inf where it may not; None when every row sees every column."""
        return self.mask[:, : self.length] if self.masked else None

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but `rows`."""
        used = self.length
        for i, layer in enumerate(self.layers):
            smaller = layer.new_empty(len(rows), *layer.shape[1:])
            torch.index_select(layer[:, :used], 0, rows, out=smaller[:, :used])
            self.layers[i] = smaller
        self.mask = self.mask.index_select(0, rows)
