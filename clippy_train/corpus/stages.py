"""The stages of a corpus build: sources -> documents -> duplicates -> splits -> shards.

Each stage is a number of tasks, and each task a pure function of the settings and of the results of earlier stages to
a folder of files. How the work is divided depends on the input alone, so the bytes do not depend on who performs which
task, or when.

    list      sources -> inputs: lists of `Sizes.files` files, one shard of a dataset, or one file of problems
    read      an input -> its accepted documents, in parts of up to `Sizes.part` bytes
    gather    counts the parts; a document's number is part * 2^32 + its place there: the order of the sources
    exact     a range of digests -> the documents that repeat an earlier one
    bands     a part -> MinHash band hashes and shingles of its documents
    pairs     a range of band hashes -> candidates for near duplicates
    verify    a part -> candidates whose shingles are as similar as `dedup.threshold` demands
    near      -> the documents to drop, so that each is similar to a kept one
    count     a part -> which documents are kept, and what they are
    split     counts and repositories -> where the splits begin
    write     a range of the shuffled order -> shards of each split

Memory: of one task at a time, a part, a table of `Sizes.table` bytes (several times while it is sorted), or a range of
shards; `near` holds 8 bytes per near duplicate, `split` 8 per repository and part, each task the list of the parts.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zstandard

from clippy_train.config import CorpusConfig, FilterConfig
from clippy_train.corpus import dedup
from clippy_train.corpus.document import Document, Rejected
from clippy_train.corpus.folders import SourceFile, file_documents, python_sources, source_files
from clippy_train.corpus.hub import dataset_shards, hub_documents
from clippy_train.corpus.manifest import Tally
from clippy_train.corpus.problems import problem_documents
from clippy_train.corpus.spool import load_records, save_records
from clippy_train.corpus.tables import Column, Table, distinct, key_range, load_table, save_table, sorted_table
from clippy_train.errors import DataError
from clippy_train.shards.filters import broken_meta_rule, broken_text_rule
from clippy_train.shards.format import MAX_LINE_BYTES, SPLITS, ShardWriter, document_line
from clippy_train.shards.redact import redacted

FACTS = "facts.json"  # of a result that others need numbers of
RECORDS = "documents.zst"
PLACE_BITS = 32  # of a document's number


class Sizes(NamedTuple):
    """How the input is divided; the result depends on it."""

    files: int = 4096  # of an input; also the most documents of a part
    part: int = 1 << 26  # bytes of lines
    table: int = 1 << 25  # bytes of the digests, or of the band hashes, that are sorted at once
    range: int = 1 << 27  # bytes of lines that are sorted and written at once, or four shards if those are more


SIZES = Sizes()


@dataclass(frozen=True)
class Build:
    """What every task knows."""

    config: CorpusConfig
    folder: Path  # holds the results
    sizes: Sizes = SIZES

    def result(self, stage: str, task: int = 0) -> Path:
        return self.folder / stage / f"{task:06d}"

    def facts(self, stage: str, task: int = 0) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads((self.result(stage, task) / FACTS).read_bytes())
        return facts


class Stage(NamedTuple):
    """A stage of a build.

    Attributes:
        count: the number of its tasks, once the stages before are complete.
        perform: writes the result of a task to a folder.
        is_wanted: whether the build has this stage.
    """

    name: str
    count: Callable[[Build], int]
    perform: Callable[[Build, int, Path], None]
    is_wanted: Callable[[CorpusConfig], bool] = lambda _: True

    def tasks(self, build: Build) -> int:
        return self.count(build) if self.is_wanted(build.config) else 0


class Part(NamedTuple):
    """Some documents of an input, in the shuffled order."""

    number: int
    folder: Path
    documents: int

    @property
    def numbers(self) -> tuple[int, int]:
        """The first number of its documents, and the one after the last that it could have."""
        return self.number << PLACE_BITS, (self.number + 1) << PLACE_BITS


class Header(NamedTuple):
    """What later stages need to know of a document without parsing it."""

    repository: str
    language: str | None
    licence: str | None
    text_bytes: int


class Accepted(NamedTuple):
    sort_key: int
    header: Header
    line: bytes  # of a shard
    digest: tuple[int, int]


# Reading


def list_sources(build: Build, _: int, folder: Path) -> None:
    config = build.config
    elsewhere = config.hub or config.problems
    sources = [Path(source) for source in config.src] or ([] if elsewhere else python_sources())
    files, number = source_files(sources, build.folder), count()
    while lines := [file.to_json() for file in islice(files, build.sizes.files)]:
        _input(folder, next(number), "files").write_bytes(zstandard.compress("\n".join(lines).encode()))
    shards: Sequence[str | None] = (dataset_shards(config) or [None]) if config.hub else []
    for shard in shards:
        _input(folder, next(number), "shard").write_text(json.dumps(shard))
    for name in config.problems:
        _input(folder, next(number), "problems").write_text(name)
    _save_facts(folder, {"inputs": next(number)})


def read(build: Build, task: int, folder: Path) -> None:
    rejected: Counter[str] = Counter()
    replaced: Counter[str] = Counter()
    accepted, lengths = _accepted(build, task, rejected, replaced), list[int]()
    while records := _up_to(build.sizes, accepted, digests := list[tuple[int, int]]()):
        part = folder / f"{len(lengths):06d}"
        part.mkdir()
        lengths.append(len(records))
        save_table(part / "digests.npy", _table(3, ((*digest, place) for place, digest in enumerate(digests))))
        save_records(part / RECORDS, records)
    _save_facts(folder, {"parts": lengths, "rejected": rejected, "redacted": replaced})


def _input(folder: Path, number: int, kind: str) -> Path:
    return folder / f"{number:06d}.{kind}"


def _documents(build: Build, task: int) -> Iterator[Document]:
    files = _input(build.result("list"), task, "files")
    if files.exists():
        lines = zstandard.decompress(files.read_bytes()).splitlines()
        return file_documents(map(SourceFile.from_json, lines), build.config.filter)
    problems = _input(build.result("list"), task, "problems")
    if problems.exists():
        return problem_documents(problems.read_text())
    return hub_documents(build.config, json.loads(_input(build.result("list"), task, "shard").read_text()))


def _accepted(build: Build, task: int, rejected: Counter[str], replaced: Counter[str]) -> Iterator[Accepted]:
    """The documents of an input that break no rule; the others, and what is replaced in these, are counted."""
    config = build.config
    for document in _documents(build, task):
        try:
            text, meta, line = _checked(document, config.filter, replaced)
        except Rejected as rule:
            rejected[str(rule)] += 1
            continue
        header = Header(document.repository, meta["repo_language"], meta["license"], len(text.encode()))
        digest = dedup.digest(dedup.words_of((document.prompt or "") + text)) if config.dedup.exact else (0, 0)
        yield Accepted(_key(config.seed, "document", document.key), header, line, digest)


def _checked(document: Document, rules: FilterConfig, replaced: Counter[str]) -> tuple[str, dict[str, Any], bytes]:
    """The text of a document, its meta, and its line in a shard; what is replaced in the text is counted.

    Raises:
        Rejected: it breaks a rule.
    """
    text, meta = document.read()
    if rule := broken_meta_rule(meta, rules) or broken_text_rule(text, rules, document.prompt or ""):
        raise Rejected(rule)
    text, found = redacted(text, rules.redact)
    prompt = {}
    if document.prompt is not None:
        prompt["prompt"], more = redacted(document.prompt, rules.redact)
        found += more
    line = document_line({**prompt, "text": text, "meta": meta})
    if len(line) > MAX_LINE_BYTES:
        raise Rejected("too_large")
    replaced.update(found)
    return text, meta, line


def _up_to(sizes: Sizes, accepted: Iterator[Accepted], digests: list[tuple[int, int]]) -> list[bytes]:
    """The records of the next part; the digests of its documents are added to a list."""
    records: list[bytes] = []
    total = 0
    while total < sizes.part and len(records) < sizes.files and (document := next(accepted, None)):
        records.append(_record(len(records), document))
        digests.append(document.digest)
        total += len(document.line)
    return records


def _record(place: int, document: Accepted) -> bytes:
    header = json.dumps(document.header, ensure_ascii=False).encode()
    return b"%016x%08x\t%s\t%s" % (document.sort_key, place, header, document.line)


def _fields(record: bytes) -> tuple[int, bytes, bytes]:
    """The place, header and line of a record."""
    key, header, line = record.split(b"\t", 2)
    return int(key[16:], 16), header, line


def gather(build: Build, _: int, folder: Path) -> None:
    parts: list[tuple[int, int, int]] = []
    rejected, replaced = Counter[str](), Counter[str]()
    for task in range(_inputs(build)):
        facts = build.facts("read", task)
        parts += [(task, part, documents) for part, documents in enumerate(facts["parts"])]
        rejected.update(facts["rejected"])
        replaced.update(facts["redacted"])
    _save_facts(folder, {"parts": parts, "rejected": rejected, "redacted": replaced})


def parts_of(build: Build) -> list[Part]:
    listed = enumerate(build.facts("gather")["parts"])
    return [Part(n, build.result("read", task) / f"{part:06d}", documents) for n, (task, part, documents) in listed]


# Duplicates


def exact(build: Build, task: int, folder: Path) -> None:
    keys = key_range(task, _digest_ranges(build))
    tables = []
    for part in parts_of(build):
        digests = load_table(part.folder / "digests.npy", *keys)
        digests[2] += np.uint64(part.numbers[0])
        tables.append(digests)
    save_table(folder / "dropped.npy", dedup.repeated(sorted_table(_joined(3, tables))))


def bands(build: Build, task: int, folder: Path) -> None:
    part = parts_of(build)[task]
    places, hashes = np.zeros((2, part.documents), np.int64), list[tuple[int, int]]()
    dropped = set(_dropped(build, part, "exact").tolist())
    with (folder / "shingles.bin").open("wb") as file:
        for place, _, line in map(_fields, load_records(part.folder / RECORDS)):
            if place in dropped:
                continue
            content = json.loads(line)
            found = dedup.shingles(dedup.words_of(content.get("prompt", "") + content["text"]))
            places[:, place] = file.tell() // found.itemsize, len(found)
            file.write(found.tobytes())
            signature = dedup.sketch(found, build.config.dedup.permutations)
            hashes += [(each, part.numbers[0] + place) for each in dedup.band_hashes(signature, build.config.dedup)]
    np.save(folder / "places.npy", places)
    save_table(folder / "bands.npy", _table(2, hashes))


def pairs(build: Build, task: int, folder: Path) -> None:
    keys = key_range(task, _band_ranges(build))
    tables = [load_table(build.result("bands", n) / "bands.npy", *keys) for n in range(_parts(build))]
    save_table(folder / "pairs.npy", dedup.candidate_pairs(sorted_table(_joined(2, tables))))


def verify(build: Build, task: int, folder: Path) -> None:
    part = parts_of(build)[task]
    tables = [load_table(build.result("pairs", n) / "pairs.npy", *part.numbers) for n in range(_band_ranges(build))]
    later, earlier = distinct(_joined(2, tables))
    shingles_of = lru_cache(64)(partial(_shingles, build, lru_cache(256)(partial(_places, build))))
    edges: list[tuple[int, int]] = []
    bounds = np.flatnonzero(np.diff(later, prepend=later[:1] + np.uint64(1), append=later[-1:] + np.uint64(1)))
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        number, others = int(later[begin]), earlier[begin:end].tolist()
        found = dedup.similarities(shingles_of(number), [shingles_of(other) for other in others])
        edges += [(number, other) for other, each in zip(others, found, strict=True) if each >= _threshold(build)]
    save_table(folder / "edges.npy", _table(2, edges))


def near(build: Build, _: int, folder: Path) -> None:
    tables = (load_table(build.result("verify", task) / "edges.npy") for task in range(_parts(build)))
    edges = chain.from_iterable(table.T.tolist() for table in tables)
    dropped = np.fromiter(dedup.near_duplicates(edges), np.uint64)
    save_table(folder / "dropped.npy", dropped[None])


def _places(build: Build, part: int) -> Column:
    places: Column = np.load(build.result("bands", part) / "places.npy")
    return places


def _shingles(build: Build, places_of: Callable[[int], Column], number: int) -> Column:
    part, place = number >> PLACE_BITS, number & ((1 << PLACE_BITS) - 1)
    begin, length = places_of(part)[:, place].tolist()
    return np.fromfile(build.result("bands", part) / "shingles.bin", np.uint32, length, offset=4 * begin)


def _threshold(build: Build) -> float:
    return build.config.dedup.threshold


def _dropped(build: Build, part: Part, name: str) -> Column:
    """The places in a part of the documents that the stage `name` drops."""
    tables = [
        load_table(build.result(name, task) / "dropped.npy", *part.numbers) for task in range(_tasks(build, name))
    ]
    places: Column = _joined(1, tables)[0] - np.uint64(part.numbers[0])
    return places


# Splits and shards


def count_kept(build: Build, task: int, folder: Path) -> None:
    part, tally = parts_of(build)[task], Tally()
    kept = np.ones(part.documents, bool)
    kept[_dropped(build, part, "exact")] = kept[_dropped(build, part, "near")] = False
    repositories: set[str] = set()
    line_bytes = 0
    for place, encoded, line in map(_fields, load_records(part.folder / RECORDS)):
        if kept[place]:
            header = Header(*json.loads(encoded))
            tally.add("languages", header.language, header.text_bytes)
            tally.add("licences", header.licence, header.text_bytes)
            repositories.add(header.repository)
            line_bytes += len(line) + 1
    np.save(folder / "kept.npy", kept)
    keys = {_key(build.config.seed, "repository", name) for name in repositories}
    save_table(folder / "repositories.npy", _table(1, ((key,) for key in keys)))
    examples = sorted(repositories)[:5]
    _save_facts(folder, {"kept": tally.kept, "line_bytes": line_bytes, "examples": examples})


def split(build: Build, _: int, folder: Path) -> None:
    tally, tasks = Tally(), range(_parts(build))
    tally.rejected.update(build.facts("gather")["rejected"])
    for name in ("exact", "near"):
        for task in range(_tasks(build, name)):
            tally.rejected[f"{name}_duplicate"] += load_table(build.result(name, task) / "dropped.npy").shape[1]
    found = [load_table(build.result("count", task) / "repositories.npy") for task in tasks]
    keys = np.unique(_joined(1, found))
    for task in tasks:
        tally.update(build.facts("count", task)["kept"])
    examples = chain.from_iterable(build.facts("count", task)["examples"] for task in tasks) if len(keys) < 100 else ()
    held_out = held_out_repositories(len(keys), sorted(set(examples)), tally, build.config)
    bounds = [int(keys[sum(held_out[: each + 1])]) for each in range(len(held_out))]
    facts = {
        "bounds": bounds,
        "repositories": [len(keys) - sum(held_out), *held_out],
        "line_bytes": sum(build.facts("count", task)["line_bytes"] for task in tasks),
        "kept": tally.kept,
        "rejected": +tally.rejected,
        "redacted": build.facts("gather")["redacted"],
    }
    _save_facts(folder, facts)


def held_out_repositories(number: int, names: list[str], tally: Tally, config: CorpusConfig) -> tuple[int, int]:
    """How many repositories are for validation and for testing; both get at least one.

    Raises:
        DataError: there are too few repositories for three splits.
    """
    held_out = max(1, round(config.validation_fraction * number)), max(1, round(config.test_fraction * number))
    if number <= sum(held_out):
        examples = f" ({', '.join(names[:5])})" if names else ""
        rejected = ", ".join(f"{count:,} {rule}" for rule, count in (+tally.rejected).items()) or "none"
        raise DataError(
            f"src=[{','.join(config.src)}], hub={config.hub or 'null'}, problems=[{','.join(config.problems)}]: "
            f"{number} repositories or packages{examples} have accepted documents (rejected: {rejected}), too few for "
            "three splits; add sources with more, or change validation_fraction or test_fraction"
        )
    return held_out


def write(build: Build, task: int, folder: Path) -> None:
    bounds, tally = build.facts("split")["bounds"], Tally()
    writers = {name: ShardWriter(folder / name, build.config.shard_bytes) for name in SPLITS}
    for encoded, line in _shuffled(build, key_range(task, _shuffle_ranges(build))):
        header = Header(*json.loads(encoded))
        name = _split_of(_key(build.config.seed, "repository", header.repository), bounds)
        writers[name].write(line)
        tally.add("splits", name, header.text_bytes)
    for writer in writers.values():
        writer.close()
    _save_facts(folder, {"files": {name: writer.files for name, writer in writers.items()}, "kept": tally.kept})


def _shuffled(build: Build, keys: tuple[int, int]) -> Iterator[tuple[bytes, bytes]]:
    """The headers and lines of the kept documents in a range of the shuffled order."""
    found: list[tuple[bytes, int, bytes]] = []
    for part in parts_of(build):
        kept = np.load(build.result("count", part.number) / "kept.npy")
        for record in load_records(part.folder / RECORDS, *keys):
            if kept[_fields(record)[0]]:
                found.append((record[:16], part.number, record))
    found.sort(reverse=True)
    while found:
        yield _fields(found.pop()[2])[1:]


def _split_of(key: int, bounds: list[int]) -> str:
    """The repositories with the smallest keys are for validation, the next ones for testing."""
    return next((name for name, bound in zip(SPLITS[1:], bounds, strict=True) if key < bound), SPLITS[0])


# Numbers of tasks


def one(_: Build) -> int:
    return 1


def _inputs(build: Build) -> int:
    return int(build.facts("list")["inputs"])


def _parts(build: Build) -> int:
    return len(build.facts("gather")["parts"])


def _all_documents(build: Build) -> int:
    return sum(documents for _, _, documents in build.facts("gather")["parts"])


def _digest_ranges(build: Build) -> int:
    return _ranges(24 * _all_documents(build), build.sizes.table)


def _band_ranges(build: Build) -> int:
    bands, _ = dedup.band_shape(build.config.dedup.threshold, build.config.dedup.permutations)
    return _ranges(16 * bands * _all_documents(build), build.sizes.table)


def _shuffle_ranges(build: Build) -> int:
    return _ranges(build.facts("split")["line_bytes"], max(build.sizes.range, 4 * build.config.shard_bytes))


def _ranges(total: int, size: int) -> int:
    return max(1, -(-total // size))


def _exact(config: CorpusConfig) -> bool:
    return config.dedup.exact


def _near(config: CorpusConfig) -> bool:
    return config.dedup.near


STAGES = (
    Stage("list", one, list_sources),
    Stage("read", _inputs, read),
    Stage("gather", one, gather),
    Stage("exact", _digest_ranges, exact, _exact),
    Stage("bands", _parts, bands, _near),
    Stage("pairs", _band_ranges, pairs, _near),
    Stage("verify", _parts, verify, _near),
    Stage("near", one, near, _near),
    Stage("count", _parts, count_kept),
    Stage("split", one, split),
    Stage("write", _shuffle_ranges, write),
)


def _tasks(build: Build, name: str) -> int:
    return next(stage for stage in STAGES if stage.name == name).tasks(build)


# Files


def _save_facts(folder: Path, facts: dict[str, Any]) -> None:
    (folder / FACTS).write_text(json.dumps(facts))


def _table(columns: int, rows: Iterable[tuple[int, ...]]) -> Table:
    return np.array(list(rows), np.uint64).reshape(-1, columns).T


def _joined(columns: int, tables: list[Table]) -> Table:
    return np.concatenate([np.empty((columns, 0), np.uint64), *tables], axis=1)


def _key(seed: int, *parts: str) -> int:
    return int.from_bytes(hashlib.sha256("\0".join((str(seed), *parts)).encode()).digest()[:8], "big")
