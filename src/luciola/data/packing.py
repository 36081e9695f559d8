"""Rows of a batch from documents. The batch of step s is a pure function of (seed, s).

* pad: one document a row, padded to the longest of the batch.
* stream: documents end to end, cut into rows; tokens see across document borders (as in V3's pre-training).
* segments: several documents a row, each sees itself only and counts positions from 0.

A finite collection is read once an epoch in an order drawn from (seed, epoch).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from luciola.data.documents import Document, Documents

Packing = Literal["pad", "stream", "segments"]


class Batch(NamedTuple):
    """Rows of T + 1 tokens: the model reads all but the last and predicts all but the first.

    `trained_BT` marks the tokens whose prediction counts (padding, first tokens and prompts do not); `segments_BT`
    numbers the documents of packed rows, None where a row is one document or borders do not matter.
    """

    tokens_BT: Tensor
    trained_BT: Tensor
    segments_BT: Tensor | None

    @property
    def targets(self) -> int:
        """How many tokens carry loss."""
        return int(self.trained_BT[:, 1:].sum())


class Rows:
    """Packs documents into batches of `batch_size` rows of up to `length` + 1 tokens."""

    def __init__(
        self, documents: Documents, packing: Packing, length: int, batch_size: int, seed: int, *, truncate: bool = False
    ) -> None:
        self.documents, self.packing, self.truncate = documents, packing, truncate
        self.width, self.batch_size, self.seed = length + 1, batch_size, seed
        if documents.size == 0:
            raise ValueError("the data holds no document; there is nothing to train on")
        self._epoch_rows = lru_cache(maxsize=2)(self._make_epoch)
        self._row_counts: list[int] = []  # of the epochs so far

    def batch(self, number: int) -> Batch:
        """Batch number `number`, from 0."""
        first = number * self.batch_size
        return self._collate([self._row(i) for i in range(first, first + self.batch_size)])

    def _row(self, index: int) -> list[Document]:
        """The documents of row `index`, together at most `width` tokens."""
        if self.documents.size is None:
            return self._endless_row(index)
        # The number of rows can differ between epochs (packing depends on the order), so count through them.
        epoch = 0
        if self.packing == "pad":
            epoch, index = divmod(index, self.documents.size)
        else:
            while index >= (count := self._row_count(epoch)):
                index, epoch = index - count, epoch + 1
        return self._epoch_rows(epoch)[index]

    def _row_count(self, epoch: int) -> int:
        if epoch == len(self._row_counts):
            self._row_counts.append(len(self._epoch_rows(epoch)))
        return self._row_counts[epoch]

    def _endless_row(self, index: int) -> list[Document]:
        if self.packing == "pad":
            return [self._fitting(index)]
        row: list[Document] = []
        room, number = self.width, index * self.width  # a document has a token at least, so rows never share one
        while room > 0:
            document = self.documents.document(number)
            if self.packing == "segments" and len(document.tokens) > room:
                if row:
                    break
                document = self._fitting(number)
            row.append(Document(document.tokens[:room], document.trained[:room]))
            room -= len(row[-1].tokens)
            number += 1
        return row

    def _make_epoch(self, epoch: int) -> list[list[Document]]:
        size = self.documents.size
        assert size is not None
        order = np.random.default_rng((self.seed, epoch)).permutation(size).tolist()
        if self.packing == "pad":
            return [[self._fitting(i)] for i in order]
        if self.packing == "segments":
            rows: list[list[Document]] = []
            room = 0
            for i in order:
                document = self._fitting(i)
                if len(document.tokens) > room:
                    rows.append([])
                    room = self.width
                rows[-1].append(document)
                room -= len(document.tokens)
            return rows
        tokens: list[int] = []
        trained: list[bool] = []
        for i in order:
            document = self.documents.document(i)
            tokens += document.tokens
            trained += document.trained
        # Rows overlap by one token: the last of a row is predicted there and read in the next.
        stride = self.width - 1
        starts = range(0, max(1, len(tokens) - 1), stride)
        rows = [[Document(tokens[s : s + self.width], trained[s : s + self.width])] for s in starts]
        order = np.random.default_rng((self.seed, epoch, 1)).permutation(len(rows)).tolist()
        return [rows[i] for i in order]

    def _fitting(self, index: int) -> Document:
        document = self.documents.document(index)
        if len(document.tokens) > self.width:
            if not self.truncate:
                raise ValueError(
                    f"document {index} has {len(document.tokens)} tokens, more than data.sequence_length = "
                    f"{self.width - 1} allows; raise it (or data.packing = 'stream', which cuts documents)"
                )
            document = Document(document.tokens[: self.width], document.trained[: self.width])
        return document

    def _collate(self, rows: list[list[Document]]) -> Batch:
        width = max(2, max(sum(len(d.tokens) for d in row) for row in rows))
        tokens = np.zeros((len(rows), width), dtype=np.int64)
        trained = np.zeros((len(rows), width), dtype=bool)
        segments = np.zeros((len(rows), width), dtype=np.int64)
        for r, row in enumerate(rows):
            start = 0
            for number, document in enumerate(row):
                part = slice(start, start := start + len(document.tokens))
                tokens[r, part], trained[r, part], segments[r, part] = document.tokens, document.trained, number
                if self.packing == "segments":
                    trained[r, part.start] = False  # nothing before it to predict it from
            segments[r, start:] = len(row)
        trained[:, 0] = False
        segments_BT = torch.from_numpy(segments) if self.packing == "segments" else None
        return Batch(torch.from_numpy(tokens), torch.from_numpy(trained), segments_BT)
