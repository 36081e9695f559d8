"""The tensors of the paged cache: one pool a layer, in which a token's entries lie at the slot that its block gives.

C is all that a token keeps in a layer: kv_lora_rank + qk_rope_head_dim numbers with MLA, keys and values with GQA; one
layout for both. Slot = block * block_size + place in the block. The block table says which blocks a running sequence
has; `decode` reads the pool through it. Whole pieces of prompts write through `PromptCache`.

Shapes: B rows, T new tokens, P past tokens, C numbers a token, R rows of the table, M blocks a row.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence as Many
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from luciola.engine.sequence import Sequence
from luciola.model.config import ModelConfig


class PagedCache:
    """Room for `blocks` blocks of `block_size` tokens in each of `layers` layers, and a table of `rows` rows.

    The pools are zeros that take memory only where something has been written.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: int,
        blocks: int,
        block_size: int,
        rows: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.block_size, self.device = block_size, device
        shape = (blocks * block_size, config.cached_per_token_and_layer)
        self.pools = [_zeros(shape, dtype, device) for _ in range(layers)]
        longest = -(-min(config.max_position_embeddings, blocks * block_size) // block_size) + 1
        self._table = np.zeros((rows, longest), dtype=np.int32)
        self._on_device = torch.from_numpy(self._table) if device.type == "cpu" else None

    @property
    def table_RM(self) -> Tensor:
        """The block table, int32, on the cache's device."""
        return self._on_device if self._on_device is not None else torch.from_numpy(self._table).to(self.device)

    def follow(self, sequence: Sequence) -> None:
        """Write the blocks that the sequence has got since into its row of the table."""
        known, blocks = sequence.tabled, sequence.blocks
        if known < len(blocks):
            self._table[sequence.row, known : len(blocks)] = blocks[known:]
            sequence.tabled = len(blocks)

    def copy(self, pairs: Many[tuple[int, int]]) -> None:
        """Copy whole blocks, (from, to), in every layer."""
        sources, targets = (torch.tensor(side, device=self.device) for side in zip(*pairs, strict=True))
        for pool in self.pools:
            blocks = pool.unflatten(0, (-1, self.block_size))
            blocks.index_copy_(0, targets, blocks.index_select(0, sources))

    def slots(self, sequence: Sequence, start: int, stop: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Slots of the sequence's tokens from `start` to `stop`."""
        positions = np.arange(start, stop)
        blocks = np.asarray(sequence.blocks, dtype=np.int64)[positions // self.block_size]
        return blocks * self.block_size + positions % self.block_size


def _zeros(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros straight from the system, which gives each page when it is first written: an allocator that keeps freed
    memory (`hardware.keep_freed_memory`) would write all of them now."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = shape[0] * shape[1] * dtype.itemsize
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    memory = mmap.mmap(-1, size, **private)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # attention reads all of it, a tenth faster where pages are large
        with contextlib.suppress(OSError):  # a kernel built without
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class Piece(NamedTuple):
    """The next `length` tokens of a sequence's prompt, `start` of which are in the cache already."""

    sequence: Sequence
    start: int
    length: int


class PromptCache:
    """What `Transformer.hidden` writes the entries of a batch of pieces into, layer by layer.

    All pieces begin at the start of their sequence, or there is but one.
    """

    def __init__(self, cache: PagedCache, pieces: Many[Piece], width: int) -> None:
        self._cache = cache
        self.past = pieces[0].start
        assert self.past == 0 or len(pieces) == 1
        slots = [cache.slots(p.sequence, p.start, p.start + p.length) for p in pieces]
        self._slots_N = torch.from_numpy(np.concatenate(slots)).to(cache.device)
        self._tokens_N: Tensor | None = None  # which of the (B, T) tokens are real, where some are padding
        if any(p.length < width for p in pieces):
            real = [np.arange(p.length) + row * width for row, p in enumerate(pieces)]
            self._tokens_N = torch.from_numpy(np.concatenate(real)).to(cache.device)
        if self.past:
            self._past_P = torch.from_numpy(cache.slots(pieces[0].sequence, 0, self.past)).to(cache.device)

    def extend(self, layer: int, entries_BTC: Tensor) -> Tensor:
        """Keep the new tokens' entries of a layer; returns past and new ones, (B, P + T, C)."""
        pool = self._cache.pools[layer]
        entries_NC = entries_BTC.flatten(0, 1).to(pool.dtype)
        if self._tokens_N is not None:
            entries_NC = entries_NC.index_select(0, self._tokens_N)
        pool.index_copy_(0, self._slots_N, entries_NC)
        if not self.past:
            return entries_BTC
        past_1PC = pool.index_select(0, self._past_P).to(entries_BTC.dtype).unsqueeze(0)
        return torch.cat((past_1PC, entries_BTC), dim=1)
