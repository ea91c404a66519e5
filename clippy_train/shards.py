"""Shards on disk: `*.jsonl.zst`, one document a line, `{"text": ..., "meta": {...}}`; written by corpus, read by data.

Promises: a line that cannot be used is counted by reason and skipped; a damaged or cut shard is told from a complete
one (a cut zstd stream looks like a normal end of file to most readers); rejected content is never shown. Memory is
bounded by the longest line. Reading costs about 1/100 of tokenising.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import zstandard

from clippy_train.errors import ConfigError, DataError

SPLITS = ("train", "validation", "test")
SUFFIX = ".jsonl.zst"
READ_BYTES = 1 << 12  # small: zstd can make 32,000 times as much of it, and a damaged block takes its whole read along
MAX_LINE_BYTES = 1 << 27  # 128 MiB: longer lines are skipped as `too_long` without being held in memory

PROBED_LINES = 1000

# Why a line, or the rest of a shard, was not used.
REASONS = ("not_json", "no_text", "not_utf8", "too_long", "damaged_shard")


@dataclass(frozen=True)
class Corpus:
    """One split of a corpus: its shards in a fixed order and a fingerprint that changes when they do."""

    shards: tuple[Path, ...]
    fingerprint: str


def open_corpus(root: Path, split: str) -> Corpus:
    """Find the shards of a split.

    Raises:
        DataError: no such folder, or no shard in it; the message names the key and the fix.
    """
    folder = root / split
    if not root.is_dir():
        raise DataError(f"data.path={root}: no such folder. Make one with `clippy corpus SRC... out={root}`")
    shards = tuple(sorted(folder.glob(f"*{SUFFIX}")))
    if not any(shard.stat().st_size for shard in shards):
        raise DataError(f"data.path={root}: no *{SUFFIX} shard with content in {folder}")
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(f"{split}/{shard.name}\0{shard.stat().st_size}\n".encode())
    manifest = root / "manifest.json"
    if manifest.is_file():
        digest.update(manifest.read_bytes())
    return Corpus(shards, digest.hexdigest())


def require_text(corpus: Corpus, column: str) -> None:
    """Look at the first lines of a split, so that a corpus of another format is refused before anything starts.

    Raises:
        DataError: none of them can be used; the message says why and names the keys.
    """
    reasons: Counter[str] = Counter()
    lines = chain.from_iterable(documents(shard, column) for shard in corpus.shards)
    for _, text, reason in islice(lines, PROBED_LINES):
        if text is not None:
            return
        reasons[reason] += 1
    raise DataError(
        f"data.path: no document can be read from {corpus.shards[0].parent} (first lines: {dict(reasons)}); "
        f"each line must be a JSON object with its text under data.text_column={column}"
    )


class ShardWriter:
    """Writes documents to `folder/00000.jsonl.zst`, ..., a new shard once `shard_bytes` of lines are in one."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        folder.mkdir(parents=True)
        self.folder, self.shard_bytes = folder, shard_bytes
        self.files: list[dict[str, str | int]] = []
        self._lines: list[bytes] = []
        self._size = 0

    def write(self, document: dict) -> None:
        line = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        self._lines.append(line)
        self._size += len(line)
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


def documents(
    shard: Path, column: str, start: int = 0, stride: int = 1, residue: int = 0
) -> Iterator[tuple[int, str | None, str]]:
    """Lines of a shard as (line number, text or None, reason), where the reason is empty for a good line.

    Only lines from `start` on whose number is `residue` modulo `stride` are parsed and returned; blank lines never.
    A damaged or cut shard ends with one `damaged_shard` entry, after every line that could be read.
    """
    for number, line in enumerate(_lines(shard)):
        if number < start or number % stride != residue:
            continue
        if isinstance(line, str):
            yield number, None, line
        elif line.strip():
            yield number, *parse(line, column)


def parse(line: bytes, column: str) -> tuple[str | None, str]:
    """The text of a document line and an empty reason, or None and the reason why it cannot be used."""
    try:
        document = json.loads(line)
    except UnicodeDecodeError:
        return None, "not_utf8"
    except (ValueError, RecursionError):
        return None, "not_json"
    text = document.get(column) if isinstance(document, dict) else None
    if not isinstance(text, str) or not text:
        return None, "no_text"
    try:
        text.encode()  # a lone surrogate is valid JSON, but no tokenizer takes it
    except UnicodeEncodeError:
        return None, "not_utf8"
    return text, ""


def _lines(shard: Path) -> Iterator[bytes | str]:
    """Lines without their end; a `str` is the reason why what stood there is lost."""
    pending: list[bytes] = []  # pieces of the current line
    size = 0
    damaged = False
    for chunk in _decompressed(shard):
        if chunk is None:
            damaged = True
            break
        first, *others = chunk.split(b"\n")
        for index, piece in enumerate((first, *others)):
            if index:
                yield "too_long" if size > MAX_LINE_BYTES else b"".join(pending)
                pending, size = [], 0
            size += len(piece)
            if size <= MAX_LINE_BYTES:
                pending.append(piece)
    if damaged:
        yield "damaged_shard"  # whatever is pending is the first part of a line
    elif size:
        yield "too_long" if size > MAX_LINE_BYTES else b"".join(pending)


def _decompressed(shard: Path) -> Iterator[bytes | None]:
    """Decompressed chunks over all frames of a file; a last None says that the stream was damaged or cut."""
    decoder = zstandard.ZstdDecompressor().decompressobj()
    fresh = True  # at the start of a frame: the only place where a file may end
    with shard.open("rb") as file:
        while data := file.read(READ_BYTES):
            while data:
                try:
                    chunk = decoder.decompress(data)
                except zstandard.ZstdError:
                    yield None
                    return
                if chunk:
                    yield chunk
                fresh, data = False, b""
                if decoder.eof:
                    data, fresh = decoder.unused_data, True
                    decoder = zstandard.ZstdDecompressor().decompressobj()
    if not fresh:
        yield None


@contextmanager
def new_folder(path: Path, setting: str) -> Iterator[Path]:
    """Fill a new folder: yields one aside that becomes `path` when the block ends, and is removed if it raises.

    Raises:
        ConfigError: `path` holds something; nothing is ever overwritten.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{setting}={path} exists and is not empty: choose another folder or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield aside
        aside.chmod(0o777 & ~_umask())
        aside.rename(path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
