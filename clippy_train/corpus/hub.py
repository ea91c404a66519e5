"""A dataset -> documents: a local folder of shards, or a `datasets` dataset of the hub.

Promises: streamed, never downloaded as a whole; rows in the dataset's order; no code of the dataset runs; a row of a
local shard that cannot be used is counted by reason. Memory: of the hub's jsonl 10 MB chunks; of its parquet, what
Arrow decodes ahead of a slower reader, at most 1 GiB.
"""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from clippy_train.config import CorpusConfig
from clippy_train.corpus.document import Document, Rejected
from clippy_train.corpus.folders import mime_type
from clippy_train.corpus.languages import language_of
from clippy_train.errors import DataError, first_line
from clippy_train.shards.format import SPLITS, SUFFIXES, Entry, Fields, document_entry
from clippy_train.shards.sources import FileCorpus, require_text

UNNAMED_REPOSITORIES = 4096  # shared by the rows that name no repository, so memory does not grow with the rows


def dataset_shards(config: CorpusConfig) -> list[str]:
    """The shards of the dataset `hub` if it is a local folder; one of the hub is read as a whole, and has none.

    Raises:
        DataError: no document can be read from the first lines.
    """
    folder = Path(str(config.hub), config.hub_config or "")
    paths = sorted(str(path) for path in folder.rglob("*") if path.name.endswith(SUFFIXES) and path.is_file())
    shards = _of_split(folder, paths, config.hub_split)
    if shards:
        require_text(_local_corpus(config, shards), section="")
    return shards


def hub_documents(config: CorpusConfig, shard: str | None = None) -> Iterator[Document]:
    """Every row of one local shard, or of the dataset on the hub, with the meta that `filters.code_clippy_meta` finds;
    a language or MIME type that the dataset lacks comes from the file name and the text.

    Raises:
        DataError: it cannot be opened, has no column `text_column`, or cannot be read to its end.
    """
    entries = _local_corpus(config, [shard]).documents(0) if shard else _hub_entries(config)
    place = f"{Path(shard).relative_to(str(config.hub))} " if shard else ""
    for entry in entries:
        unnamed = f"rows {entry.number % UNNAMED_REPOSITORIES} modulo {UNNAMED_REPOSITORIES}"
        repository = entry.meta["repo_name"] if entry.meta else None
        yield Document(f"{place}row {entry.number}", repository or unnamed, partial(_read, entry))


def _read(entry: Entry) -> tuple[str, dict[str, Any]]:
    if entry.text is None or entry.meta is None:
        raise Rejected(entry.reason)
    name = entry.meta["file_name"] or ""
    language = entry.meta["repo_language"] or language_of(name, entry.text)
    return entry.text, {
        **entry.meta,
        "repo_language": language,
        "mime_type": entry.meta["mime_type"] or mime_type(name),
    }


def _of_split(folder: Path, paths: list[str], split: str) -> list[str]:
    """The shards of a split: those with its name as the first word of their own name or of a folder, as in
    `data/train-00000.parquet`; without any such names, all are `train`."""
    words = [{re.split(r"[^a-z]", part)[0] for part in Path(path).relative_to(folder).parts} for path in paths]
    if split == "train" and not any(each.intersection(SPLITS) for each in words):
        return paths
    return [path for path, each in zip(paths, words, strict=True) if split in each]


def _local_corpus(config: CorpusConfig, shards: list[str]) -> FileCorpus:
    return FileCorpus(f"hub={config.hub}", tuple(shards), "", Fields(config.text_column, with_meta=True))


def _hub_entries(config: CorpusConfig) -> Iterator[Entry]:
    fields = Fields(config.text_column, with_meta=True)
    for number, row in enumerate(_rows(config)):
        if number == 0 and config.text_column not in row:
            raise DataError(
                f"text_column={config.text_column}: hub={config.hub} has no such column; it has {', '.join(row)}"
            )
        yield document_entry(number, row, fields)


def _rows(config: CorpusConfig) -> Iterator[dict[str, Any]]:
    import datasets

    name, _, revision = str(config.hub).partition("@")
    if name.startswith((".", "/")) and not Path(name).is_dir():
        raise DataError(f"hub={config.hub}: no such folder")
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs content that it cannot parse
    errors = (OSError, ValueError, TypeError, RuntimeError, datasets.exceptions.DatasetsError)
    try:
        rows = datasets.load_dataset(
            name, config.hub_config, revision=revision or None, split=config.hub_split, streaming=True
        )
    except errors as error:
        raise DataError(f"hub={config.hub} cannot be opened: {first_line(error)}") from error
    read = 0
    try:
        for row in rows:
            yield row
            read += 1
    except errors as error:  # its message may quote the row
        raise DataError(f"hub={config.hub} cannot be read beyond row {read}: {type(error).__name__}") from None
