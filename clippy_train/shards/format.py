"""One shard of a corpus (`.jsonl.zst`, `.jsonl.gz`, `.jsonl`, `.parquet`): bytes -> documents; and how we write one.

A document is a JSON object on a line, or a row: `{"text": ..., "meta": {...}}`. Promises: what cannot be used is
counted by reason and skipped; a damaged or cut shard is told from a complete one (a cut zstd stream looks like a normal
end of file to most readers); rejected content is never shown. Memory is bounded by the longest line, or by what 16 rows
of parquet hold. Reading costs about 1/100 of tokenising; passing over lines costs their decompression.
"""

import codecs
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import zstandard

from clippy_train.config import FilterConfig
from clippy_train.shards.filters import META_COLUMNS, RULES, broken_rule, code_clippy_meta

SPLITS = ("train", "validation", "test")
SUFFIX = ".jsonl.zst"  # what is written
SUFFIXES = (SUFFIX, ".jsonl.gz", ".jsonl", ".parquet")  # what is read
READ_BYTES = 1 << 20  # read at once: one request, where a shard lies on a network
FEED_BYTES = 1 << 12  # decompressed at once: zstd can make 32,000 times as much, and damage takes its whole feed along
MAX_LINE_BYTES = 1 << 27  # 128 MiB: longer lines are skipped as `too_long` without being held in memory
PARQUET_ROWS = 16  # decoded at once

# Why a line, or the rest of a shard, was not used.
REASONS = ("not_json", "no_text", "not_utf8", "too_long", "damaged_shard")

# Why a document was left out on purpose: the rule of data.filter that it breaks.
FILTERED = tuple(f"filtered/{rule}" for rule in RULES)


class Entry(NamedTuple):
    """A line or row of a shard: its content if it can be used, else the reason why not."""

    number: int  # from 0
    content: Any  # text or `Described`; None if there is a reason
    reason: str


class Described(NamedTuple):
    text: str
    meta: dict[str, Any]  # Code Clippy meta


class ByteFile(Protocol):
    """A file open for reading bytes; parquet also needs `seek` and `tell`."""

    def read(self, size: int) -> bytes: ...


@dataclass(frozen=True)
class Fields:
    """Which field of a document is its text, and the rules that choose among documents; None keeps all.

    A `described` document comes as `Described`, instead of as its text alone.
    """

    text: str = "text"
    rules: FilterConfig | None = None
    described: bool = False

    def columns(self, names: list[str]) -> list[str]:
        """Those of a table's columns that are needed."""
        needed = {self.text}
        if self.rules or self.described:
            needed |= {"meta", *chain.from_iterable(META_COLUMNS.values())}
        return [name for name in names if name in needed]


@dataclass(frozen=True)
class Selection:
    """What is wanted of a shard: the lines from `start` on whose number is `residue` modulo `stride`."""

    start: int = 0
    stride: int = 1
    residue: int = 0

    @property
    def first(self) -> int:
        return self.start + (self.residue - self.start) % self.stride

    def includes(self, number: int) -> bool:
        return number >= self.start and number % self.stride == self.residue


ALL = Selection()


def documents(file: ByteFile, name: str, fields: Fields, wanted: Selection = ALL) -> Iterator[Entry]:
    """The wanted lines of an open shard as (line number, text or None, reason), where a good line has no reason.

    `name` tells the format by its suffix. Blank lines have a number, but are never returned. A damaged or cut shard
    ends with one `damaged_shard` entry, after every line that could be read.
    """
    if name.endswith(".parquet"):
        yield from _rows(file, fields, wanted)
        return
    for number, line in _lines(_chunks(file, name), wanted):
        if isinstance(line, str):
            yield Entry(number, None, line)
        elif line and not line.isspace():
            yield Entry(number, *parse(line, fields))


def parse(line: bytes, fields: Fields) -> tuple[Any, str]:
    """The text (or `Described`) of a line and an empty reason, or None and the reason why it cannot be used."""
    try:
        document = json.loads(line.removeprefix(codecs.BOM_UTF8).decode())
    except UnicodeDecodeError:
        return None, "not_utf8"
    except (ValueError, RecursionError):
        return None, "not_json"
    return usable(document, fields)


def usable(document: Any, fields: Fields) -> tuple[Any, str]:
    """The text (or `Described`) of a document and an empty reason, or None and the reason why it cannot be used."""
    text = document.get(fields.text) if isinstance(document, dict) else None
    if not isinstance(text, str) or not text:
        return None, "no_text"
    if len(text) > MAX_LINE_BYTES:
        return None, "too_long"
    try:
        text.encode()  # a lone surrogate is valid JSON, but no tokenizer takes it
    except UnicodeEncodeError:
        return None, "not_utf8"
    broken = broken_rule(document, text, fields.rules) if fields.rules else None
    if broken:
        return None, f"filtered/{broken}"
    return (Described(text, code_clippy_meta(document)) if fields.described else text), ""


def _lines(chunks: Iterator[bytes | None], wanted: Selection) -> Iterator[tuple[int, bytes | str]]:
    """Wanted lines without their end; a `str` is the reason why what stood there is lost.

    Lines that are not wanted are counted, not made.
    """
    number, next_wanted = 0, wanted.first  # number of the line that the next byte belongs to
    pending: list[bytes] = []  # pieces of a wanted line
    size = 0
    for chunk in chunks:
        if chunk is None:
            if number == next_wanted:
                yield number, "damaged_shard"  # whatever is pending is the first part of a line
            return
        ends = chunk.count(b"\n")
        if number + ends < next_wanted:
            number += ends
            continue
        begin = 0
        for _ in range(ends):
            end = chunk.index(b"\n", begin)
            if number == next_wanted:
                size += end - begin
                yield number, "too_long" if size > MAX_LINE_BYTES else b"".join((*pending, chunk[begin:end]))
                next_wanted += wanted.stride
                pending, size = [], 0
            number, begin = number + 1, end + 1
        if number == next_wanted:
            size += len(chunk) - begin
            if size <= MAX_LINE_BYTES:
                pending.append(chunk[begin:])
    if size:
        yield number, "too_long" if size > MAX_LINE_BYTES else b"".join(pending)


def _chunks(file: ByteFile, name: str) -> Iterator[bytes | None]:
    """Plain bytes of a shard; a last None says that its compressed stream was damaged or cut."""
    blocks = iter(partial(file.read, READ_BYTES), b"")
    if name.endswith(".jsonl"):
        return blocks
    if name.endswith(".gz"):
        return _decompressed(blocks, partial(zlib.decompressobj, zlib.MAX_WBITS | 16))
    return _decompressed(blocks, zstandard.ZstdDecompressor().decompressobj)


def _decompressed(blocks: Iterator[bytes], new_decoder: Callable[[], Any]) -> Iterator[bytes | None]:
    """Decompressed chunks over all frames (or members) of a file; a last None says that it was damaged or cut."""
    decoder = new_decoder()
    fresh = True  # at the start of a frame: the only place where a file may end
    for block in blocks:
        for begin in range(0, len(block), FEED_BYTES):
            data = block[begin : begin + FEED_BYTES]
            while data:
                try:
                    chunk = decoder.decompress(data)
                except (zstandard.ZstdError, zlib.error):
                    yield None
                    return
                if chunk:
                    yield chunk
                fresh, data = False, b""
                if decoder.eof:
                    data, fresh = decoder.unused_data, True
                    decoder = new_decoder()
    if not fresh:
        yield None


def _rows(file: ByteFile, fields: Fields, wanted: Selection) -> Iterator[Entry]:
    """Wanted rows of a parquet file; row groups before the first are not read, nor are other columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        parquet = pq.ParquetFile(file, buffer_size=READ_BYTES, page_checksum_verification=True)
        columns = fields.columns(parquet.schema_arrow.names)
        for group in range(parquet.num_row_groups):
            rows = parquet.metadata.row_group(group).num_rows
            if number + rows <= wanted.first:
                number += rows
                continue
            for batch in parquet.iter_batches(PARQUET_ROWS, [group], columns):
                for row in range(batch.num_rows):
                    if wanted.includes(number):
                        yield Entry(number, *_row(batch, row, fields))
                    number += 1
    except (pa.ArrowException, OSError):
        if wanted.includes(number):
            yield Entry(number, None, "damaged_shard")


def _row(batch: Any, row: int, fields: Fields) -> tuple[Any, str]:
    try:
        return usable({name: batch[name][row].as_py() for name in batch.schema.names}, fields)
    except UnicodeDecodeError:
        return None, "not_utf8"


def document_line(document: dict) -> bytes:
    """The line of a document, without its end."""
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


class ShardWriter:
    """Writes lines to `folder/00000.jsonl.zst`, ...: `shard_bytes` of them in a shard at most, or a single line."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        folder.mkdir(parents=True)
        self.folder, self.shard_bytes = folder, shard_bytes
        self.files: list[dict[str, str | int]] = []
        self._lines: list[bytes] = []
        self._size = 0

    def write(self, line: bytes) -> None:
        if self._size + len(line) + 1 > self.shard_bytes:
            self.close()
        self._lines.append(line + b"\n")
        self._size += len(line) + 1
        if self._size >= self.shard_bytes:
            self.close()

    def close(self) -> None:
        """Finish the open shard, if any."""
        if not self._lines:
            return
        path = self.folder / f"{len(self.files):05d}{SUFFIX}"
        data = zstandard.ZstdCompressor(level=9, write_checksum=True).compress(b"".join(self._lines))
        with path.open("xb") as file:
            file.write(data)
            os.fsync(file.fileno())
        self.files.append(
            {
                "name": f"{self.folder.name}/{path.name}",
                "documents": len(self._lines),
                "bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
            }
        )
        self._lines, self._size = [], 0
