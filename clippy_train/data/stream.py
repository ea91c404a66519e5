"""One logical stream of the corpus: documents in a fixed order -> token ids -> blocks of `seq_len`, each with a cursor.

Promises: the blocks after a cursor are the same whether the stream got there by reading or was started from it; every
document of an epoch appears exactly once, and nothing is dropped between documents, windows or epochs. A start costs
skipping inside one shard and reading one window of documents, whatever the size of the corpus.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from clippy_train.data.order import Part, parts, shuffled
from clippy_train.errors import DataError
from clippy_train.shards.format import FILTERED, REASONS
from clippy_train.shards.sources import Corpus

ENCODE_DOCUMENTS = 16  # documents tokenised at once: enough for the tokenizer's batch speed, few to redo on a resume
EMPTY_EPOCHS = 10  # in a row before a stream gives up: shards without a document may fall to it now and then
WINDOW_BYTES = 1 << 23  # a window closes early at 8 Mi characters, so that huge documents do not pile up in memory

# What a row consumed since the row before it, in this order.
COUNTS = ("documents", "characters", *(f"rejected/{reason}" for reason in REASONS), *FILTERED)


class Cursor(NamedTuple):
    """Where a stream continues: the window that starts at line `line` of part `part`, its document number `document` in
    the permuted order, at token `offset` of that document."""

    epoch: int = 0
    part: int = 0
    line: int = 0
    document: int = 0
    offset: int = 0


START = Cursor()


class Span(NamedTuple):
    """Tokens `first` to `end`, without `end`, of the document in a line of a shard; its end-of-text is one of them."""

    epoch: int
    shard: int  # its place in `Corpus.shards`
    line: int  # counted from 0
    first: int
    end: int


class Block(NamedTuple):
    tokens: np.ndarray  # [seq_len] int32
    cursor: Cursor  # where the stream continues after this block
    counts: np.ndarray  # [len(COUNTS)] int64, what was begun for this block
    spans: list[Span]  # what the tokens were cut from, in their order
    rejected: Counter[int]  # lines that `counts` has as rejected, by shard


class StreamEntry(NamedTuple):
    """A line of a shard, and where the line after it is."""

    text: str | None
    reason: str  # why there is no text
    part: int
    line: int


class WindowDocument(NamedTuple):
    text: str
    shard: int
    line: int


class Window(NamedTuple):
    documents: list[WindowDocument]  # in training order
    counts: np.ndarray  # lines left out while reading it
    rejected: Counter[int]
    part: int  # where the next window starts
    line: int


class Piece(NamedTuple):
    """What is left of a document, and what was read to get there."""

    ids: np.ndarray  # int32; none where only lines without a document were read
    position: Cursor  # of the first of them
    shard: int
    line: int
    consumed: np.ndarray  # as `Block.counts`
    rejected: Counter[int]  # as `Block.rejected`


@dataclass(frozen=True)
class Stream:
    """Stream `index` of `streams` over a corpus.

    Args:
        encode: texts to their token ids, without the end-of-text token.
        eos: id put after every document, or None.
        shuffle: False reads shards and documents as they lie (validation).
    """

    corpus: Corpus
    encode: Callable[[list[str]], list[list[int]]]
    seq_len: int
    index: int = 0
    streams: int = 1
    seed: int = 0
    window: int = 1
    eos: int | None = None
    shuffle: bool = True

    def blocks(self, cursor: Cursor = START) -> Iterator[Block]:
        """Blocks from `cursor` on, without end: after the last document of an epoch comes the next epoch.

        Raises:
            DataError: the stream has no usable document.
        """
        buffer = np.empty(self.seq_len, dtype=np.int32)
        filled = 0
        counts = _counts()
        spans: list[Span] = []
        rejected: Counter[int] = Counter()
        for ids, position, shard, line, consumed, lost in self._pieces(cursor):
            counts += consumed
            rejected.update(lost)
            taken = 0
            while taken < len(ids):
                room = min(self.seq_len - filled, len(ids) - taken)
                buffer[filled : filled + room] = ids[taken : taken + room]
                first = position.offset + taken
                spans.append(Span(position.epoch, shard, line, first, first + room))
                filled, taken = filled + room, taken + room
                if filled == self.seq_len:
                    yield Block(buffer.copy(), _after(position, taken, len(ids)), counts, spans, rejected)
                    filled, counts, spans, rejected = 0, _counts(), [], Counter()

    def _pieces(self, cursor: Cursor) -> Iterator[Piece]:
        """The documents from `cursor` on, the first without the tokens before it."""
        empty_epochs = 0 if cursor == Cursor(cursor.epoch) else -1  # a restart may stand behind its last document
        while True:
            order = self._parts(cursor.epoch)
            entries = self._entries(order, cursor)
            empty_epochs += 1
            while cursor.part < len(order):
                window = self._window(entries, order, cursor)
                begun = cursor.document == cursor.offset == 0
                consumed, rejected = (window.counts, window.rejected) if begun else (_counts(), Counter())
                for index, (document, ids) in enumerate(self._encoded(window.documents[cursor.document :])):
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
                    f"stream {self.index} of data.streams={self.streams} found no usable document in "
                    f"{self.corpus.place}: the corpus has too few documents for so many streams"
                )
            cursor = Cursor(cursor.epoch + 1)

    def _parts(self, epoch: int) -> list[Part]:
        if self.shuffle:
            return parts(len(self.corpus.shards), self.streams, self.index, self.seed, epoch)
        return [Part(shard, self.streams, self.index) for shard in range(len(self.corpus.shards))]

    def _entries(self, order: list[Part], cursor: Cursor) -> Iterator[StreamEntry]:
        """Every line of the epoch from the cursor's window on; each shard is opened once."""
        line = cursor.line
        for number in range(cursor.part, len(order)):
            part = order[number]
            for index, text, reason in self.corpus.documents(part.shard, line, part.stride, part.residue):
                yield StreamEntry(text, reason, number, index + 1)
            line = 0

    def _window(self, entries: Iterator[StreamEntry], order: list[Part], cursor: Cursor) -> Window:
        """Read the window that starts at the cursor's line and put its documents in training order."""
        documents: list[WindowDocument] = []
        size = 0
        counts = _counts()
        rejected: Counter[int] = Counter()
        behind = (len(order), 0)
        for entry in entries:
            if entry.text is None:
                filtered = entry.reason in FILTERED
                counts += _counts(**{entry.reason if filtered else f"rejected/{entry.reason}": 1})
                if not filtered:
                    rejected[order[entry.part].shard] += 1
                continue
            documents.append(WindowDocument(entry.text, order[entry.part].shard, entry.line - 1))
            size += len(entry.text)
            if len(documents) == self.window or size >= WINDOW_BYTES:
                behind = (entry.part, entry.line)
                break
        if self.shuffle:
            key = (self.seed, cursor.epoch, self.index + 1, cursor.part, cursor.line)
            documents = [documents[i] for i in shuffled(len(documents), *key)]
        return Window(documents, counts, rejected, *behind)

    def _encoded(self, documents: list[WindowDocument]) -> Iterator[tuple[WindowDocument, np.ndarray]]:
        """Documents with their ids, tokenised a few at a time."""
        end = [] if self.eos is None else [self.eos]
        for begin in range(0, len(documents), ENCODE_DOCUMENTS):
            some = documents[begin : begin + ENCODE_DOCUMENTS]
            for document, ids in zip(some, self.encode([each.text for each in some]), strict=True):
                yield document, np.array([*ids, *end], dtype=np.int32)


def _after(position: Cursor, taken: int, length: int) -> Cursor:
    """The cursor behind `taken` of the `length` ids that begin at `position`."""
    if taken == length:
        return position._replace(document=position.document + 1, offset=0)
    return position._replace(offset=position.offset + taken)


def _counts(**values: int) -> np.ndarray:
    counts = np.zeros(len(COUNTS), dtype=np.int64)
    for name, value in values.items():
        counts[COUNTS.index(name)] = value
    return counts
