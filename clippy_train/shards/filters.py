"""Which documents belong in a corpus: named rules on a document's text and its Code Clippy meta.

Promises: pure; every rule is off until its key is set; a document is counted under the first rule that it breaks, in
the order of `RULES`; files that rules name are read once. Cost: rules on meta and size are almost free; rules on lines
read the text at some 300 MB/s, the one on letters and digits at some 45 MB/s (tokenising: 2 to 3 MB/s), that on
benchmarks at 5 MB/s.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

from clippy_train.config import FilterConfig
from clippy_train.errors import ConfigError
from clippy_train.shards.benchmarks import held_problem
from clippy_train.shards.redact import redacted

# Fields of the Code Clippy meta, each with its names in other datasets: GitHub on BigQuery, CodeParrot, RedPajama, The
# Stack 1 and 2, StarCoder.
META_COLUMNS = {
    "repo_name": ("repo_name", "repository_name", "repo", "max_stars_repo_name"),
    "stars": ("stars", "star_events_count", "max_stars_count", "gha_stargazers_count"),
    "repo_language": ("repo_language", "language", "lang", "gha_language"),
    "file_name": ("file_name", "path", "file_path", "max_stars_repo_path"),
    "mime_type": ("mime_type",),
    "license": ("license", "licenses", "detected_licenses", "max_stars_repo_licenses", "gha_license_id"),
}
_VERSION = re.compile(r"-only$|-or-later$|\+$")


def broken_rule(document: dict[str, Any], text: str, rules: FilterConfig, prompt: str = "") -> str | None:
    """The name of the first of `RULES` that a document breaks, or None.

    A rule needs evidence: a document breaks it if its meta lacks the field in question (`min_stars=10` rejects a
    document of unknown stars, `licences=[mit]` one without a licence). Case matters in extensions (`.C` is not `.c`),
    but not in languages and licences.

    Args:
        document: has its fields under `meta` as in Code Clippy, or at the top level under the names of `META_COLUMNS`.
        text: the document's text, valid Unicode.
        prompt: what the text continues. Only `decontaminate` looks at it; all other rules are about the text.
    """
    meta = code_clippy_meta(document)
    return broken_meta_rule(meta, rules) or broken_text_rule(text, rules, prompt)


def require_rules(rules: FilterConfig) -> None:
    """Read what the rules need, so that a rule that cannot be followed is refused before anything starts.

    Raises:
        ConfigError, DataError: a file or a package is missing, or a file has another format.
    """
    recorded_rules(rules)
    held_problem("", rules.decontaminate)
    redacted("", rules.redact)
    if rules.opt_out:
        _names(rules.opt_out)


def recorded_rules(rules: FilterConfig) -> dict[str, Any]:
    """The rules with the names and contents of their files, wherever these are: `NAME@DIGEST`.

    Raises:
        ConfigError: a file cannot be read.
    """
    benchmarks = [_recorded_file(name, "filter.decontaminate") for name in rules.decontaminate]
    opted_out = rules.opt_out and _recorded_file(rules.opt_out, "filter.opt_out")
    return {**dataclasses.asdict(rules), "decontaminate": benchmarks, "opt_out": opted_out}


def _recorded_file(name: str, key: str) -> str:
    try:
        return f"{Path(name).name}@{hashlib.sha256(Path(name).read_bytes()).hexdigest()[:12]}"
    except OSError as error:
        raise ConfigError(f"{key}={name} cannot be read: {error.strerror}") from error


def broken_meta_rule(meta: dict[str, Any], rules: FilterConfig) -> str | None:
    """As `broken_rule`, for the rules on the Code Clippy meta."""
    return next((name for name, breaks in _META_RULES.items() if breaks(meta, rules)), None)


def broken_text_rule(text: str, rules: FilterConfig, prompt: str = "") -> str | None:
    """As `broken_rule`, for the rules on the text."""
    broken = next((name for name, breaks in _TEXT_RULES.items() if breaks(text, rules)), None)
    return broken or (BENCHMARK if _benchmark(prompt + text, rules) else None)


def code_clippy_meta(document: dict[str, Any]) -> dict[str, Any]:
    """The Code Clippy meta of a document, None for what is unknown.

    `stars` is an int. Several licences become one expression, `A AND B`: a filter must accept them all.
    """
    fields = _meta(document)
    found = {name: _first_known(fields, columns) for name, columns in META_COLUMNS.items()}
    found["repo_language"] = _main_language(found["repo_language"])
    texts = {name: value if isinstance(value, str) else None for name, value in found.items()}
    return {**texts, "stars": _number(found["stars"]), "license": _licence(found["license"])}


def _meta(document: dict[str, Any]) -> dict[str, Any]:
    """The field `meta`, an object or (in RedPajama's parquet) one as JSON; without it, the document itself."""
    meta = document.get("meta")
    if isinstance(meta, str):
        try:
            meta = json.loads(meta)
        except (ValueError, RecursionError):
            meta = None
    return meta if isinstance(meta, dict) else document


def _main_language(value: Any) -> Any:
    """The language, or in RedPajama the one with the most bytes of a repository's languages."""
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        return value
    nothing: dict[str, Any] = {}
    return max(value, key=lambda each: _number(each.get("bytes")) or 0, default=nothing).get("name")


def _first_known(fields: dict[str, Any], columns: Iterable[str]) -> Any:
    return next((fields[column] for column in columns if fields.get(column) not in (None, "", [])), None)


def _number(value: Any) -> int | None:
    """Stars are a number in some versions of the corpus, digits in others, and a float in a column with nulls."""
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _licence(value: Any) -> str | None:
    names = value if isinstance(value, list | tuple) else [value]
    return " AND ".join(sorted({name for name in names if isinstance(name, str) and name})) or None


def has_extension(name: str, extensions: list[str]) -> bool:
    """Whether a file has one of the extensions, if there are any."""
    return not extensions or name.endswith(tuple(f".{extension.lstrip('.')}" for extension in extensions))


def _wrong_extension(meta: dict[str, Any], rules: FilterConfig) -> bool:
    return not has_extension(meta["file_name"] or "", rules.extensions)


def _wrong_language(meta: dict[str, Any], rules: FilterConfig) -> bool:
    accepted = {name.casefold() for name in rules.languages}
    return bool(accepted) and (meta["repo_language"] or "").casefold() not in accepted


def _wrong_licence(meta: dict[str, Any], rules: FilterConfig) -> bool:
    return bool(rules.licences) and not _permitted(meta["license"] or "", rules.licences)


def _permitted(expression: str, licences: list[str]) -> bool:
    """Whether an SPDX expression leaves a choice of licences that are all accepted; versions "only" and "or later" are
    accepted with their licence."""
    accepted = {name.casefold() for name in licences}
    while inner := re.search(r"\(([^()]*)\)", expression):  # the innermost parentheses become one name
        verdict = licences[0] if _permitted(inner[1], licences) else "refused"
        expression = f"{expression[: inner.start()]}{verdict}{expression[inner.end() :]}"
    choices = [choice.casefold().split(" and ") for choice in expression.split(" OR ")]
    return any(all({name, _VERSION.sub("", name)} & accepted for name in choice) for choice in choices)


def _few_stars(meta: dict[str, Any], rules: FilterConfig) -> bool:
    return rules.min_stars is not None and (meta["stars"] is None or meta["stars"] < rules.min_stars)


def _opted_out(meta: dict[str, Any], rules: FilterConfig) -> bool:
    return rules.opt_out is not None and (meta["repo_name"] or "").casefold() in {"", *_names(rules.opt_out)}


@cache
def _names(path: str) -> frozenset[str]:
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"filter.opt_out={path} cannot be read: {error}") from error
    return frozenset(line.strip().casefold() for line in lines) - {""}


def _too_small(text: str, rules: FilterConfig) -> bool:
    return rules.min_bytes is not None and len(text.encode()) < rules.min_bytes


def _too_large(text: str, rules: FilterConfig) -> bool:
    return rules.max_bytes is not None and len(text.encode()) > rules.max_bytes


def _long_line(text: str, rules: FilterConfig) -> bool:
    longest = rules.max_line_length
    return longest is not None and any(len(line) > longest for line in text.splitlines())


def _long_mean_line(text: str, rules: FilterConfig) -> bool:
    longest = rules.max_mean_line_length
    if longest is None:
        return False
    lengths = [len(line) for line in text.splitlines()]
    return sum(lengths) > longest * len(lengths)


def _benchmark(text: str, rules: FilterConfig) -> bool:
    return bool(rules.decontaminate) and held_problem(text, rules.decontaminate) is not None


def _low_alphanumeric(text: str, rules: FilterConfig) -> bool:
    share = rules.min_alphanumeric
    return share is not None and sum(map(str.isalnum, text)) < share * len(text)


_META_RULES: dict[str, Callable[[dict[str, Any], FilterConfig], bool]] = {
    "extension": _wrong_extension,
    "language": _wrong_language,
    "licence": _wrong_licence,
    "few_stars": _few_stars,
    "opted_out": _opted_out,
}
_TEXT_RULES: dict[str, Callable[[str, FilterConfig], bool]] = {
    "too_small": _too_small,
    "too_large": _too_large,
    "long_line": _long_line,
    "long_mean_line": _long_mean_line,
    "low_alphanumeric": _low_alphanumeric,
}
BENCHMARK = "benchmark"
RULES: tuple[str, ...] = (*_META_RULES, *_TEXT_RULES, BENCHMARK)
