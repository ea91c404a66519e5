"""The corpora that a run reads, one or the sources of a mixture, and which stream reads which of them.

Promises: what a stream reads is a pure function of the settings (with `data.source_temperature`, also of the sizes in
the manifests). Every step takes the same number of blocks from each stream, so a source's share of the tokens is
exactly its share of the streams. Stream `i` of the `n` of a source reads it as a run of `n` streams would. Costs what
opening the corpora costs. Needs no torch.
"""

import dataclasses
import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import PurePath

import numpy as np

from clippy_train.config import DataConfig, FilterConfig, MixtureSource, SourceConfig, TrainConfig
from clippy_train.data.order import deal, spread
from clippy_train.errors import ConfigError, DataError
from clippy_train.files import file_name
from clippy_train.shards.sources import Corpus, open_corpus


@dataclass(frozen=True)
class Source:
    """One split of a corpus, and the streams that read it.

    Attributes:
        name: empty if the run reads one corpus only.
        streams: their numbers among all streams of the run.
    """

    name: str
    settings: SourceConfig
    corpus: Corpus
    streams: tuple[int, ...]


def open_sources(data: DataConfig, split: str, with_meta: bool = False) -> list[Source]:
    """Open `train` or `validation` of every corpus that a run reads; with `with_meta`, as `open_corpus`.

    Raises:
        ConfigError: a source gets no stream, or its size is needed and not known.
        DataError: a corpus is not found; the message names its key.
    """
    name = data.validation_split if split == "validation" else split
    corpora = [
        open_corpus(each, name, with_meta, section, data.prompt_column) for section, each in data.corpora.items()
    ]
    readers = np.array(spread(deal_streams(data, corpora)))
    return [
        Source(name, settings, corpus, tuple(np.flatnonzero(readers == index).tolist()))
        for index, (name, settings, corpus) in enumerate(
            zip(source_names(data), data.corpora.values(), corpora, strict=True)
        )
    ]


def sources_found(data: DataConfig) -> list[Source]:
    """The training data that `open_sources` finds; empty without a corpus."""
    try:
        return open_sources(data, "train")
    except DataError:
        return []


def shards_read(source: Source) -> tuple[int, int]:
    """The number of a source's training shards, and how many of them its streams read in an epoch.

    Each stream has the same number of shards to itself; the remaining ones are read by all, each for its part of the
    lines.
    """
    shards, streams = len(source.corpus.shards), len(source.streams)
    shared = shards % streams
    return shards, shards - shared + shared * streams


def deal_streams(data: DataConfig, corpora: Sequence[Corpus]) -> list[int]:
    """How many streams read each corpus.

    Raises:
        ConfigError: as `open_sources`.
    """
    weights = [1.0 if source.weight is None else source.weight for source in data.sources] or [1.0]
    if data.source_temperature is not None:
        weights = [size ** (1 / data.source_temperature) for size in _sizes(data, corpora)]
    dealt = deal(data.streams, weights)
    for section, weight, streams in zip(data.corpora, weights, dealt, strict=True):
        if not streams:
            raise ConfigError(
                f"{section} gets none of the data.streams={data.streams}, since its share is "
                f"{weight / sum(weights):.2g}: set data.streams={math.ceil(sum(weights) / min(weights))} or more, or "
                "change the weights"
            )
    return dealt


def _sizes(data: DataConfig, corpora: Sequence[Corpus]) -> list[int]:
    sizes = []
    for (section, settings), corpus in zip(data.corpora.items(), corpora, strict=True):
        size = text_bytes(settings, corpus)
        if not size:
            raise ConfigError(
                f"data.source_temperature={data.source_temperature} needs the size of each source: {corpus.place} has "
                f"no manifest that says it, or {section}.filter leaves out an unknown part. Give each source a weight "
                "instead"
            )
        sizes.append(size)
    return sizes


def text_bytes(settings: SourceConfig, corpus: Corpus) -> int | None:
    """Bytes of training text that a corpus has by its manifest; None if that does not say.

    With `filter.languages`, the share of the languages in all splits; any other rule leaves an unknown part.
    """
    about, rules = corpus.about(), settings.filter
    try:
        size = int(about["splits"]["train"]["text_bytes"])
        if rules.languages:
            accepted = {name.casefold() for name in rules.languages}
            kept = sum(each["text_bytes"] for name, each in about["languages"].items() if name.casefold() in accepted)
            size = round(size * kept / about["text_bytes"])
    except (KeyError, TypeError, ZeroDivisionError):
        return None
    return size if dataclasses.replace(rules, languages=[], redact=[]) == FilterConfig() else None


def fingerprint(sources: Sequence[Source]) -> str:
    """Changes when the shards of a source do."""
    found = [source.corpus.fingerprint for source in sources]
    return found[0] if len(found) == 1 else hashlib.sha256("\n".join(found).encode()).hexdigest()


def shard_names(sources: Sequence[Source]) -> list[tuple[str, ...]]:
    """For each stream, the names of the shards that it reads, for messages."""
    of_stream = {stream: source.corpus.shards for source in sources for stream in source.streams}
    return [of_stream[stream] for stream in sorted(of_stream)]


def read_through(sources: Sequence[Source], epochs: np.ndarray, times: int) -> list[Source]:
    """The sources that all of their streams have read `times` times; `epochs`, `[streams]`, is each stream's epoch."""
    return [source for source in sources if epochs[list(source.streams)].min() >= times]


def data_ended(config: TrainConfig, sources: Sequence[Source], cursors: np.ndarray) -> bool:
    """Whether a run that has come to `cursors`, `[streams, 5]`, has ended by `trainer.max_epochs`."""
    epochs = config.trainer.max_epochs
    return epochs is not None and bool(read_through(sources, cursors[:, 0], epochs))


def source_names(data: DataConfig) -> list[str]:
    """The name of each source, all different: its own, or that of its corpus and, where it is taken, a number."""
    given = {source.name for source in data.sources}
    names: list[str] = []
    for source in data.sources:
        names.append(source.name or next(each for each in _derived_names(source) if each not in {*given, *names}))
    return names or [""]


def _derived_names(source: MixtureSource) -> Iterator[str]:
    name = re.sub(r"[^\w.+#-]", "_", PurePath(corpus_name(source.path, source.hub)).name)
    return (f"{name}-{number}" if number > 1 else name for number in count(1))


def corpus_name(path: str | None, hub: str | None) -> str:
    """A short name of a corpus: the hub's, or the last folder of a path or pattern that is not a placeholder."""
    if hub:
        return file_name(hub.partition("@")[0])
    named = [part for part in PurePath(path or "").parts if not re.search(r"[{*?\[]", part) and part != "/"]
    return named[-1] if named else "corpus"
