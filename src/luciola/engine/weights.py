"""The weights an engine computes with: those of the model it was given, or a copy in another form that follows them."""

from __future__ import annotations

import copy
import itertools

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from luciola.model.quant_layers import Report, quantize_model
from luciola.model.transformer import Transformer


class Weights:
    """`source` itself, or a copy of it in `dtype`, or one whose matrices have `bits` in groups of `group_size`.

    Attributes:
        model: ready for `decode`.
        report: what quantisation has chosen, if there was any.
    """

    def __init__(self, source: Transformer, dtype: torch.dtype, bits: int | None, group_size: int) -> None:
        self._source, self._dtype, self._bits, self._group_size = source, dtype, bits, group_size
        self._make()

    def follow(self) -> bool:
        """Take note of what training, or anybody, has done to the source; returns whether that was anything."""
        if self._stamp == _stamp(self._source):
            return False
        self._make()
        return True

    def _make(self) -> None:
        self.model: Transformer = self._source
        self.report: Report | None = None
        if self._bits is not None:
            self.model, self.report = quantize_model(self._source, self._bits, self._group_size)
        elif self._dtype != next(self._source.parameters()).dtype:
            self.model = copy.deepcopy(self._source).to(self._dtype)
        self.model.prepare()
        self._stamp = _stamp(self._source)  # last, for preparing may have moved them


_optimizer_steps = itertools.count(1)
_last_optimizer_step = 0


def _count_optimizer_step(*_: object) -> None:
    global _last_optimizer_step
    _last_optimizer_step = next(_optimizer_steps)


# Fused optimizers change weights without raising their version.
register_optimizer_step_post_hook(_count_optimizer_step)


def _stamp(model: torch.nn.Module) -> list[tuple[int, int]]:
    """Changes whenever weights may have changed: by an optimizer's step, any operation in place, or a move."""
    return [
        (0, _last_optimizer_step),
        *((x.data_ptr(), 0 if x.is_inference() else x._version) for x in (*model.parameters(), *model.buffers())),
    ]
