"""What all layers share in a step, made once for each number of tokens and written anew for every step after."""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import NamedTuple

import numpy as np
import torch

from luciola.engine.cache import PagedCache
from luciola.model.native.attention import Step
from luciola.model.native.repeat import MOST_BYTES
from luciola.model.transformer import Transformer

MOST = 64  # tokens of a step that is kept

_Numbers = np.ndarray[tuple[int], np.dtype[np.int32]]


class _Kept(NamedTuple):
    """A step, and arrays over the memory of its tensors."""

    step: Step
    rows_N: _Numbers
    positions_N: _Numbers
    tokens_N: np.ndarray[tuple[int], np.dtype[np.int64]]


class Steps:
    """The steps of one model over one cache; those of a few tokens repeat the native calls of the first such step."""

    def __init__(self, model: Transformer, cache: PagedCache) -> None:
        self._model, self._cache = model, cache
        self._kept: dict[int, _Kept] = {}

    def with_logits(self, N: int) -> bool:
        """Whether the logits of all N tokens are better computed within the step: they are few numbers, so that another
        call from Python would cost more."""
        return 4 * N * self._model.config.vocab_size <= MOST_BYTES // 4

    def step(self, rows: Many[int], positions: Many[int], tokens: Many[int]) -> Step:
        """That in which these tokens, of these rows of the block table, at these positions, are read."""
        device = self._cache.device
        cos, sin = self._model.rope.table(max(positions) + 1, device)
        known = self._kept.get(len(rows))
        if known is not None and known.step.cos is cos:
            known.rows_N[:], known.positions_N[:], known.tokens_N[:] = rows, positions, tokens
            return known.step
        on_host = (
            np.array(rows, dtype=np.int32),
            np.array(positions, dtype=np.int32),
            np.array(tokens, dtype=np.int64),
        )
        rows_N, positions_N, tokens_N = (torch.from_numpy(x).to(device) for x in on_host)
        keep = len(rows) <= MOST and device.type == "cpu"
        table_RM, block_size = self._cache.table_RM, self._cache.block_size
        step = Step(rows_N, positions_N, table_RM, block_size, cos, sin, {} if keep else None, tokens_N)
        if keep:
            self._kept[len(rows)] = _Kept(step, *on_host)
        return step
