"""One logical stream of the corpus: documents in a fixed order -> tokens -> blocks of `seq_len`, each with a cursor.

Promises: the blocks after a cursor are the same whether the stream reached it by reading or was started from it; every
document of an epoch appears exactly once, and nothing is dropped between documents, windows or epochs. Starting costs
skipping inside one shard and reading one window of documents, whatever the size of the corpus.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from clippy_train.data.objectives import Objective, PlacedDocument
from clippy_train.data.order import ShardPart, permutation, stream_parts
from clippy_train.errors import DataError
from clippy_train.shards.format import FILTERED, REASONS
from clippy_train.shards.sources import Corpus

ENCODE_DOCUMENTS = 16  # documents tokenised at once: enough for the tokenizer's batch speed, few to repeat on resume
EMPTY_EPOCHS = 10  # in a row, then a stream gives up: now and then it may get only shards without documents
WINDOW_CHARACTERS = 1 << 23  # 8 Mi: a window of huge documents ends early, to bound memory

# What a block consumed since the block before it, in this order.
COUNTS = ("documents", "characters", *(f"rejected/{reason}" for reason in REASONS), *FILTERED)


class Cursor(NamedTuple):
    """Where a stream continues: in the window that starts at line `line` of part `part`, with document `document` of
    the permuted order, at token `offset` of that document."""

    epoch: int = 0
    part: int = 0
    line: int = 0
    document: int = 0
    offset: int = 0


START = Cursor()


class Span(NamedTuple):
    """Tokens `first` to `end - 1` of the document on a line of a shard, its end-of-text token included."""

    epoch: int
    shard: int  # index in `Corpus.shards`
    line: int  # from 0
    first: int
    end: int


class Block(NamedTuple):
    tokens: np.ndarray  # [seq_len] int32, as `data.objectives` stores them
    cursor: Cursor  # where the stream continues after this block
    counts: np.ndarray  # [len(COUNTS)] int64, what was read for this block
    spans: list[Span]  # where its tokens come from, in order
    rejected: Counter[int]  # the rejected documents in `counts`, by shard
    skipped: tuple[Span, ...] = ()  # of the blocks passed over before it; `counts` and `rejected` include theirs


class StreamEntry(NamedTuple):
    """A line of a shard, and the position of the line after it."""

    text: str | None
    reason: str  # "" if there is a text
    part: int
    line: int
    documents: int  # that `reason` rejects
    prompt: str


class Window(NamedTuple):
    documents: list[PlacedDocument]  # in training order
    counts: np.ndarray  # lines skipped while reading it
    rejected: Counter[int]
    part: int  # where the next window starts
    line: int


class Piece(NamedTuple):
    """A document, or the rest of one, and what was read to get there."""

    ids: np.ndarray  # int32; empty if only lines without a document were read
    position: Cursor  # of the first of them
    shard: int
    line: int
    consumed: np.ndarray  # as `Block.counts`
    rejected: Counter[int]  # as `Block.rejected`


@dataclass(frozen=True)
class Stream:
    """Stream `index` of `streams` over a corpus.

    Args:
        objective: documents to their tokens.
        shuffle: False reads shards and documents in on-disk order (validation).
        pad: id that fills the rest of a block after each document; None fills it with the documents that follow.
    """

    corpus: Corpus
    objective: Objective
    seq_len: int
    index: int = 0
    streams: int = 1
    seed: int = 0
    window: int = 1
    shuffle: bool = True
    pad: int | None = None

    def blocks(self, cursor: Cursor = START) -> Iterator[Block]:
        """Endless blocks from `cursor` on: the last document of an epoch is followed by the next epoch.

        Raises:
            DataError: the stream has no usable document.
        """
        buffer = np.empty(self.seq_len, dtype=np.int32)
        filled = 0
        counts = _counts()
        spans: list[Span] = []
        rejected: Counter[int] = Counter()
        for piece in self._pieces(cursor):
            ids, position = piece.ids, piece.position
            counts += piece.consumed
            rejected.update(piece.rejected)
            taken = 0
            while taken < len(ids):
                size = min(self.seq_len - filled, len(ids) - taken)
                buffer[filled : filled + size] = ids[taken : taken + size]
                first = position.offset + taken
                spans.append(Span(position.epoch, piece.shard, piece.line, first, first + size))
                filled, taken = filled + size, taken + size
                if self.pad is not None and taken == len(ids):
                    buffer[filled:], filled = ~self.pad, self.seq_len
                if filled == self.seq_len:
                    yield Block(buffer.copy(), _advanced(position, taken, len(ids)), counts, spans, rejected)
                    filled, counts, spans, rejected = 0, _counts(), [], Counter()

    def _pieces(self, cursor: Cursor) -> Iterator[Piece]:
        """The documents from `cursor` on, the first without the tokens before it."""
        # A resumed epoch does not count as empty: it may be resumed after its last document.
        empty_epochs = 0 if cursor == Cursor(cursor.epoch) else -1
        while True:
            order = self._parts(cursor.epoch)
            entries = self._entries(order, cursor)
            empty_epochs += 1
            while cursor.part < len(order):
                window = self._window(entries, order, cursor)
                is_new = cursor.document == cursor.offset == 0
                consumed, rejected = (window.counts, window.rejected) if is_new else (_counts(), Counter())
                documents = self._encoded(cursor.epoch, window.documents[cursor.document :])
                for index, (document, ids) in enumerate(documents):
                    position = cursor if index == 0 else cursor._replace(document=cursor.document + index, offset=0)
                    if position.offset == 0:
                        consumed = consumed + _counts(documents=1, characters=len(document.text))
                    empty_epochs = 0 if len(ids) else empty_epochs
                    yield Piece(ids[position.offset :], position, document.shard, document.line, consumed, rejected)
                    consumed, rejected = _counts(), Counter()
                if consumed.any():
                    yield Piece(np.empty(0, dtype=np.int32), cursor, 0, 0, consumed, rejected)
                cursor = Cursor(cursor.epoch, window.part, window.line)
            if empty_epochs >= EMPTY_EPOCHS:
                raise DataError(
                    f"stream {self.index} of {self.streams} found no usable document in {self.corpus.place}: the "
                    "corpus has too few documents for so many streams (data.streams)"
                )
            cursor = Cursor(cursor.epoch + 1)

    def _parts(self, epoch: int) -> list[ShardPart]:
        if self.shuffle:
            return stream_parts(len(self.corpus.shards), self.streams, self.index, self.seed, epoch)
        return [ShardPart(shard, self.streams, self.index) for shard in range(len(self.corpus.shards))]

    def _entries(self, order: list[ShardPart], cursor: Cursor) -> Iterator[StreamEntry]:
        """Every line of the epoch from the cursor's window on; each shard is opened once."""
        line = cursor.line
        for number in range(cursor.part, len(order)):
            part = order[number]
            for entry in self.corpus.documents(part.shard, line, part.stride, part.residue):
                yield StreamEntry(entry.text, entry.reason, number, entry.number + 1, entry.documents, entry.prompt)
            line = 0

    def _window(self, entries: Iterator[StreamEntry], order: list[ShardPart], cursor: Cursor) -> Window:
        """Read the window that starts at the cursor's line and put its documents in training order."""
        documents: list[PlacedDocument] = []
        size = 0
        counts = _counts()
        rejected: Counter[int] = Counter()
        next_part, next_line = len(order), 0
        for entry in entries:
            if entry.text is None:
                filtered = entry.reason in FILTERED
                counts += _counts(**{entry.reason if filtered else f"rejected/{entry.reason}": entry.documents})
                if not filtered:
                    rejected[order[entry.part].shard] += entry.documents
                continue
            documents.append(PlacedDocument(entry.text, order[entry.part].shard, entry.line - 1, entry.prompt))
            size += len(entry.text) + len(entry.prompt)
            if len(documents) == self.window or size >= WINDOW_CHARACTERS:
                next_part, next_line = entry.part, entry.line
                break
        if self.shuffle:
            key = (self.seed, cursor.epoch, self.index + 1, cursor.part, cursor.line)
            documents = [documents[i] for i in permutation(len(documents), *key)]
        return Window(documents, counts, rejected, next_part, next_line)

    def _encoded(self, epoch: int, documents: list[PlacedDocument]) -> Iterator[tuple[PlacedDocument, np.ndarray]]:
        """Documents with their tokens, tokenised a few at a time."""
        for begin in range(0, len(documents), ENCODE_DOCUMENTS):
            batch = documents[begin : begin + ENCODE_DOCUMENTS]
            yield from zip(batch, self.objective(epoch, batch), strict=True)


def _advanced(position: Cursor, taken: int, length: int) -> Cursor:
    """The cursor after `taken` of the `length` ids that begin at `position`."""
    if taken == length:
        return position._replace(document=position.document + 1, offset=0)
    return position._replace(offset=position.offset + taken)


def _counts(**values: int) -> np.ndarray:
    counts = np.zeros(len(COUNTS), dtype=np.int64)
    for name, value in values.items():
        counts[COUNTS.index(name)] = value
    return counts
