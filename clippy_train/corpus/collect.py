"""Find source files in folders and say to which repository (or package) each belongs.

Nothing is read here but folder listings: memory is one path per file.
"""

import mimetypes
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pygments.lexers import find_lexer_class_for_filename

from clippy_train.errors import DataError

# Folders that hold other people's code, build products or no code.
SKIPPED = {".git", ".hg", ".svn", "__pycache__", "node_modules", "site-packages", "dist-packages", ".venv", ".tox"}


@dataclass(frozen=True)
class SourceFile:
    path: Path
    repository: str  # what is never split between train, validation and test
    name: str  # path inside its source folder


def python_sources() -> list[Path]:
    """The source code that every Python carries: its standard library and, where present, its C headers."""
    folders = (sysconfig.get_path("stdlib"), sysconfig.get_path("include"))
    return [Path(folder) for folder in folders if folder and Path(folder).is_dir()]


def source_files(folders: list[Path]) -> list[SourceFile]:
    """Every file below the folders, sorted.

    A folder with a `.git` is one repository. Otherwise each of its entries is one: a package, or a single module.
    Where one repository is all there is, its own entries are taken, since nothing could be held out otherwise.

    Raises:
        DataError: a folder does not exist.
    """
    found: dict[Path, SourceFile] = {}  # by path: folders may overlap
    for folder in folders:
        if not folder.is_dir():
            raise DataError(f"src: no such folder: {folder}")
        root = folder.resolve()
        for path in _walk(root):
            inside = Path(_readable(path.relative_to(root)))
            name = _readable(Path(root.name))
            repository = name if len(folders) > 1 and (root / ".git").exists() else Path(inside.parts[0]).stem
            found.setdefault(path, SourceFile(path, repository, f"{name}/{inside.as_posix()}"))
    return sorted(found.values(), key=lambda file: file.name)


def _walk(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in SKIPPED)
        for name in files:
            path = Path(folder, name)
            if not path.is_symlink():
                yield path


def _readable(path: Path) -> str:
    """A path as text that can be written: Linux allows names that are not UTF-8."""
    return os.fsencode(path).decode(errors="replace")


@lru_cache(maxsize=4096)
def language(suffix: str) -> str | None:
    """The programming language of a file ending (with its dot) by Pygments' table, or None."""
    lexer = find_lexer_class_for_filename(f"file{suffix}")
    return lexer.name if lexer else None


def mime_type(name: str) -> str:
    return mimetypes.guess_type(name)[0] or "text/plain"
