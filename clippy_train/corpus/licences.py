"""The licence of a folder or a file, as an SPDX expression.

A folder states it by licence files (whose texts are compared with those of choosealicense.com), by a REUSE folder
`LICENSES`, or in its package's metadata; a file by a header `SPDX-License-Identifier`. What is not a valid SPDX
expression is ignored. Promises: only regular files are opened, and none above `MAX_BYTES`. Cost: some 20 ms for a
licence file that does not contain a known text unchanged, next to nothing otherwise.
"""

import json
import re
import tomllib
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

from identify.identify import license_id
from identify.vendor.licenses import LICENSES
from packaging.licenses import canonicalize_license_expression

MAX_BYTES = 200_000  # larger files hold more than one licence; the longest known one has 35,000
REUSE = "LICENSES"  # a folder of texts, each named by its SPDX id
_LICENCE_FILE = re.compile(r"([\w.]+-)?(licen[cs]e|copying|unlicense)([-._].*)?", re.IGNORECASE)
_HEADER = re.compile(r"SPDX-License-Identifier:[ \t]*([^\n]*?)[ \t]*(?:\*/|-->|\*\)|\"|\r|\n|$)")
# The terms of a known text follow its title and copyright; an appendix follows them.
_TERMS = re.compile(r"(?:.*(?:\[year\].*?\n|Everyone is permitted))?(.*?)(?:END OF TERMS AND CONDITIONS.*)?", re.DOTALL)


def folder_licence(folder: Path, names: Iterable[str]) -> str | None:
    """The licence that a folder with these entries states, or None. Several texts give `A AND B`: the files do not say
    whether one may choose, so a filter must accept them all."""
    files = sorted(set(names))
    texts = {licence for name in files if _LICENCE_FILE.fullmatch(name) for licence in _licences_in(folder / name)}
    if REUSE in files:
        texts |= {valid for name in _entries(folder / REUSE) if (valid := expression(Path(name).stem))}
    stated = " AND ".join(sorted(texts))
    return stated or next((found for name in files if (found := _metadata_licence(folder / name))), None)


def header_licence(head: str) -> str | None:
    """The licence that a file states in its first lines, or None."""
    found = _HEADER.search(head)
    return expression(found[1]) if found else None


def expression(value: Any) -> str | None:
    """A valid SPDX expression in its canonical form, or None."""
    try:
        return str(canonicalize_license_expression(value)) if isinstance(value, str) else None
    except ValueError:
        return None


def _licences_in(path: Path) -> set[str]:
    """Every known licence whose terms are part of a file, or else the one that differs little from it."""
    content = _content(path)
    words = _words(content)
    found = {licence for licence, terms in _known_terms() if terms in words}
    similar = None if found or not content else license_id(str(path))
    return found | ({similar} if similar else set())


def _words(text: str) -> str:
    return f" {' '.join(re.findall(r'[a-z0-9]+', text.casefold()))} "


@cache
def _known_terms() -> list[tuple[str, str]]:
    terms = ((licence, _TERMS.fullmatch(text)) for licence, text in LICENSES)
    return [(licence, _words(match[1])) for licence, match in terms if match]


def _metadata_licence(path: Path) -> str | None:
    """The licence in a package's metadata, if the file is one of `_METADATA`."""
    parse, stated = _METADATA.get(path.name, (None, None))
    if not parse or not stated:
        return None
    try:
        return expression(stated(parse(_content(path))))
    except (ValueError, AttributeError, RecursionError):
        return None


def _npm_licence(package: Any) -> Any:
    """`license`, or in old packages the only one of `licenses`, which may be objects with a `type`."""
    several = package.get("licenses")
    stated = package.get("license", several[0] if isinstance(several, list) and len(several) == 1 else None)
    return stated.get("type") if isinstance(stated, dict) else stated


def _python_licence(project: Any) -> Any:
    """`project.license`, a text or a table with one, or else the setting of Poetry."""
    stated = project.get("project", {}).get("license") or project.get("tool", {}).get("poetry", {}).get("license")
    return stated.get("text") if isinstance(stated, dict) else stated


def _rust_licence(manifest: Any) -> Any:
    stated = manifest.get("package", {}).get("license")
    return stated.replace("/", " OR ") if isinstance(stated, str) else None


_METADATA: dict[str, tuple[Callable[[str], Any], Callable[[Any], Any]]] = {
    "package.json": (json.loads, _npm_licence),
    "pyproject.toml": (tomllib.loads, _python_licence),
    "Cargo.toml": (tomllib.loads, _rust_licence),
}


def _content(path: Path) -> str:
    """The text of a small regular file, or nothing."""
    try:
        is_small = path.is_file() and not path.is_symlink() and path.stat().st_size <= MAX_BYTES
        return path.read_text(encoding="utf-8") if is_small else ""
    except (OSError, UnicodeDecodeError):
        return ""


def _entries(folder: Path) -> list[str]:
    try:
        return [] if folder.is_symlink() else [path.name for path in folder.iterdir()]
    except OSError:
        return []
