"""One shard of a corpus (JSON lines, plain or compressed, or parquet): bytes -> documents; and how we write one.

A document is a JSON object on a line, or a parquet row: `{"text": ..., "meta": {...}}`. Promises: what cannot be used
is counted by reason and skipped; a damaged or truncated shard is detected (most readers take the end of a truncated
zstd stream for the end of the file); rejected content is never shown. Memory is bounded by the longest line and the
window that a zstd stream asks for, or by 16 parquet rows. Reading costs about 1/100 of tokenising; skipping lines costs
their decompression.
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
from clippy_train.shards.redact import redacted

SPLITS = ("train", "validation", "test")
SUFFIX = ".jsonl.zst"  # what is written
LINES = (".jsonl", ".ndjson")
SUFFIXES = (
    *LINES,
    *(f"{lines}{end}" for lines in (*LINES, ".json") for end in (".zst", ".gz")),
    ".parquet",
)  # are read
ZSTD_WINDOW = 1 << 31  # bytes: the largest of `zstd --ultra --long=31`; a reader holds what the stream asks for
READ_BYTES = 1 << 20  # per read: one request, if the shard is remote
FEED_BYTES = 1 << 12  # per decompressor call: zstd can make 32,000 times as much, and damage loses the whole feed
MAX_LINE_BYTES = 1 << 27  # 128 MiB: longer lines are skipped as `too_long` without being held in memory
PARQUET_ROWS = 16  # decoded at once

# Why a line, or the rest of a shard, could not be used.
REASONS = ("not_json", "no_text", "not_utf8", "too_long", "damaged_shard")

# Why a document was excluded on purpose: the rule of data.filter that it breaks.
FILTERED = tuple(f"filtered/{rule}" for rule in RULES)


class Entry(NamedTuple):
    """A line or row of a shard: its text, or the reason why it cannot be used."""

    number: int  # from 0
    text: str | None
    reason: str  # "" if there is a text
    meta: dict[str, Any] | None = None  # Code Clippy meta, if `Fields.with_meta`
    documents: int = 1  # lost ones, if the rest of a shard is
    prompt: str = ""  # what the text continues, if `Fields.prompt`


class ByteFile(Protocol):
    """A file open for reading bytes; parquet also needs `seek` and `tell`."""

    def read(self, size: int) -> bytes: ...


@dataclass(frozen=True)
class Fields:
    """Which field of a document is its text, the rules that documents must pass (None: all do), whether their meta is
    wanted too, and which field is the prompt that the text continues, if there is one."""

    text: str = "text"
    rules: FilterConfig | None = None
    with_meta: bool = False
    prompt: str | None = None

    def columns(self, names: list[str]) -> list[str]:
        """Those of a table's columns that are needed."""
        needed = {self.text, self.prompt}
        if self.rules or self.with_meta:
            needed |= {"meta", *chain.from_iterable(META_COLUMNS.values())}
        return [name for name in names if name in needed]


@dataclass(frozen=True)
class Selection:
    """The lines to read of a shard: from `start` on, those whose number is `residue` modulo `stride`."""

    start: int = 0
    stride: int = 1
    residue: int = 0

    @property
    def first(self) -> int:
        return self.start + (self.residue - self.start) % self.stride

    def includes(self, number: int) -> bool:
        return number >= self.start and number % self.stride == self.residue


ALL_LINES = Selection()


def read_documents(file: ByteFile, name: str, fields: Fields, selection: Selection = ALL_LINES) -> Iterator[Entry]:
    """The selected lines of an open shard; the suffix of `name` gives its format.

    Blank lines have a number, but are never returned. A damaged or truncated shard ends with one `damaged_shard` entry,
    after every line that could be read.
    """
    if name.endswith(".parquet"):
        yield from _read_parquet(file, fields, selection)
        return
    for number, line in _lines(_chunks(file, name), selection):
        if isinstance(line, str):
            yield Entry(number, None, line)
        elif line and not line.isspace():
            yield line_entry(number, line, fields)


def line_entry(number: int, line: bytes, fields: Fields) -> Entry:
    """The entry of a line of JSON."""
    try:
        document = json.loads(line.removeprefix(codecs.BOM_UTF8).decode())
    except UnicodeDecodeError:
        return Entry(number, None, "not_utf8")
    except (ValueError, RecursionError):
        return Entry(number, None, "not_json")
    return document_entry(number, document, fields)


def document_entry(number: int, document: Any, fields: Fields) -> Entry:
    """The entry of a JSON value or a row, which may be anything."""
    text = document.get(fields.text) if isinstance(document, dict) else None
    prompt = document.get(fields.prompt) if fields.prompt and text else ""
    if not isinstance(text, str) or not text or not isinstance(prompt, str):
        return Entry(number, None, "no_text")
    if len(text) > MAX_LINE_BYTES:
        return Entry(number, None, "too_long")
    try:
        (prompt + text).encode()  # a lone surrogate is valid JSON, but no tokenizer takes it
    except UnicodeEncodeError:
        return Entry(number, None, "not_utf8")
    broken = broken_rule(document, text, fields.rules, prompt) if fields.rules else None
    if broken:
        return Entry(number, None, f"filtered/{broken}")
    if fields.rules and fields.rules.redact:
        text, prompt = (redacted(each, fields.rules.redact)[0] for each in (text, prompt))
    return Entry(number, text, "", code_clippy_meta(document) if fields.with_meta else None, prompt=prompt)


def _lines(chunks: Iterator[bytes | None], selection: Selection) -> Iterator[tuple[int, bytes | str]]:
    """Selected lines without their line ends; a `str` is the reason why a line, or the rest of the shard, is lost.

    Lines that are not selected are counted, but not built.
    """
    number, next_selected = 0, selection.first  # number of the line that the next byte belongs to
    pending: list[bytes] = []  # pieces of a selected line
    size = 0
    for chunk in chunks:
        if chunk is None:
            if number == next_selected:
                yield number, "damaged_shard"  # what is pending is an incomplete line
            return
        ends = chunk.count(b"\n")
        if number + ends < next_selected:
            number += ends
            continue
        begin = 0
        for _ in range(ends):
            end = chunk.index(b"\n", begin)
            if number == next_selected:
                size += end - begin
                yield number, "too_long" if size > MAX_LINE_BYTES else b"".join((*pending, chunk[begin:end]))
                next_selected += selection.stride
                pending, size = [], 0
            number, begin = number + 1, end + 1
        if number == next_selected:
            size += len(chunk) - begin
            if size <= MAX_LINE_BYTES:
                pending.append(chunk[begin:])
    if size:
        yield number, "too_long" if size > MAX_LINE_BYTES else b"".join(pending)


def _chunks(file: ByteFile, name: str) -> Iterator[bytes | None]:
    """Decompressed bytes of a shard; a final None says that its compressed stream is damaged or truncated."""
    blocks = iter(partial(file.read, READ_BYTES), b"")
    if name.endswith(LINES):
        return blocks
    if name.endswith(".gz"):
        return _decompressed(blocks, partial(zlib.decompressobj, zlib.MAX_WBITS | 16))
    return _decompressed(blocks, zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj)


def _decompressed(blocks: Iterator[bytes], new_decoder: Callable[[], Any]) -> Iterator[bytes | None]:
    """Decompressed chunks of all frames (or members) of a file; a final None says that it is damaged or truncated."""
    decoder = new_decoder()
    between_frames = True  # the only place where a file may end
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
                between_frames, data = False, b""
                if decoder.eof:
                    between_frames, data = True, decoder.unused_data
                    decoder = new_decoder()
    if not between_frames:
        yield None


def _read_parquet(file: ByteFile, fields: Fields, selection: Selection) -> Iterator[Entry]:
    """Selected rows of a parquet file; row groups before the first one, and columns not needed, are not read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        parquet = pq.ParquetFile(file, buffer_size=READ_BYTES, page_checksum_verification=True)
        columns = fields.columns(parquet.schema_arrow.names)
        for group in range(parquet.num_row_groups):
            rows = parquet.metadata.row_group(group).num_rows
            if number + rows <= selection.first:
                number += rows
                continue
            for batch in parquet.iter_batches(PARQUET_ROWS, [group], columns):
                for row in range(batch.num_rows):
                    if selection.includes(number):
                        yield _parse_row(number, batch, row, fields)
                    number += 1
    except (pa.ArrowException, OSError):
        if selection.includes(number):
            yield Entry(number, None, "damaged_shard")


def _parse_row(number: int, batch: Any, row: int, fields: Fields) -> Entry:
    try:
        document = {name: batch[name][row].as_py() for name in batch.schema.names}
    except UnicodeDecodeError:
        return Entry(number, None, "not_utf8")
    return document_entry(number, document, fields)


def document_line(document: dict[str, Any]) -> bytes:
    """A document's line in a shard, without the line end."""
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def shard_name(number: int) -> str:
    return f"{number:05d}{SUFFIX}"


class ShardWriter:
    """Writes lines to `folder/00000.jsonl.zst`, ...: at most `shard_bytes` of them per shard, or one longer line.

    Attributes:
        files: `name`, `documents`, `bytes` and `sha256` of each finished shard.
    """

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
        path = self.folder / shard_name(len(self.files))
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
