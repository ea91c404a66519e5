"""Duplicates: the same words count as the same document, and what is dropped is truly similar to something kept."""

import itertools
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clippy_train.config import CorpusConfig, DedupConfig, FilterConfig, SourceConfig
from clippy_train.corpus import dedup
from clippy_train.corpus.build import build_corpus
from clippy_train.corpus.dedup import (
    SHINGLE,
    band_shape,
    candidate_pairs,
    digest,
    near_duplicates,
    shingles,
    similarities,
    sketch,
    words_of,
)
from clippy_train.corpus.stages import Sizes
from clippy_train.errors import ConfigError
from clippy_train.shards.sources import open_corpus

CODE = st.text("ab1_é \n\t(){}.,;=", max_size=12) | st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
EXACT, NEAR = DedupConfig(), DedupConfig(exact=False, near=True)
SMALL = Sizes(files=3, part=1000, table=1000, range=10_000)
numbers = itertools.count()


def kept(folder: Path, config: DedupConfig, *texts: str) -> list[str]:
    """The texts that are kept, in their order; each is in a repository of its own."""
    source, out = folder / f"source-{next(numbers)}", folder / f"out-{next(numbers)}"
    source.mkdir()
    others = [" ".join(f"{name}{number}" for number in range(20)) for name in "xyz"]  # enough for three splits
    rows = [{"text": text, "repo_name": str(number)} for number, text in enumerate([*texts, *others])]
    (source / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = CorpusConfig(hub=str(source), out=str(out), dedup=config, filter=FilterConfig())
    build_corpus(settings, SMALL)
    splits = (open_corpus(SourceConfig(path=str(out)), split) for split in ("train", "validation", "test"))
    found = [text for split in splits for text in split.texts()]
    return [text for text in texts if text in found]


def original_key(text: str) -> str:
    """What the original's deduplication compares, without the spaces at the ends."""
    return " ".join(re.split(r"\W+", text)).strip()


@given(CODE, CODE)
def test_documents_with_the_same_words_have_the_same_digest(first: str, second: str) -> None:
    same = original_key(first) == original_key(second)
    assert (digest(words_of(first)) == digest(words_of(second))) == same


def test_order_and_case_of_the_words_matter(tmp_path: Path) -> None:
    assert kept(tmp_path, EXACT, "a b", "b a", "A b", "ab", "a\n-b!") == ["a b", "b a", "A b", "ab"]


def test_nothing_is_a_duplicate_when_both_are_off(tmp_path: Path) -> None:
    assert kept(tmp_path, DedupConfig(exact=False), "a b", "a-b") == ["a b", "a-b"]


def changed(words: list[str], count: int) -> str:
    """The words with `count` of them, far apart, replaced."""
    step = len(words) // max(1, count)
    return " ".join(
        f"new{i}" if count and i % step == 0 and i // step < count else word for i, word in enumerate(words)
    )


WORDS = [f"word{number}" for number in random.Random(0).choices(range(10_000), k=1000)]


def test_a_document_with_few_changes_is_a_near_duplicate_and_the_first_one_is_kept(tmp_path: Path) -> None:
    first, similar, other = changed(WORDS, 0), changed(WORDS, 5), changed(WORDS, 500)
    assert kept(tmp_path, NEAR, first, similar, other) == [first, other]
    assert kept(tmp_path, NEAR, other, similar, first) == [other, similar]


def test_a_document_similar_only_to_a_duplicate_is_kept(tmp_path: Path) -> None:
    chain = [" ".join(WORDS[start : start + 500]) for start in (0, 50, 100)]  # similarity 0.82, of the outer ones 0.66
    assert kept(tmp_path, NEAR, *chain) == [chain[0], chain[2]]
    assert kept(tmp_path, NEAR, *chain[1:]) == [chain[1]]


def test_documents_that_share_less_than_the_threshold_are_kept_though_they_share_a_bucket(tmp_path: Path) -> None:
    texts = [" ".join(WORDS[:start] + [f"own{start}_{n}" for n in range(180)]) for start in range(300, 308)]
    least, most = 300 / (484 + 484 - 300), 307 / (483 + 483 - 307)
    config = DedupConfig(exact=False, near=True, threshold=0.5, permutations=256)
    assert 0.4 < least < most < 0.5
    assert _share_a_bucket(texts, config)
    assert kept(tmp_path, config, *texts) == texts


def _share_a_bucket(texts: list[str], config: DedupConfig) -> bool:
    found = [dedup.band_hashes(sketch(shingles(words_of(text)), config.permutations), config) for text in texts]
    every = list(itertools.chain.from_iterable(map(set, found)))
    return len(set(every)) < len(every)


def jaccard(first: str, second: str) -> float:
    a, b = (
        {tuple(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)}
        for words in (first.split(), second.split())
    )
    return len(a & b) / len(a | b)


@pytest.mark.parametrize("count", [0, 5, 20, 50, 100, 200])
def test_a_sketch_estimates_the_similarity_of_shingles_and_their_hashes_give_it(count: int) -> None:
    permutations = 1024
    first, second = shingles(WORDS), shingles(changed(WORDS, count).split())
    true = jaccard(" ".join(WORDS), changed(WORDS, count))
    assert similarities(first, [second, first]).tolist() == [true, 1.0]
    estimate = sketch(first, permutations).jaccard(sketch(second, permutations))
    assert abs(estimate - true) <= 5 * (true * (1 - true) / permutations) ** 0.5  # five standard deviations


def test_a_long_document_has_the_sketch_of_all_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = sketch(shingles(WORDS), 64)
    monkeypatch.setattr("clippy_train.corpus.dedup.BATCH", 7)
    assert (sketch(shingles(WORDS), 64).hashvalues == expected.hashvalues).all()


@pytest.mark.parametrize("words", [["a"], ["a", "b", "c", "d"]], ids=len)
def test_documents_shorter_than_a_shingle_are_compared_as_a_whole(tmp_path: Path, words: list[str]) -> None:
    texts = [" ".join(words), "-".join(words) + ";", " ".join([*words, "x"])]
    assert kept(tmp_path, NEAR, *texts) == [texts[0], texts[2]]


def test_both_kinds_are_distinguished(tmp_path: Path) -> None:
    texts = changed(WORDS, 0), changed(WORDS, 0).replace(" ", "\n"), changed(WORDS, 3)
    assert kept(tmp_path, DedupConfig(near=True), *texts) == [texts[0]]
    (manifest,) = tmp_path.glob("out-*/manifest.json")
    assert json.loads(manifest.read_text())["rejected"] == {"exact_duplicate": 1, "near_duplicate": 1}


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=40))
def test_what_is_dropped_is_similar_to_something_kept_and_kept_ones_are_not_similar(
    drawn: list[tuple[int, int]],
) -> None:
    edges = sorted({(max(pair), min(pair)) for pair in drawn if pair[0] != pair[1]})
    dropped = set(near_duplicates(edges))
    similar = {number: {a + b - number for a, b in edges if number in (a, b)} for number in range(13)}
    for number in range(13):
        earlier = {other for other in similar[number] - dropped if other < number}
        assert (number in dropped) == bool(earlier)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 60)), unique=True))
def test_every_document_of_a_bucket_meets_the_first_ones(rows: list[tuple[int, int]]) -> None:
    rows.sort()
    buckets = [[number for bucket, number in rows if bucket == each] for each in range(4)]
    expected = {(later, first) for bucket in buckets for first in bucket[: dedup.LEADERS] for later in bucket}
    found = candidate_pairs(np.array(rows, np.uint64).reshape(-1, 2).T).T.tolist()
    assert found == sorted([later, first] for later, first in expected if later > first)


def test_a_threshold_without_a_possible_index_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"dedup.threshold=1.0, dedup.permutations=16: .*more permutations"):
        band_shape(1.0, 16)
