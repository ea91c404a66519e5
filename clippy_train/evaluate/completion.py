"""`clippy evaluate task=completion`: how often a model writes a line of a document as its author did.

Each document is cut at lines chosen by a hash of `seed`, so the cuts depend on the split alone, and all models complete
the same lines: from what stands before or, with `infill`, from both sides. Decoding is greedy, up to the end of the
line; a span ends where the model ends it. Exact match counts lines that are equal but for white space at their end;
edit similarity is 1 - (insertions and deletions) / (both lengths), by character. Costs a generation for each cut.
"""

import hashlib
from collections.abc import Iterator
from heapq import nsmallest
from itertools import chain, islice
from statistics import mean
from typing import Any, NamedTuple

from rapidfuzz.distance import Indel
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from clippy_train.config import EvaluateConfig
from clippy_train.data.scored import language_label
from clippy_train.errors import ConfigError, DataError
from clippy_train.model.load import load_model_and_tokenizer
from clippy_train.model.sample import (
    GAP_TOKENS,
    Gap,
    Prompt,
    Sampling,
    complete_prompts,
    never_stop,
    prompt_room,
    stop_at_sequences,
)
from clippy_train.shards.sources import open_corpus
from clippy_train.tokenizer import fim_tokens, load_tokenizer

LINE_TOKENS = 64  # longest completion of a line; one with more tokens is wrong
SPAN_LINES = 3  # that a span is taken from
HEADER = ["", "exact match", "edit similarity", "lines"]


class Cut(NamedTuple):
    context: Prompt  # the document up to the end of a line or, with `infill`, around what is missing
    line: str  # the line that follows, or what is missing
    language: str


def completion(config: EvaluateConfig) -> dict[str, Any]:
    """Return each model's results by its name: `total` and `languages`.

    Raises:
        ConfigError: a model cannot be loaded, or has too few positions.
        DataError: the split has no line to complete.
    """
    cuts = list(split_cuts(config))
    if not cuts:
        raise DataError(f"split={config.split} of {config.data.path or config.data.hub} has no line to complete")
    for name in config.model if config.infill != "none" else ():
        if not fim_tokens(load_tokenizer(name)):
            raise ConfigError(
                f"infill={config.infill}: {name} has no tokens for fill-in-the-middle: it was not trained with "
                "data.fim_rate"
            )
    return {name: score_lines(name, cuts, config.batch_size, config.infill) for name in config.model}


def split_cuts(config: EvaluateConfig) -> Iterator[Cut]:
    """`n` cuts in each of the first `max_rows` documents of the split, or as many as a document has lines for."""
    corpus = open_corpus(config.data, config.split, with_meta=True)
    entries = chain.from_iterable(map(corpus.documents, range(len(corpus.shards))))
    usable = ((entry.text, entry.meta) for entry in entries if entry.text is not None)
    for number, (text, meta) in enumerate(islice(usable, config.max_rows)):
        assert meta is not None, "the corpus was opened without its meta"
        lines = text.splitlines(keepends=True)
        followed = [index for index in range(1, len(lines)) if lines[index].strip()]
        for index in sorted(nsmallest(config.n, followed, key=lambda index: _hash(config.seed, number, index))):
            before, line, after = "".join(lines[:index]), lines[index].rstrip(), "".join(lines[index:])
            begin, end = 0, len(line)
            if config.infill == "span":
                begin, end = span(line, "".join(lines[index : index + SPAN_LINES]), config.seed, number, index)
            context = before if config.infill == "none" else Gap(before + after[:begin], after[end:])
            yield Cut(context, after[begin:end].rstrip(), language_label(meta))


def span(line: str, lines: str, *key: int) -> tuple[int, int]:
    """Two places in `lines`: before a visible character of `line`, its first one, and after that or a later one."""
    draw = _hash(*key, SPAN_LINES)
    first, second = (int.from_bytes(each) for each in (draw[:8], draw[8:16]))
    visible = [place for place, character in enumerate(line) if not character.isspace()]
    begin = visible[first % len(visible)]
    return begin, begin + 1 + second % (len(lines) - begin)


def _hash(*parts: int) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()


def score_lines(name: str, cuts: list[Cut], batch_size: int, infill: str) -> dict[str, Any]:
    """Complete the line (or span) of each cut with a model, and compare."""
    model, tokenizer = load_model_and_tokenizer(name)
    if prompt_room(model, most_tokens(infill)) < 1 + GAP_TOKENS * (infill != "none"):
        raise ConfigError(f"{name}: its positions leave no room for a line of {most_tokens(infill)} tokens")
    bar = tqdm(range(0, len(cuts), batch_size), name, unit=" batches", leave=False, disable=None)
    batches = (cuts[begin : begin + batch_size] for begin in bar)
    lines = (next_lines(model, tokenizer, [cut.context for cut in batch], infill) for batch in batches)
    written = chain.from_iterable(lines)
    scored = [(cut.language, *similarity(line, cut.line)) for line, cut in zip(written, cuts, strict=True)]
    languages = sorted({language for language, _, _ in scored})
    of_language = {name: _means([each for each in scored if each[0] == name]) for name in languages}
    ordered = sorted(of_language.items(), key=lambda item: -item[1]["lines"])
    return {"total": _means(scored), "languages": dict(ordered)}


def next_lines(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, contexts: list[Prompt], infill: str = "none"
) -> list[str]:
    """The next line of each context (or its missing span), greedily, without white space at its end."""
    stop = never_stop if infill == "span" else stop_at_sequences(["\n"])
    texts = complete_prompts(model, tokenizer, contexts, Sampling(most_tokens(infill)), stop)
    return [text.rstrip() for text in texts]


def most_tokens(infill: str) -> int:
    return LINE_TOKENS * (SPAN_LINES if infill == "span" else 1)


def similarity(written: str, line: str) -> tuple[bool, float]:
    """Whether two lines are equal, and their edit similarity from 0 to 1."""
    return written == line, Indel.normalized_similarity(written, line)


def _means(scored: list[tuple[str, bool, float]]) -> dict[str, float]:
    return {
        "exact_match": mean(exact for _, exact, _ in scored),
        "edit_similarity": mean(similar for _, _, similar in scored),
        "lines": len(scored),
    }


def tables(results: dict[str, Any]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Yield the title, header and rows of each printed table, one for each model."""
    for name, found in results.items():
        parts = {"total": found["total"], **found["languages"]}
        yield name, HEADER, [[label, *cells(each)] for label, each in parts.items()]


def cells(each: dict[str, float]) -> list[str]:
    """The cells of a table's row after its name."""
    return [f"{100 * each['exact_match']:.2f} %", f"{100 * each['edit_similarity']:.2f} %", f"{each['lines']:,}"]
