"""`clippy corpus`: folders of source code -> shuffled shards in the Code Clippy format, split by repository.

Promises: the same files and settings give the same bytes; no repository is in two splits; every file that is left out
is counted by the rule that left it out. Memory is one path per file and one shard; cost is reading every file once.
"""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

from tqdm import tqdm

from clippy_train.config import CorpusConfig
from clippy_train.corpus.collect import SourceFile, language, mime_type, python_sources, source_files
from clippy_train.errors import ConfigError, DataError
from clippy_train.filters import broken_meta_rule, broken_rule
from clippy_train.shards import SPLITS, ShardWriter, new_folder

MANIFEST_VERSION = 1


def build_corpus(config: CorpusConfig) -> dict[str, Any]:
    """Write `train/`, `validation/`, `test/` and `manifest.json` to `out`, and return the manifest.

    Raises:
        ConfigError: `out` is not empty, or the fractions leave nothing to train on.
        DataError: no source file, or too few repositories to hold any out.
    """
    folders = [Path(folder) for folder in config.src] or python_sources()
    files = source_files(folders)
    if not files:
        raise DataError(f"src: no file in {', '.join(map(str, folders))}")
    splits = split_repositories(sorted({file.repository for file in files}), config)
    # One order for the whole corpus: files of one repository do not stay together.
    files.sort(key=lambda file: _hash(config.seed, "document", file.name))

    with new_folder(Path(config.out), "out") as out:
        manifest = _write(out, files, splits, config)
        (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def _write(out: Path, files: list[SourceFile], splits: dict[str, str], config: CorpusConfig) -> dict[str, Any]:
    """Write the shards and return the manifest."""
    writers = {split: ShardWriter(out / split, config.shard_bytes) for split in SPLITS}
    rejected: Counter[str] = Counter()
    languages: Counter[str] = Counter()
    size = 0
    for file in tqdm(files, "reading", unit=" files", leave=False, disable=None):
        text, reason = read(file, config)
        if text is None:
            rejected[reason] += 1
            continue
        document = describe(file, text)
        writers[splits[file.repository]].write(document)
        languages[document["meta"]["repo_language"]] += 1
        size += len(text.encode())
    for split, writer in writers.items():
        writer.close()
        if not writer.files:
            raise DataError(
                f"src: nothing left for {split} out of {len(files)} files (rejected: {dict(rejected)}); "
                "give more folders, or change validation_fraction or test_fraction"
            )
    return {
        "version": MANIFEST_VERSION,
        "seed": config.seed,
        "files": {split: writer.files for split, writer in writers.items()},
        "documents": sum(languages.values()),
        "text_bytes": size,
        "languages": dict(sorted(languages.items())),
        "rejected": dict(sorted(rejected.items())),
    }


def split_repositories(repositories: list[str], config: CorpusConfig) -> dict[str, str]:
    """Which split each repository belongs to: at least one is held out for validation and one for testing."""
    held_out = config.validation_fraction + config.test_fraction
    if held_out >= 1:
        raise ConfigError(f"validation_fraction + test_fraction = {held_out}: nothing is left to train on")
    if len(repositories) < len(SPLITS):
        raise DataError(
            f"src: {len(repositories)} repositories or packages ({', '.join(repositories)}) cannot be split in three; "
            "give a folder that holds more of them"
        )
    order = sorted(repositories, key=lambda name: _hash(config.seed, "repository", name))
    num_validation = max(1, round(config.validation_fraction * len(order)))
    num_test = max(1, round(config.test_fraction * len(order)))
    splits = ["validation"] * num_validation + ["test"] * num_test
    return {name: splits[i] if i < len(splits) else "train" for i, name in enumerate(order)}


def read(file: SourceFile, config: CorpusConfig) -> tuple[str | None, str]:
    """The text of a file that passes every rule, or None and the rule that it breaks."""
    if not config.filter.extensions and language(file.path.suffix) is None:
        return None, "no_language"
    document = describe(file, "")
    if rule := broken_meta_rule(document["meta"] | {"license": None}, config.filter):
        return None, rule
    try:
        text = file.path.read_bytes().decode()
    except UnicodeDecodeError:
        return None, "not_utf8"
    except OSError:
        return None, "unreadable"
    rule = broken_rule(document, text, config.filter)
    return (None, rule) if rule else (text, "")


def describe(file: SourceFile, text: str) -> dict[str, Any]:
    """A document in the Code Clippy format. Stars are unknown for a plain folder."""
    return {
        "text": text,
        "meta": {
            "repo_name": file.repository,
            "stars": None,
            "repo_language": language(file.path.suffix) or "Text",
            "file_name": file.name,
            "mime_type": mime_type(file.name),
        },
    }


def _hash(seed: int, *parts: str) -> bytes:
    return hashlib.sha256("\0".join((str(seed), *parts)).encode()).digest()
