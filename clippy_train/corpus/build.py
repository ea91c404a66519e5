"""`clippy corpus`: folders of code, or a dataset -> shuffled shards in the Code Clippy format, split by repository.

One path for every source: documents -> rules -> deduplication -> a spool on disk that sorts them by a hash of (seed,
name) -> shards. Promises: the same sources and settings give the same bytes; no repository is in two splits; rejected
documents are counted by rule. Memory does not grow with the text: it holds some 150 bytes per repository and per
folder, what `dedup` remembers of every document, one shard per split, and the longest document. Disk holds the text
twice, compressed, during the shuffle.
"""

import dataclasses
import hashlib
import tempfile
from collections.abc import Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from tqdm import tqdm

from clippy_train.config import CorpusConfig, FilterConfig
from clippy_train.corpus.dedup import DuplicateIndex
from clippy_train.corpus.document import Document, Rejected
from clippy_train.corpus.folders import folder_documents, python_sources
from clippy_train.corpus.hub import hub_documents
from clippy_train.corpus.manifest import VERSION, Tally, write_manifest
from clippy_train.corpus.spool import Spool
from clippy_train.errors import ConfigError, DataError
from clippy_train.files import new_folder
from clippy_train.shards.filters import broken_meta_rule, broken_text_rule
from clippy_train.shards.format import MAX_LINE_BYTES, SPLITS, ShardWriter, document_line


def build_corpus(config: CorpusConfig) -> dict[str, Any]:
    """Write `train/`, `validation/`, `test/` and `manifest.json` to `out`, and return the manifest.

    Raises:
        ConfigError: `out` is not empty, or the fractions leave nothing to train on.
        DataError: a source is missing or unreadable, or there are too few repositories to hold any out.
    """
    held_out = config.validation_fraction + config.test_fraction
    if held_out >= 1:
        raise ConfigError(f"validation_fraction + test_fraction = {held_out}: nothing is left to train on")
    with new_folder(Path(config.out), "out") as out, tempfile.TemporaryDirectory(prefix=".spool", dir=out) as staging:
        spool, tally = Spool(Path(staging, "documents")), Tally()
        repositories = _collect(_documents(config, out), spool, tally, config)
        splits = split_repositories(repositories, tally, config)
        files = _write(out, spool, [splits[name] for name in repositories], tally, config)
        manifest = {
            "version": VERSION,
            "settings": _settings(config),
            "files": files,
            "repositories": {split: list(splits.values()).count(split) for split in SPLITS},
            **tally.counts(),
        }
        write_manifest(out, manifest)
    return manifest


def _documents(config: CorpusConfig, out: Path) -> Iterator[Document]:
    """The documents of all sources, one source after another."""
    folders = [Path(folder) for folder in config.src] or ([] if config.hub else python_sources())
    found = folder_documents(folders, config.filter, out)
    return chain(found, hub_documents(config) if config.hub else ())


def _collect(documents: Iterator[Document], spool: Spool, tally: Tally, config: CorpusConfig) -> list[str]:
    """Spool every accepted document, and return their repositories, in the order of their numbers."""
    duplicates = DuplicateIndex(config.dedup)
    repositories: dict[str, int] = {}
    for number, document in enumerate(tqdm(documents, "reading", unit=" documents", leave=False, disable=None)):
        try:
            text, meta, line = _accepted(document, config.filter, duplicates)
        except Rejected as rule:
            tally.rejected[str(rule)] += 1
            continue
        size = len(text.encode())
        tally.add("languages", meta["repo_language"], size)
        tally.add("licences", meta["license"], size)
        repository = repositories.setdefault(document.repository, len(repositories))
        sort_key = _hash(config.seed, "document", document.key).hex()
        spool.add(b"%s %015d %d %d %s" % (sort_key.encode(), number, repository, size, line))
    return list(repositories)


def _accepted(document: Document, rules: FilterConfig, duplicates: DuplicateIndex) -> tuple[str, dict[str, Any], bytes]:
    """The text of a document, its meta, and its line in a shard.

    Raises:
        Rejected: it breaks a rule, or is a duplicate.
    """
    text, meta = document.read()
    line = document_line({"text": text, "meta": meta})
    too_large = "too_large" if len(line) > MAX_LINE_BYTES else None
    if rule := broken_meta_rule(meta, rules) or broken_text_rule(text, rules) or too_large or duplicates.add(text):
        raise Rejected(rule)
    return text, meta, line


def split_repositories(repositories: list[str], tally: Tally, config: CorpusConfig) -> dict[str, str]:
    """The split of each repository; validation and test get at least one each.

    Raises:
        DataError: there are too few repositories for three splits.
    """
    num_validation = max(1, round(config.validation_fraction * len(repositories)))
    num_test = max(1, round(config.test_fraction * len(repositories)))
    if len(repositories) <= num_validation + num_test:
        examples = f" ({', '.join(sorted(repositories)[:5])})" if repositories else ""
        rejected = ", ".join(f"{count:,} {rule}" for rule, count in tally.rejected.items()) or "none"
        raise DataError(
            f"src=[{','.join(config.src)}], hub={config.hub or 'null'}: {len(repositories)} repositories or "
            f"packages{examples} have accepted documents (rejected: {rejected}), too few for three splits; add sources "
            "with more, or change validation_fraction or test_fraction"
        )
    order = sorted(repositories, key=lambda name: _hash(config.seed, "repository", name))
    held_out = ["validation"] * num_validation + ["test"] * num_test
    return dict(zip(order, chain(held_out, repeat("train")), strict=False))


def _write(
    out: Path, spool: Spool, splits: list[str], tally: Tally, config: CorpusConfig
) -> dict[str, list[dict[str, str | int]]]:
    """Write the spooled documents to shards, and list those; `splits` is indexed by the repository's number."""
    writers = {split: ShardWriter(out / split, config.shard_bytes) for split in SPLITS}
    total = sum(count["documents"] for count in tally.kept["languages"].values())
    for record in tqdm(spool.drain(), "writing", total, unit=" documents", leave=False, disable=None):
        _, _, repository, size, line = record.split(b" ", 4)
        split = splits[int(repository)]
        writers[split].write(line)
        tally.add("splits", split, int(size))
    for writer in writers.values():
        writer.close()
    return {split: writer.files for split, writer in writers.items()}


def _settings(config: CorpusConfig) -> dict[str, Any]:
    """What the corpus depends on besides its sources, whose location may differ the next time."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in ("src", "hub", "out")}


def _hash(seed: int, *parts: str) -> bytes:
    return hashlib.sha256("\0".join((str(seed), *parts)).encode()).digest()
