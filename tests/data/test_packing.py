"""Packing: batches are pure functions of (seed, number), and an epoch has every document once, whatever the packing."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luciola.data.documents import Document
from luciola.data.packing import Batch, Packing, Rows

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)
PACKINGS: list[Packing] = ["pad", "stream", "segments"]


class Numbered:
    """Documents whose tokens say where they come from, 1000 * (number + 1) + place; `prompt` of them carry no loss."""

    def __init__(self, lengths: list[int], endless: bool = False, prompt: int = 0) -> None:
        self.lengths, self.prompt = lengths, prompt
        self.size = None if endless else len(lengths)
        self.calls = 0

    def document(self, index: int) -> Document:
        self.calls += 1
        length = self.lengths[index % len(self.lengths)]
        return Document(
            [1000 * (index + 1) + place for place in range(length)], [place >= self.prompt for place in range(length)]
        )


LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=12)


def real(batch: Batch) -> list[list[int]]:
    """The tokens of each row without padding, which is 0."""
    return [[t for t in row if t] for row in batch.tokens_BT.tolist()]


def trained(batch: Batch) -> list[int]:
    return batch.tokens_BT[batch.trained_BT].tolist()


def same(a: Batch, b: Batch) -> bool:
    return all(x is y or torch.equal(x, y) for x, y in zip(a, b, strict=True))


@given(LENGTHS, st.sampled_from(PACKINGS), st.booleans(), st.integers(1, 5), st.permutations(range(6)))
@SETTINGS
def test_a_batch_does_not_depend_on_those_before_it(
    lengths: list[int], packing: Packing, endless: bool, size: int, order: list[int]
) -> None:
    def rows(seed: int = 0) -> Rows:
        return Rows(Numbered(lengths, endless), packing, 12, size, seed)

    one_after_the_other = rows()
    expected = [one_after_the_other.batch(n) for n in range(6)]
    jumping = rows()
    for n in order:
        assert same(jumping.batch(n), expected[n])
        assert same(rows().batch(n), expected[n])


@given(LENGTHS, st.integers(0, 99))
@SETTINGS
def test_pad_reads_each_document_once_an_epoch(lengths: list[int], seed: int) -> None:
    rows = Rows(Numbered(lengths), "pad", 12, 1, seed)
    documents = sorted(Numbered(lengths).document(i).tokens for i in range(len(lengths)))
    for epoch in range(3):
        numbers = range(epoch * len(lengths), (epoch + 1) * len(lengths))
        assert sorted(real(rows.batch(n))[0] for n in numbers) == documents


@given(LENGTHS, st.integers(12, 20), st.integers(0, 99))
@SETTINGS
def test_segments_hold_whole_documents_once_an_epoch(lengths: list[int], length: int, seed: int) -> None:
    """Also: no row is longer than allowed, and each segment is one document."""
    rows = Rows(Numbered(lengths), "segments", length, 1, seed)
    seen: Counter[int] = Counter()
    n = 0
    while sum(seen.values()) < 2 * len(lengths):
        batch = rows.batch(n)
        assert batch.tokens_BT.shape[1] <= length + 1
        assert batch.segments_BT is not None
        row, segments = batch.tokens_BT[0], batch.segments_BT[0]
        for segment in segments.unique().tolist():
            tokens = row[segments == segment].tolist()
            if tokens[0] == 0:  # padding is a segment of its own
                assert set(tokens) == {0}
                assert segment == int(segments.max())
                continue
            number = tokens[0] // 1000 - 1
            assert tokens == Numbered(lengths).document(number).tokens
            seen[number] += 1
        n += 1
        if sum(seen.values()) == len(lengths):  # rows end with the epoch
            assert set(seen.values()) == {1}
    assert set(seen.values()) == {2}


@given(LENGTHS, st.integers(2, 15), st.integers(0, 99))
@SETTINGS
def test_stream_trains_every_token_but_the_first_once_an_epoch(lengths: list[int], length: int, seed: int) -> None:
    total = sum(lengths)
    rows = Rows(Numbered(lengths), "stream", length, 1, seed)
    count = max(1, -(-(total - 1) // length))
    everything = Counter(t for i in range(len(lengths)) for t in Numbered(lengths).document(i).tokens)
    for epoch in range(2):
        batches = [rows.batch(n) for n in range(epoch * count, (epoch + 1) * count)]
        seen = Counter(t for batch in batches for t in trained(batch))
        missing = everything - seen
        assert sum(missing.values()) == 1
        assert next(iter(missing)) % 1000 == 0  # the first token of the document that comes first
        assert not seen - everything


@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.sampled_from(PACKINGS), st.integers(12, 30))
@SETTINGS
def test_endless_documents_are_never_read_twice(lengths: list[int], packing: Packing, length: int) -> None:
    rows = Rows(Numbered(lengths, endless=True), packing, length, 3, 0)
    tokens = Counter(t for n in range(4) for row in real(rows.batch(n)) for t in row)
    assert set(tokens.values()) == {1}
    assert all(batch.tokens_BT.shape[1] <= length + 1 for batch in map(rows.batch, range(4)))


@given(LENGTHS, st.sampled_from(PACKINGS), st.integers(0, 3))
@SETTINGS
def test_loss_is_where_the_document_says(lengths: list[int], packing: Packing, prompt: int) -> None:
    """Never on padding, on the first token of a row, or (in segments) on the first token of a document."""
    batch = Rows(Numbered(lengths, prompt=prompt), packing, 12, 4, 0).batch(0)
    assert not bool(batch.trained_BT[:, 0].any())
    assert not bool(batch.trained_BT[batch.tokens_BT == 0].any())
    assert all(t % 1000 >= prompt for t in trained(batch))
    if packing != "stream":
        assert all(t % 1000 > 0 for t in trained(batch))
        expected = sum(1 for row in real(batch) for t in row if t % 1000 >= max(prompt, 1))
        assert batch.targets == expected


@pytest.mark.parametrize("packing", ["pad", "segments"])
def test_a_document_longer_than_a_row_is_refused_or_cut(packing: Packing) -> None:
    with pytest.raises(ValueError, match=r"document 1 has 9 tokens, more than data.sequence_length = 6 allows"):
        Rows(Numbered([3, 9]), packing, 6, 2, 0).batch(0)
    rows = Rows(Numbered([3, 9]), packing, 6, 1, 0, truncate=True)
    found = sorted(t for n in range(2) for row in real(rows.batch(n)) for t in row)
    assert found == [1000, 1001, 1002, *range(2000, 2007)]


def test_stream_cuts_documents_wherever_a_row_ends() -> None:
    rows = Rows(Numbered([30]), "stream", 6, 1, 0)
    assert max(batch.tokens_BT.shape[1] for batch in map(rows.batch, range(5))) == 7


def test_different_seeds_and_epochs_have_different_orders() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        rows = Rows(Numbered([1] * 20), "pad", 4, 20, seed)
        return rows.batch(epoch).tokens_BT[:, 0].tolist()

    orders = [order(0, 0), order(0, 1), order(1, 0)]
    assert len({tuple(o) for o in orders}) == 3
    assert len({tuple(sorted(o)) for o in orders}) == 1


@pytest.mark.parametrize("packing", PACKINGS)
def test_later_epochs_do_not_read_the_earlier_ones_again(packing: Packing) -> None:
    """Up to six epochs of 50 documents: each epoch's documents are read once, not once for every row."""
    documents = Numbered([3, 5] * 25)
    rows = Rows(documents, packing, 12, 1, 0)
    for n in range(100):
        rows.batch(n)
    assert documents.calls <= 50 * 6


def test_no_document_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="the data holds no document"):
        Rows(Numbered([]), "pad", 4, 1, 0)
