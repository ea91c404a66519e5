"""The rules on documents: each against an independent definition, and on documents with missing meta."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clippy_train.compose import compose
from clippy_train.config import CorpusConfig, FilterConfig
from clippy_train.errors import ConfigError
from clippy_train.shards.filters import META_COLUMNS, RULES, broken_rule, code_clippy_meta

TEXT = "def f(a):\n    return a\n"
OPT_OUT = Path(__file__).parent / "data" / "opt_out"
META = {
    "repo_name": "octo/cat",
    "stars": 12,
    "repo_language": "Python",
    "file_name": "src/f.py",
    "mime_type": "text/x-python",
    "license": "MIT",
}
# For each rule the strictest value that keeps the document above, and the loosest that does not.
RULE_SETTINGS: dict[str, tuple[str, Any, Any]] = {
    "extension": ("extensions", [".c", "py"], [".c", ".PY", "f.py.in"]),
    "language": ("languages", ["C++", "python"], ["C++"]),
    "licence": ("licences", ["mit"], ["Apache-2.0"]),
    "few_stars": ("min_stars", 12, 13),
    "opted_out": ("opt_out", str(OPT_OUT / "others.txt"), str(OPT_OUT / "octo.txt")),
    "too_small": ("min_bytes", len(TEXT), len(TEXT) + 1),
    "too_large": ("max_bytes", len(TEXT), len(TEXT) - 1),
    "long_line": ("max_line_length", 12, 11),
    "long_mean_line": ("max_mean_line_length", 10.5, 10.4),
    "low_alphanumeric": ("min_alphanumeric", sum(map(str.isalnum, TEXT)) / len(TEXT), 0.6),
}
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.text("ab_ \n\r\u2028é", max_size=60)


def broken(rules: FilterConfig, text: str = TEXT, **meta: Any) -> str | None:
    return broken_rule({"text": text, "meta": {**META, **meta}}, text, rules)


def test_every_rule_is_listed_and_off_by_default() -> None:
    assert (*RULE_SETTINGS, "benchmark") == RULES  # which has a test file of its own
    assert broken_rule({}, "", FilterConfig()) is None


@pytest.mark.parametrize("rule", RULE_SETTINGS)
def test_a_rule_keeps_what_fits_and_rejects_the_rest_by_name(rule: str) -> None:
    key, fits, does_not = RULE_SETTINGS[rule]
    assert broken(FilterConfig(**{key: fits})) is None
    assert broken(FilterConfig(**{key: does_not})) == rule


def test_the_first_broken_rule_is_reported() -> None:
    strict = {key: does_not for key, _, does_not in RULE_SETTINGS.values()}
    for rule in RULE_SETTINGS:
        assert broken(FilterConfig(**strict)) == rule
        del strict[RULE_SETTINGS[rule][0]]
    assert broken(FilterConfig(**strict)) is None


@pytest.mark.parametrize("document", [{}, {"meta": None}, {"meta": 3}, {"meta": dict.fromkeys(META)}], ids=str)
@pytest.mark.parametrize("rule", RULES[:5])
def test_a_rule_on_meta_rejects_documents_without_the_field(rule: str, document: dict[str, Any]) -> None:
    key, fits, _ = RULE_SETTINGS[rule]
    assert broken_rule(document, TEXT, FilterConfig(**{key: fits})) == rule


@pytest.mark.parametrize(
    ("stars", "kept"), [("12", True), ("9", False), (12.0, True), ("many", False), (float("nan"), False)]
)
def test_stars_may_be_digits_or_a_float(stars: Any, kept: bool) -> None:
    assert (broken(FilterConfig(min_stars=10), stars=stars) is None) == kept


@pytest.mark.parametrize(
    ("licence", "kept"), [(["mit"], True), (["MIT", "BSD-2-Clause"], True), (["MIT", "GPL-3.0"], False), ([], False)]
)
def test_every_licence_of_a_document_must_be_accepted(licence: list[str], kept: bool) -> None:
    assert (broken(FilterConfig(licences=["MIT", "bsd-2-clause"]), license=licence) is None) == kept


@pytest.mark.parametrize(
    ("expression", "kept"),
    [
        ("MIT OR GPL-3.0-only", True),
        ("MIT AND GPL-3.0-only", False),
        ("(MIT OR GPL-3.0-only) AND ISC", False),
        ("(MIT OR GPL-3.0-only) AND LGPL-2.1-or-later", True),
        ("MIT AND (ISC OR (LGPL-2.1+ AND MIT))", True),
        ("BSD 3-Clause New or Revised License", True),
    ],
)
def test_one_choice_of_an_expression_must_be_accepted(expression: str, kept: bool) -> None:
    rules = FilterConfig(licences=["mit", "LGPL-2.1", "BSD 3-Clause New or Revised License"])
    assert (broken(rules, license=expression) is None) == kept


def test_fields_are_found_under_the_names_of_other_datasets() -> None:
    row = {
        "content": TEXT,
        "max_stars_repo_name": "octo/cat",
        "max_stars_count": 12.0,
        "lang": "Python",
        "path": "src/f.py",
        "mime_type": "text/x-python",
        "max_stars_repo_licenses": ["MIT"],
    }
    assert code_clippy_meta(row) == META == code_clippy_meta({"meta": META})


def test_the_meta_of_redpajama_is_json_with_the_bytes_of_each_language() -> None:
    languages = [{"name": "Shell", "bytes": "70"}, {"name": "Python", "bytes": "3000"}, {"name": "C"}]
    fields = {"repo_name": "octo/cat", "path": "src/f.py", "license": "MIT", "language": languages}
    row = {"text": TEXT, "meta": json.dumps(fields), "red_pajama_subset": "github"}
    assert code_clippy_meta(row) == {**META, "stars": None, "mime_type": None}
    for unusable in ("{", "[]", "7", "[" * 100_000):
        assert set(code_clippy_meta({"text": TEXT, "meta": unusable}).values()) == {None}


def test_the_fields_of_the_stack_2() -> None:
    row = {"repo_name": "octo/cat", "path": "src/f.py", "gha_stargazers_count": 12, "gha_language": "Python"}
    found = code_clippy_meta({**row, "star_events_count": None, "detected_licenses": ["MIT"]})
    assert found == {**META, "mime_type": None}


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
COLUMNS = sorted({name for names in META_COLUMNS.values() for name in names})
FIELDS = st.dictionaries(st.sampled_from(COLUMNS), SCALARS | st.lists(SCALARS, max_size=2), max_size=5)


@pytest.mark.slow
@given(FIELDS | st.fixed_dictionaries({"meta": FIELDS}))
def test_any_document_gets_a_verdict(document: dict[str, Any]) -> None:
    rules = FilterConfig(**{key: fits for key, fits, _ in RULE_SETTINGS.values()})
    assert broken_rule(document, TEXT, rules) in (None, *RULES)


@given(TEXTS, st.integers(1, 40))
def test_size_is_counted_in_bytes_of_utf8(text: str, limit: int) -> None:
    assert (broken(FilterConfig(min_bytes=limit), text) is None) == (len(text.encode()) >= limit)
    assert (broken(FilterConfig(max_bytes=limit), text) is None) == (len(text.encode()) <= limit)


@given(TEXTS, st.integers(1, 10))
def test_lines_are_measured_in_characters(text: str, limit: int) -> None:
    lengths = [len(line) for line in text.splitlines()]
    assert (broken(FilterConfig(max_line_length=limit), text) is None) == (max(lengths, default=0) <= limit)
    mean = sum(lengths) / len(lengths) if lengths else 0
    assert (broken(FilterConfig(max_mean_line_length=limit), text) is None) == (mean <= limit)


@given(TEXTS, st.floats(0, 1))
def test_letters_and_digits_are_those_of_unicode(text: str, share: float) -> None:
    kept = sum(character.isalnum() for character in text) >= share * len(text)
    assert (broken(FilterConfig(min_alphanumeric=share), text) is None) == kept


def test_a_share_above_one_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"filter.min_alphanumeric=25.0: must be at most 1"):
        compose(CorpusConfig, ["out=x", "filter.min_alphanumeric=25"])
