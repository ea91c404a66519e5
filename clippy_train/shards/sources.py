"""Where the shards of a corpus lie: folders and patterns, local or behind a URL, and datasets of the Hugging Face hub.

Promises: the shards of a split and their order are the same wherever they lie; a failing connection is tried again,
with growing pauses, and ends in one error that names the shard. Costs: one listing for a split (its sizes go into the
fingerprint), one request for a block of a shard that is not local.
"""

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from clippy_train.config import DataConfig, FilterConfig, SourceConfig
from clippy_train.errors import DataError
from clippy_train.shards.format import FILTERED, SUFFIXES, Entry, Fields, Selection, documents, usable
from clippy_train.shards.retry import HTTP, RetriedFile, described_error, filesystem, retried

PLACEHOLDER = "{split}"
MANIFEST = "manifest.json"
PROBED_LINES = 10_000

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Corpus(ABC):
    """One split of a corpus: its shards in a fixed order.

    Attributes:
        place: the key and value that say where the split lies, for messages.
        shards: a name for each shard, for messages.
        fingerprint: changes when the shards do, and not with the place.
    """

    place: str
    shards: tuple[str, ...]
    fingerprint: str
    fields: Fields

    def documents(self, shard: int, start: int = 0, stride: int = 1, residue: int = 0) -> Iterator[Entry]:
        """Lines of a shard from `start` on whose number is `residue` modulo `stride`; see `shards.documents`.

        What cannot be used is logged once, when the last line was read.

        Raises:
            DataError: the shard cannot be read at all, or its connection fails for good.
        """
        rejected: Counter[str] = Counter()
        for entry in self._entries(shard, Selection(start, stride, residue)):
            if entry.reason and entry.reason not in FILTERED:
                rejected[entry.reason] += 1
            yield entry
        if rejected:
            share = f" (every {stride}th line)" if stride > 1 else ""
            level = logging.WARNING if "damaged_shard" in rejected else logging.INFO
            log.log(level, "%s%s: lines skipped: %s", self.shards[shard], share, described(rejected))

    def texts(self) -> Iterator[str]:
        """Every usable text, as they lie."""
        for shard in range(len(self.shards)):
            yield from (text for _, text, _ in self.documents(shard) if text is not None)

    @abstractmethod
    def _entries(self, shard: int, wanted: Selection) -> Iterator[Entry]: ...


@dataclass(frozen=True)
class FileCorpus(Corpus):
    """Shards are files, each named by its path or URL."""

    def _entries(self, shard: int, wanted: Selection) -> Iterator[Entry]:
        name = self.shards[shard]
        with RetriedFile(name, f"{self.place}: {name}") as file:
            yield from documents(file, name, self.fields, wanted)


@dataclass(frozen=True)
class HubCorpus(Corpus):
    """Shards are those of a streaming `datasets` dataset; lines are its examples. Skipping reads what is skipped."""

    dataset: Any

    def _entries(self, shard: int, wanted: Selection) -> Iterator[Entry]:
        number = wanted.first
        try:
            for example in self.dataset.shard(num_shards=len(self.shards), index=shard).skip(number):
                if wanted.includes(number):
                    yield Entry(number, *usable(example, self.fields))
                number += 1
        except OSError as error:
            raise DataError(f"{self.place}: {self.shards[shard]} cannot be read: {described_error(error)}") from error
        except ValueError:  # of a parser; the examples that it had read ahead are lost with the rest
            if wanted.includes(number):
                yield Entry(number, None, "damaged_shard")


def open_corpus(data: SourceConfig, split: str, described: bool = False) -> Corpus:
    """Find the shards of `train`, `validation` or `test`; `described` ones give documents with their meta.

    Raises:
        DataError: there is nothing, or no shard in it; the message names the key and the fix.
    """
    fields = Fields(data.text_column, data.filter if data.filter != FilterConfig() else None, described)
    name = data.validation_split if isinstance(data, DataConfig) and split == "validation" else split
    return _open_hub(data, name, fields) if data.hub else _open_files(str(data.path), name, fields)


def require_text(corpus: Corpus) -> None:
    """Look at the first lines of a split, so that a corpus of another format is refused before anything starts.

    Raises:
        DataError: none of them can be used; the message says why and names the keys.
    """
    reasons: Counter[str] = Counter()
    lines = chain.from_iterable(map(corpus.documents, range(len(corpus.shards))))
    for _, text, reason in islice(lines, PROBED_LINES):
        if text is not None:
            return
        reasons[reason] += 1
    raise DataError(
        f"{corpus.place}: no document can be read (first lines: {described(reasons)}); each line must be a JSON object "
        f"(in parquet, a row) with its text under data.text_column={corpus.fields.text}"
        + (", and must keep the rules of data.filter" if corpus.fields.rules else "")
    )


def described(reasons: Counter[str]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common()) or "none"


def _open_files(path: str, split: str, fields: Fields) -> FileCorpus:
    is_folder = PLACEHOLDER not in path
    root, _, rest = path.partition(PLACEHOLDER)
    root = root.rstrip("/") + "/" if is_folder else root
    where, place = f"{root}{split}{rest}", f"data.path={path}"
    try:
        fs = filesystem(path)
    except (ImportError, ValueError, OSError) as error:  # no such protocol, its package is missing, or no such host
        raise DataError(f"{place} cannot be opened: {described_error(error)}") from error

    manifest = _manifest(fs, root, place) if is_folder else b""
    sizes = _listed_in(manifest, root, split) if path.startswith(HTTP) else None
    if sizes is None:
        glob = not is_folder and (where.endswith(SUFFIXES) or fsspec.core.has_magic(where))
        sizes = _listing(fs, fs.glob if glob else fs.ls, where, place)
    sizes = {name: size for name, size in sorted(sizes.items()) if name.endswith(SUFFIXES)}
    if not any(sizes.values()):
        if is_folder and "://" not in path and not fs.isdir(path):
            raise DataError(f"{place}: no such folder. Make one with `clippy corpus SRC... out={path}`")
        raise DataError(f"{place}: no shard with content in {where} ({', '.join(f'*{each}' for each in SUFFIXES)})")

    prefix = _absolute(fs, root)
    listing = "".join(f"{name.removeprefix(prefix).lstrip('/')}\0{size}\n" for name, size in sizes.items())
    fingerprint = hashlib.sha256(listing.encode() + manifest).hexdigest()
    return FileCorpus(f"data.path={where}", tuple(sizes), fingerprint, fields)


def _manifest(fs: Any, root: str, place: str) -> bytes:
    try:
        return retried(fs.cat_file, root + MANIFEST, what=f"{place}: {MANIFEST}")
    except FileNotFoundError:
        return b""


def _listed_in(manifest: bytes, root: str, split: str) -> dict[str, int] | None:
    """Shards of a split and their sizes by the manifest of `clippy corpus`; None where there is none."""
    try:
        return {root + file["name"]: int(file["bytes"]) for file in json.loads(manifest)["files"][split]}
    except (ValueError, KeyError, TypeError):
        return None


def _listing(fs: Any, lister: Callable[..., Any], where: str, place: str) -> dict[str, int]:
    """Files of a folder, or those that match a pattern, with their sizes."""
    try:
        found = retried(lister, where, detail=True, what=f"{place}: the listing of {where}")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    infos = found.values() if isinstance(found, dict) else found
    return {_absolute(fs, info["name"]): _size(fs, info, place) for info in infos if info["type"] != "directory"}


def _size(fs: Any, info: dict[str, Any], place: str) -> int:
    """The size of a listed file; listings over HTTP do not tell."""
    if info["size"] is not None:
        return int(info["size"])
    return int(retried(fs.size, info["name"], what=f"{place}: {info['name']}") or 0)


def _absolute(fs: Any, name: str) -> str:
    """A file's path, or its URL where it is not local."""
    stripped = fs._strip_protocol(name)
    return stripped if _is_local(fs) else fs.unstrip_protocol(stripped)


def _is_local(fs: Any) -> bool:
    return isinstance(fs, LocalFileSystem)


def _open_hub(data: SourceConfig, split: str, fields: Fields) -> HubCorpus:
    import datasets

    name, _, revision = str(data.hub).partition("@")
    key = f"data.hub={data.hub}"
    try:
        builder = datasets.load_dataset_builder(name, data.hub_config, revision=revision or None)
        streams = builder.as_streaming_dataset()
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{key} cannot be opened: {described_error(error)}") from error
    if split not in streams:
        raise DataError(
            f"{key} has no split {split} (it has {', '.join(streams)}): name one with data.validation_split, or make a "
            f"corpus that has the splits with `clippy corpus hub={data.hub} out=DIR`"
        )
    stream, files = streams[split], builder.config.data_files[split]
    columns = fields.columns(stream.column_names or [fields.text])
    if fields.text not in columns:
        raise DataError(f"{key} has no column data.text_column={fields.text}; it has {', '.join(stream.column_names)}")
    count = stream.num_shards
    shards = files if len(files) == count else [f"shard {number} of {count}" for number in range(count)]
    identity = json.dumps([list(files), files.origin_metadata, data.hub_config, split, count])
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()
    return HubCorpus(f"{key} {split}", tuple(shards), fingerprint, fields, stream.select_columns(columns))
