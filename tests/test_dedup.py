"""Duplicates: the same words count as the same document, and MinHash estimates the true similarity."""

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clippy_train.config import DedupConfig
from clippy_train.corpus.dedup import SHINGLE, DuplicateIndex, sketch
from clippy_train.errors import ConfigError

CODE = st.text("ab1_é \n\t(){}.,;=", max_size=12) | st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
EXACT, NEAR = DedupConfig(), DedupConfig(exact=False, near=True)


def verdicts(config: DedupConfig, *texts: str) -> list[str | None]:
    duplicates = DuplicateIndex(config)
    return [duplicates.add(text) for text in texts]


def original_key(text: str) -> str:
    """What the original's deduplication compares, without the spaces at the ends."""
    return " ".join(re.split(r"\W+", text)).strip()


@given(st.lists(CODE, max_size=8))
def test_a_document_with_the_words_of_an_earlier_one_is_an_exact_duplicate(texts: list[str]) -> None:
    keys = [original_key(text) for text in texts]
    expected = ["exact_duplicate" if key in keys[:number] else None for number, key in enumerate(keys)]
    assert verdicts(EXACT, *texts) == expected


def test_order_and_case_of_the_words_matter() -> None:
    assert verdicts(EXACT, "a b", "b a", "A b", "ab", "a\n-b!") == [None, None, None, None, "exact_duplicate"]


def test_nothing_is_a_duplicate_when_both_are_off() -> None:
    assert verdicts(DedupConfig(exact=False), "a b", "a b") == [None, None]


def changed(words: list[str], count: int) -> str:
    """The words with `count` of them, far apart, replaced."""
    step = len(words) // max(1, count)
    return " ".join(
        f"new{i}" if count and i % step == 0 and i // step < count else word for i, word in enumerate(words)
    )


WORDS = [f"word{number}" for number in random.Random(0).choices(range(10_000), k=1000)]


def test_a_document_with_few_changes_is_a_near_duplicate_and_the_first_one_is_kept() -> None:
    first, similar, other = changed(WORDS, 0), changed(WORDS, 5), changed(WORDS, 500)
    assert verdicts(NEAR, first, similar, other, first) == [None, "near_duplicate", None, "near_duplicate"]
    assert verdicts(NEAR, similar, first) == [None, "near_duplicate"]


def test_a_document_similar_only_to_a_duplicate_is_kept() -> None:
    chain = [" ".join(WORDS[start : start + 500]) for start in (0, 50, 100)]  # similarity 0.82, of the outer ones 0.66
    config = DedupConfig(exact=False, near=True, permutations=1024)
    assert verdicts(config, *chain) == [None, "near_duplicate", None]
    assert verdicts(config, *chain[1:]) == [None, "near_duplicate"]


def test_both_kinds_are_distinguished() -> None:
    texts = changed(WORDS, 0), changed(WORDS, 0).replace(" ", "\n"), changed(WORDS, 3)
    assert verdicts(DedupConfig(near=True), *texts) == [None, "exact_duplicate", "near_duplicate"]


def jaccard(first: str, second: str) -> float:
    a, b = (
        {tuple(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)}
        for words in (first.split(), second.split())
    )
    return len(a & b) / len(a | b)


@pytest.mark.parametrize("count", [0, 5, 20, 50, 100, 200])
def test_a_sketch_estimates_the_similarity_of_shingles(count: int) -> None:
    permutations = 1024
    estimate = sketch(WORDS, permutations).jaccard(sketch(changed(WORDS, count).split(), permutations))
    true = jaccard(" ".join(WORDS), changed(WORDS, count))
    assert abs(estimate - true) <= 5 * (true * (1 - true) / permutations) ** 0.5  # five standard deviations


def test_a_long_document_has_the_sketch_of_all_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = sketch(WORDS, 64)
    monkeypatch.setattr("clippy_train.corpus.dedup.BATCH", 7)
    assert (sketch(WORDS, 64).hashvalues == expected.hashvalues).all()


@pytest.mark.parametrize("words", [[], ["a"], ["a", "b", "c", "d"]], ids=len)
def test_documents_shorter_than_a_shingle_are_compared_as_a_whole(words: list[str]) -> None:
    assert verdicts(NEAR, " ".join(words), " ".join(words), " ".join([*words, "x"])) == [None, "near_duplicate", None]


def test_a_threshold_without_a_possible_index_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"dedup.threshold=1.0, dedup.permutations=16: .*more permutations"):
        DuplicateIndex(DedupConfig(near=True, threshold=1.0, permutations=16))
