"""Rows that a model is scored on: token ids, and the group of text that each token belongs to (`model.score`).

Two ways to cut a split: blocks, as they are trained on and validated on, or windows that slide over each document, so
that every token of it is predicted from as many tokens before it as the model takes. Rows are made one at a time;
documents are read twice, for their ids and for their meta, which costs little beside tokenising.
"""

from collections.abc import Callable, Hashable, Iterator
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from clippy_train.data.stream import ENCODE_DOCUMENTS, Block, Stream
from clippy_train.errors import DataError
from clippy_train.shards.format import Described
from clippy_train.shards.sources import Corpus

T = TypeVar("T", bound=Hashable)

UNKNOWN = "unknown"  # language or repository of a document whose meta does not say


class ScoredSequence(NamedTuple):
    tokens: np.ndarray  # [seq] int32
    group: np.ndarray  # [seq] int64: of each token, 0 where it is not scored


class Groups(dict[T, int]):
    """Numbers for what is told apart, from 1 on, in the order of appearance."""

    def number(self, label: T) -> int:
        return self.setdefault(label, len(self) + 1)


def language_label(meta: dict[str, Any]) -> str:
    return meta["repo_language"] or UNKNOWN


def repository_label(meta: dict[str, Any]) -> tuple[str, str]:
    return language_label(meta), meta["repo_name"] or UNKNOWN


def first_blocks(stream: Stream, count: int | None = None) -> Iterator[Block]:
    """The first `count` blocks of an unshuffled stream, or as many as the split has.

    Raises:
        DataError: the split has less text than one block.
    """
    found = False
    for block in islice(stream.blocks(), count):
        if block.cursor.epoch > 0:
            break
        found = True
        yield block
    if not found:
        raise DataError(f"{stream.corpus.place} has less than one block of data.seq_len={stream.seq_len} tokens")


def scored_blocks(
    blocks: Iterator[Block], described: Corpus, label: Callable[[dict[str, Any]], T], groups: Groups[T]
) -> Iterator[ScoredSequence]:
    """The blocks of an unshuffled stream as rows; `described` is the same split, opened so."""
    documents = _documents(described)
    place, number = (-1, -1), 0
    for block in blocks:
        parts = []
        for span in block.spans:
            while place != (span.shard, span.line):
                shard, line, (_, meta) = next(documents)
                place = shard, line
            number = groups.number(label(meta))
            parts.append(np.full(span.end - span.first, number, dtype=np.int64))
        yield ScoredSequence(block.tokens, np.concatenate(parts))


def scored_windows(
    described: Corpus,
    encode: Callable[[list[str]], list[list[int]]],
    start: int,
    seq_len: int,
    stride: int,
    label: Callable[[dict[str, Any]], T],
    groups: Groups[T],
) -> Iterator[ScoredSequence]:
    """Each document by itself, behind the token `start`: every token of it is scored exactly once.

    A window of `seq_len` tokens moves on by `stride`; it scores what the one before it did not, so all but the first
    tokens of a document are predicted from at least `seq_len - stride` tokens before them. The last row of a document
    is filled up with `start`.
    """
    documents = _documents(described)
    while some := list(islice(documents, ENCODE_DOCUMENTS)):
        for (_, _, (_, meta)), ids in zip(some, encode([document.text for _, _, document in some]), strict=True):
            yield from _windows([start, *ids], seq_len, stride, groups.number(label(meta)))


def _windows(ids: list[int], seq_len: int, stride: int, number: int) -> Iterator[ScoredSequence]:
    scored = 1  # the start is given
    for begin in range(0, len(ids), stride):
        if scored >= len(ids):
            return
        row = ScoredSequence(np.full(seq_len, ids[0], dtype=np.int32), np.zeros(seq_len, dtype=np.int64))
        end = min(begin + seq_len, len(ids))
        row.tokens[: end - begin] = ids[begin:end]
        row.group[scored - begin : end - begin] = number
        scored = end
        yield row


def _documents(described: Corpus) -> Iterator[tuple[int, int, Described]]:
    """(shard, line, document) of every usable document, as they lie."""
    for shard in range(len(described.shards)):
        yield from ((shard, line, each) for line, each, _ in described.documents(shard) if each is not None)


def collate_scored(rows: list[ScoredSequence]) -> dict[str, Tensor]:
    """`input_ids` and `group`, both `[rows, seq]` int64."""
    ids, group = (np.stack(each).astype(np.int64) for each in zip(*rows, strict=True))
    return {"input_ids": torch.from_numpy(ids), "group": torch.from_numpy(group)}
