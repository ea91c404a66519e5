"""Sequences that a model is scored on: token ids, and the group of text that each token belongs to (`model.score`).

Two ways to cut a split: blocks, as in training and validation, or windows that slide over each document, so that each
of its tokens is predicted from as many tokens before it as the model takes. Reference solutions of problems are scored
given their prompts. Sequences are made one at a time; blocks read documents twice, for their ids and for their meta,
which costs little compared with tokenising.
"""

from collections.abc import Callable, Hashable, Iterator
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from clippy_train.data.objectives import Encode, token_ids
from clippy_train.data.stream import ENCODE_DOCUMENTS, Block, Stream
from clippy_train.errors import DataError
from clippy_train.shards.problems import Problem
from clippy_train.shards.sources import Corpus

T = TypeVar("T", bound=Hashable)

LENGTH_MULTIPLE = 128  # of sequences that are shorter than the others: kernels work on blocks of this many tokens
UNKNOWN = "unknown"  # language or repository that the meta does not name


class ScoredSequence(NamedTuple):
    tokens: np.ndarray  # [seq] int32
    group: np.ndarray  # [seq] int64: of each token, 0 if it is not scored


class Group(NamedTuple):
    """What a validation scores separately: a language of a source's split, or of reference solutions."""

    language: str
    source: str = ""
    solution: bool = False


class Groups(dict[T, int]):
    """The number of each group, from 1 on, in the order of appearance."""

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
    blocks: Iterator[Block], corpus: Corpus, label: Callable[[dict[str, Any]], T], groups: Groups[T]
) -> Iterator[ScoredSequence]:
    """The blocks of an unshuffled stream with their groups; `corpus` is the same split, opened with its meta."""
    documents = _documents(corpus)
    place = (-1, -1)
    meta: dict[str, Any] = {}
    for block in blocks:
        group = np.zeros(len(block.tokens), dtype=np.int64)
        filled = 0
        for span in block.spans:
            while place != (span.shard, span.line):
                place, _, meta = next(documents)
            end = filled + span.end - span.first
            group[filled:end] = groups.number(label(meta))
            filled = end
        group[block.tokens < 0] = 0
        yield ScoredSequence(token_ids(block.tokens), group)


def scored_windows(
    corpus: Corpus,
    encode: Encode,
    start: int,
    seq_len: int,
    stride: int,
    label: Callable[[dict[str, Any]], T],
    groups: Groups[T],
) -> Iterator[ScoredSequence]:
    """Each document on its own, after the token `start`: each of its tokens is scored exactly once.

    A window of `seq_len` tokens moves by `stride` and scores the tokens that the one before it did not, so all but the
    first tokens of a document are predicted from at least `seq_len - stride` tokens before them. The last window of a
    document is padded with `start`. `corpus` must have been opened with its meta.
    """
    documents = _documents(corpus)
    while batch := list(islice(documents, ENCODE_DOCUMENTS)):
        for (_, _, meta), ids in zip(batch, encode([text for _, text, _ in batch]), strict=True):
            yield from _windows([start, *ids], seq_len, stride, groups.number(label(meta)))


def scored_solutions(
    problems: list[Problem],
    encode: Encode,
    start: int,
    seq_len: int,
    label: Callable[[Problem], T],
    groups: Groups[T],
) -> Iterator[ScoredSequence]:
    """The reference solution of each problem, predicted from the token `start`, the prompt and the tokens before.

    Prompt and solution are encoded separately, as they are when a model continues the prompt. Every token of a solution
    is scored exactly once; what exceeds `seq_len` is in further windows, as in `scored_windows`. All sequences have one
    length, which is below `seq_len` if that is enough for the longest.
    """
    encoded = [encode([problem.prompt, problem.reference]) for problem in problems]
    longest = 1 + max(sum(map(len, each)) for each in encoded)
    seq_len = min(seq_len, -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE)
    for problem, (prompt, solution) in zip(problems, encoded, strict=True):
        ids, number = [start, *prompt, *solution], groups.number(label(problem))
        yield from _windows(ids, seq_len, max(1, seq_len // 2), number, scored=1 + len(prompt))


def _windows(ids: list[int], seq_len: int, stride: int, number: int, scored: int = 1) -> Iterator[ScoredSequence]:
    """Windows that score the tokens from `scored` on; those before, of which `start` is the first, are context only."""
    first = max(0, min(len(ids) - seq_len, scored - seq_len // 2))
    for begin in range(first, len(ids), stride):
        if scored >= len(ids):
            return
        window = ScoredSequence(np.full(seq_len, ids[0], dtype=np.int32), np.zeros(seq_len, dtype=np.int64))
        end = min(begin + seq_len, len(ids))
        window.tokens[: end - begin] = ids[begin:end]
        window.group[scored - begin : end - begin] = number
        scored = end
        yield window


def _documents(corpus: Corpus) -> Iterator[tuple[tuple[int, int], str, dict[str, Any]]]:
    """((shard, line), text, meta) of every usable document, in on-disk order."""
    for shard in range(len(corpus.shards)):
        for entry in corpus.documents(shard):
            if entry.text is not None:
                assert entry.meta is not None, "the corpus was opened without its meta"
                yield (shard, entry.number), entry.text, entry.meta


def collate_scored(sequences: list[ScoredSequence]) -> dict[str, Tensor]:
    """`input_ids` and `group`, both `[batch, seq]` int64."""
    ids, group = (np.stack(each).astype(np.int64) for each in zip(*sequences, strict=True))
    return {"input_ids": torch.from_numpy(ids), "group": torch.from_numpy(group)}
