"""Where the shards of a corpus are: folders and patterns, local or at a URL, and datasets of the Hugging Face hub.

Promises: the shards of a split and their order are the same wherever they are stored; a failing connection is retried
with growing pauses, then raises one error that names the shard. Costs: one listing per split (its sizes go into the
fingerprint), one request per block of a remote shard.
"""

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from clippy_train.config import DataConfig, FilterConfig, SourceConfig
from clippy_train.errors import ClippyError, DataError
from clippy_train.shards.filters import require_rules
from clippy_train.shards.format import (
    ALL_LINES,
    FILTERED,
    SUFFIXES,
    Entry,
    Fields,
    Selection,
    document_entry,
    read_documents,
)
from clippy_train.shards.retry import HTTP, RetriedFile, error_summary, filesystem, retried

PLACEHOLDER = "{split}"
MANIFEST = "manifest.json"
PROBED_LINES = 10_000

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Corpus(ABC):
    """One split of a corpus: its shards in a fixed order.

    Attributes:
        place: the key and value that say where the split is, for messages.
        shards: a name for each shard, for messages.
        fingerprint: changes when the shards do, but not when they are moved.
    """

    place: str
    shards: tuple[str, ...]
    fingerprint: str
    fields: Fields

    def documents(self, shard: int, start: int = 0, stride: int = 1, residue: int = 0) -> Iterator[Entry]:
        """Lines of a shard from `start` on whose number is `residue` modulo `stride`; see `format.read_documents`.

        Lines that cannot be used are counted and logged once, after the last line; a damaged shard counts with all its
        lost documents.

        Raises:
            DataError: the shard cannot be read at all, or its connection keeps failing.
        """
        rejected: Counter[str] = Counter()
        for entry in self._entries(shard, Selection(start, stride, residue)):
            if entry.reason == "damaged_shard":
                entry = entry._replace(documents=max(1, self._length(shard) - entry.number))
            if entry.reason and entry.reason not in FILTERED:
                rejected[entry.reason] += entry.documents
            yield entry
        if rejected:
            share = f" (every {stride}th line)" if stride > 1 else ""
            level = logging.WARNING if "damaged_shard" in rejected else logging.INFO
            log.log(level, "%s%s: lines skipped: %s", self.shards[shard], share, format_counts(rejected))

    def texts(self) -> Iterator[str]:
        """Every usable text, in on-disk order."""
        for shard in range(len(self.shards)):
            yield from (entry.text for entry in self.documents(shard) if entry.text is not None)

    @abstractmethod
    def _entries(self, shard: int, selection: Selection) -> Iterator[Entry]: ...

    def _length(self, shard: int) -> int:
        """How many documents a damaged shard should have; 0 if that is not known."""
        return 0

    def about(self) -> dict[str, Any]:
        """What the corpus's manifest says about it, without the list of its files; empty if it has none."""
        return {}


@dataclass(frozen=True)
class FileCorpus(Corpus):
    """Shards are files, each named by its path or URL.

    Attributes:
        sizes: bytes of each shard.
        lengths: documents of the shards that the manifest knows.
        manifest: content of the manifest; empty if there is none.
    """

    sizes: tuple[int, ...] = ()
    lengths: Mapping[str, int] = field(default_factory=dict)
    manifest: bytes = b""

    def _entries(self, shard: int, selection: Selection) -> Iterator[Entry]:
        name = self.shards[shard]
        with RetriedFile(name, f"{self.place}: {name}") as file:
            yield from read_documents(file, name, self.fields, selection)

    def _length(self, shard: int) -> int:
        """By the manifest, or else by the shard's size and the first shard that is whole."""
        if (known := self.lengths.get(self.shards[shard])) is not None:
            return known
        return round(self.sizes[shard] * self._documents_per_byte) if self.sizes else 0

    def about(self) -> dict[str, Any]:
        try:
            content = json.loads(self.manifest)
            return {name: value for name, value in content.items() if name != "files"}
        except (ValueError, AttributeError):
            return {}

    @cached_property
    def _documents_per_byte(self) -> float:
        for shard, size in enumerate(self.sizes):
            reasons = [entry.reason for entry in self._entries(shard, ALL_LINES)]
            if reasons and reasons[-1] != "damaged_shard":
                return len(reasons) / size
        return 0.0


@dataclass(frozen=True)
class HubCorpus(Corpus):
    """Shards are those of a streaming `datasets` dataset; lines are its examples. Skipped examples are read, too."""

    dataset: Any

    def _entries(self, shard: int, selection: Selection) -> Iterator[Entry]:
        number = selection.first
        try:
            for example in self.dataset.shard(num_shards=len(self.shards), index=shard).skip(number):
                if selection.includes(number):
                    yield document_entry(number, example, self.fields)
                number += 1
        except OSError as error:
            raise DataError(f"{self.place}: {self.shards[shard]} cannot be read: {error_summary(error)}") from error
        except ValueError:  # from a parser; the examples that it had read ahead are lost with the rest
            if selection.includes(number):
                yield Entry(number, None, "damaged_shard")


def open_corpus(
    data: SourceConfig, split: str, with_meta: bool = False, section: str = "data", prompt_column: str | None = None
) -> Corpus:
    """Find the shards of `train`, `validation` or `test`; with `with_meta`, entries have their Code Clippy meta.

    Args:
        section: of the keys of `data`, for messages.
        prompt_column: field of the prompt that a text continues, if the documents have one.

    Raises:
        ConfigError: a rule of `data.filter` cannot be followed.
        DataError: the place does not exist or has no shards; the message names the key and the fix.
    """
    _require_rules(data.filter, section)
    rules = data.filter if data.filter != FilterConfig() else None
    fields = Fields(data.text_column, rules, with_meta, prompt_column)
    name = data.validation_split if isinstance(data, DataConfig) and split == "validation" else split
    return _open_hub(data, name, fields, section) if data.hub else _open_files(str(data.path), name, fields, section)


def _require_rules(rules: FilterConfig, section: str) -> None:
    """`require_rules`, whose messages begin with `filter`, for the rules of a section."""
    try:
        require_rules(rules)
    except ClippyError as error:
        raise type(error)(f"{section}.{error}") from error


def require_text(corpus: Corpus, section: str = "data") -> None:
    """Check the first lines of a split, so that a corpus in another format is refused before anything starts.

    Args:
        section: of the corpus's keys, for messages; empty if they are in none.

    Raises:
        DataError: none of them can be used; the message says why and names the keys.
    """
    text_key = f"{section}.text_column".removeprefix(".")
    reasons: Counter[str] = Counter()
    entries = chain.from_iterable(map(corpus.documents, range(len(corpus.shards))))
    for entry in islice(entries, PROBED_LINES):
        if entry.text is not None:
            return
        reasons[entry.reason] += 1
    raise DataError(
        f"{corpus.place}: no document can be read (first lines: {format_counts(reasons)}); each line must be a "
        f"JSON object (in parquet, a row) with its text under {text_key}={corpus.fields.text}"
        + (f" and its prompt under data.prompt_column={corpus.fields.prompt}" if corpus.fields.prompt else "")
        + (f", and must pass the rules of {section}.filter" if corpus.fields.rules else "")
    )


def format_counts(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.most_common()) or "none"


def _open_files(path: str, split: str, fields: Fields, section: str) -> FileCorpus:
    is_folder = PLACEHOLDER not in path
    root, _, rest = path.partition(PLACEHOLDER)
    root = root.rstrip("/") + "/" if is_folder else root
    where, place = f"{root}{split}{rest}", f"{section}.path={path}"
    try:
        fs = filesystem(path)
    except (ImportError, ValueError, OSError) as error:  # unknown protocol, missing package, or unknown host
        raise DataError(f"{place} cannot be opened: {error_summary(error)}") from error

    manifest = _read_manifest(fs, root, place) if is_folder else b""
    sizes = _in_manifest(manifest, root, split, "bytes") if path.startswith(HTTP) else None
    if sizes is None:
        glob = not is_folder and (where.endswith(SUFFIXES) or fsspec.core.has_magic(where))
        sizes = _list_files(fs, fs.glob if glob else fs.ls, where, place)
    sizes = {name: size for name, size in sorted(sizes.items()) if name.endswith(SUFFIXES)}
    if not any(sizes.values()):
        if is_folder and "://" not in path and not fs.isdir(path):
            raise DataError(f"{place}: no such folder. Make one with `clippy corpus SRC... out={path}`")
        raise DataError(f"{place}: no shard with content in {where} ({', '.join(f'*{each}' for each in SUFFIXES)})")

    prefix = _path_or_url(fs, root)
    listing = "".join(f"{name.removeprefix(prefix).lstrip('/')}\0{size}\n" for name, size in sizes.items())
    fingerprint = hashlib.sha256(listing.encode() + manifest).hexdigest()
    documents = _in_manifest(manifest, root, split, "documents") or {}
    lengths = {_path_or_url(fs, name): number for name, number in documents.items()}
    place = f"{section}.path={where}"
    return FileCorpus(place, tuple(sizes), fingerprint, fields, tuple(sizes.values()), lengths, manifest)


def _read_manifest(fs: Any, root: str, place: str) -> bytes:
    try:
        content: bytes = retried(fs.cat_file, root + MANIFEST, what=f"{place}: {MANIFEST}")
    except (FileNotFoundError, NotADirectoryError):
        return b""
    return content


def _in_manifest(manifest: bytes, root: str, split: str, number: str) -> dict[str, int] | None:
    """A number of each shard of a split, `bytes` or `documents`, if `manifest` is one of `clippy corpus`."""
    try:
        return {root + file["name"]: int(file[number]) for file in json.loads(manifest)["files"][split]}
    except (ValueError, KeyError, TypeError):
        return None


def _list_files(fs: Any, lister: Callable[..., Any], where: str, place: str) -> dict[str, int]:
    """Files in a folder, or files that match a pattern, with their sizes."""
    try:
        found = retried(lister, where, detail=True, what=f"{place}: the listing of {where}")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    infos = found.values() if isinstance(found, dict) else found
    return {_path_or_url(fs, info["name"]): _size(fs, info, place) for info in infos if info["type"] != "directory"}


def _size(fs: Any, info: dict[str, Any], place: str) -> int:
    """The size of a listed file; HTTP listings lack it."""
    if info["size"] is not None:
        return int(info["size"])
    return int(retried(fs.size, info["name"], what=f"{place}: {info['name']}") or 0)


def _path_or_url(fs: Any, name: str) -> str:
    """A file's path, or its URL if it is remote."""
    stripped = fs._strip_protocol(name)
    return str(stripped if _is_local(fs) else fs.unstrip_protocol(stripped))


def _is_local(fs: Any) -> bool:
    return isinstance(fs, LocalFileSystem)


def _open_hub(data: SourceConfig, split: str, fields: Fields, section: str) -> HubCorpus:
    import datasets

    name, _, revision = str(data.hub).partition("@")
    key = f"{section}.hub={data.hub}"
    try:
        builder = datasets.load_dataset_builder(name, data.hub_config, revision=revision or None)
        streams = builder.as_streaming_dataset()
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{key} cannot be opened: {error_summary(error)}") from error
    if split not in streams:
        raise DataError(
            f"{key} has no split {split} (it has {', '.join(streams)}): name one with data.validation_split, or make a "
            f"corpus with these splits: `clippy corpus hub={data.hub} out=DIR`"
        )
    stream, files = streams[split], builder.config.data_files[split]
    columns = fields.columns(stream.column_names or [fields.text])
    if fields.text not in columns:
        raise DataError(
            f"{key} has no column {section}.text_column={fields.text}; it has {', '.join(stream.column_names)}"
        )
    count = stream.num_shards
    shards = files if len(files) == count else [f"shard {number} of {count}" for number in range(count)]
    identity = json.dumps([list(files), files.origin_metadata, data.hub_config, split, count])
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()
    return HubCorpus(f"{key} {split}", tuple(shards), fingerprint, fields, stream.select_columns(columns))
