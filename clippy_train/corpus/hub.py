"""A `datasets` dataset -> documents: from the hub by name, or from a local folder of jsonl, parquet, ...

Promises: streamed, never downloaded as a whole; rows in the dataset's order; no code of the dataset runs. Memory: 10 MB
chunks of jsonl; of parquet, what Arrow decodes ahead of a slower reader, at most 1 GiB.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from clippy_train.config import CorpusConfig
from clippy_train.corpus.document import Document, Rejected
from clippy_train.corpus.folders import mime_type
from clippy_train.corpus.languages import language_of
from clippy_train.errors import DataError
from clippy_train.shards.filters import code_clippy_meta

UNNAMED_REPOSITORIES = 4096  # shared by the rows that name no repository, so memory does not grow with the rows


def hub_documents(config: CorpusConfig) -> Iterator[Document]:
    """Every row of the dataset `hub`, with the meta that `filters.code_clippy_meta` finds; a language or MIME type that
    the dataset lacks comes from the file name.

    Raises:
        DataError: it cannot be opened, has no column `text_column`, or cannot be read to its end.
    """
    for number, row in enumerate(_rows(config)):
        if number == 0 and config.text_column not in row:
            raise DataError(
                f"text_column={config.text_column}: hub={config.hub} has no such column; it has {', '.join(row)}"
            )
        meta = code_clippy_meta(row)
        repository = meta["repo_name"] or f"rows {number % UNNAMED_REPOSITORIES} modulo {UNNAMED_REPOSITORIES}"
        yield Document(f"row {number}", repository, partial(_read, row[config.text_column], meta))


def _read(value: Any, meta: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    text, name = _text(value), meta["file_name"] or ""
    meta["repo_language"] = meta["repo_language"] or language_of(name, text)
    meta["mime_type"] = meta["mime_type"] or mime_type(name)
    return text, meta


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise Rejected("no_text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Rejected("not_utf8") from None
    return value


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
        raise DataError(f"hub={config.hub} cannot be opened: {str(error).strip().splitlines()[0]}") from error
    read = 0
    try:
        for row in rows:
            yield row
            read += 1
    except errors as error:  # its message may quote the row
        raise DataError(f"hub={config.hub} cannot be read beyond row {read}: {type(error).__name__}") from None
