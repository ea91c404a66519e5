"""Folders of source code -> documents: git repositories at any depth, and plain folders of packages.

Promises: a fixed order, whatever the order of creation; no link is followed and only regular files are opened; a
folder that is given twice, or inside another one, is read once. Memory: one folder's listing.
"""

import json
import logging
import mimetypes
import os
import sysconfig
from collections.abc import Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from clippy_train.config import FilterConfig
from clippy_train.corpus.document import Document, Rejected
from clippy_train.corpus.languages import HEAD, language_of
from clippy_train.corpus.licences import folder_licence, header_licence
from clippy_train.corpus.repository import git_name, is_bare
from clippy_train.corpus.text import decoded
from clippy_train.errors import DataError
from clippy_train.shards.filters import has_extension
from clippy_train.shards.format import MAX_LINE_BYTES

# Folders with third-party code, build products or no code.
SKIPPED = {".git", ".hg", ".svn", "__pycache__", "node_modules", "site-packages", "dist-packages", ".venv", ".tox"}

log = logging.getLogger(__name__)


class Repository(NamedTuple):
    name: str
    base: Path  # the folder that its file names are relative to
    prefix: str  # of its file names


class SourceFile(NamedTuple):
    root: Path  # the source folder that it was found in
    path: Path
    repository: Repository

    def to_json(self) -> str:
        """The file as a line; a name that is not UTF-8 survives."""
        name, base, prefix = self.repository
        return json.dumps([str(self.root), str(self.path), name, str(base), prefix])

    @classmethod
    def from_json(cls, line: str | bytes) -> "SourceFile":
        root, path, name, base, prefix = json.loads(line)
        return cls(Path(root), Path(path), Repository(name, Path(base), prefix))


def python_sources() -> list[Path]:
    """The source code that ships with every Python: its standard library and, if present, its C headers."""
    folders = (sysconfig.get_path("stdlib"), sysconfig.get_path("include"))
    return [Path(folder) for folder in folders if folder and Path(folder).is_dir()]


def source_files(sources: list[Path], out: Path) -> Iterator[SourceFile]:
    """Every regular file below the source folders.

    A folder with a `.git` is one repository, named after its origin, or else after its path; so are all its worktrees.
    A bare clone has no files, and is skipped. A file outside any repository belongs to the top-level entry of its
    source folder: a package, or a single module. A repository that is the only source is divided in the same way, since
    nothing could be held out otherwise.

    Args:
        out: a folder that is not read.

    Raises:
        DataError: a source is not a folder.
    """
    for source in sources:
        if not source.is_dir():
            raise DataError(f"src: no such folder: {source}")
    once = {_inode(source) for source in sources}  # no other folder can be reached twice
    visited = {_inode(out)}
    for root in (source.resolve() for source in sources):
        yield from _files(root, once, visited, is_alone=len(sources) == 1)


def file_documents(files: Iterable[SourceFile], rules: FilterConfig) -> Iterator[Document]:
    """The document of each file.

    A file has the licence that it states itself, or else the nearest one upward in its repository or source folder.

    Args:
        rules: of these, `extensions` and `max_bytes` decide which files are read; without `extensions`, only those in a
            known language.
    """
    licences: dict[Path, str | None] = {}
    for file in files:
        read = partial(_read, file, licences, rules)
        yield Document(_readable(file.path.relative_to(file.root.parent)), file.repository.name, read)


def _files(
    root: Path, once: set[tuple[int, int]], visited: set[tuple[int, int]], is_alone: bool
) -> Iterator[SourceFile]:
    """Every file of a source with its repository; folders of `once` are left out if `visited`, and added to it."""
    pending: list[tuple[Path, Repository | None]] = [(root, None)]
    while pending:
        folder, repository = pending.pop()
        if repository is None and folder != root:
            repository = _package(root, folder.name)
        try:
            if (inode := _inode(folder)) in visited:
                continue
            visited |= {inode} & once
            files, folders = _list_folder(folder)
            if is_bare(folder, files + folders):
                log.warning("%s is a bare repository and is skipped: its files are not checked out", _readable(folder))
                continue
            if (folder / ".git").exists() and not (is_alone and folder == root):
                repository = _git_repository(root, folder)
        except OSError as error:
            log.warning("%s cannot be listed and is skipped: %s", _readable(folder), error.strerror)
            continue
        for name in files:
            yield SourceFile(root, folder / name, repository or _package(root, name))
        pending += [(folder / name, repository) for name in reversed(folders)]


def _nearest_licence(folder: Path, base: Path, known: dict[Path, str | None]) -> str | None:
    """The licence of a folder, or else of the nearest one upward as far as `base`; `known` remembers them."""
    unknown: list[Path] = []
    above = folder
    while above not in known and base not in unknown:
        unknown.append(above)
        above = above.parent
    licence = known.get(above)
    for each in reversed(unknown):
        known[each] = licence = _stated_licence(each) or licence
    return known[folder]


def _stated_licence(folder: Path) -> str | None:
    try:
        files, folders = _list_folder(folder)
    except OSError:
        return None
    return folder_licence(folder, files + folders)


def _list_folder(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the regular files and of the folders in a folder, in a fixed order."""
    with os.scandir(folder) as entries:
        kept = sorted((entry for entry in entries if entry.name not in SKIPPED), key=lambda entry: entry.name)
    files = [entry.name for entry in kept if entry.is_file(follow_symlinks=False)]
    return files, [entry.name for entry in kept if entry.is_dir(follow_symlinks=False)]


def _inode(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _git_repository(root: Path, folder: Path) -> Repository:
    return Repository(_readable(Path(git_name(folder, root.parent if folder == root else root))), folder, "")


def _package(root: Path, name: str) -> Repository:
    """The entry `name` of a source folder."""
    return Repository(_readable(Path(Path(name).stem)), root, f"{_readable(Path(root.name))}/")


def _read(file: SourceFile, licences: dict[Path, str | None], rules: FilterConfig) -> tuple[str, dict[str, Any]]:
    path, repository = file.path, file.repository
    name = repository.prefix + _readable(path.relative_to(repository.base))
    if not has_extension(name, rules.extensions):
        raise Rejected("extension")
    try:
        with path.open("rb") as content:
            head = content.read(HEAD)
            language = language_of(name, head.decode("latin-1"))
            if language is None and not rules.extensions:
                raise Rejected("no_language")
            if os.fstat(content.fileno()).st_size > min(rules.max_bytes or MAX_LINE_BYTES, MAX_LINE_BYTES):
                raise Rejected("too_large")
            text = decoded(head + content.read())
    except OSError:
        raise Rejected("unreadable") from None
    return text, {
        "repo_name": repository.name,
        "stars": None,
        "repo_language": language or "Text",
        "file_name": name,
        "mime_type": mime_type(name),
        "license": header_licence(text[:HEAD]) or _nearest_licence(path.parent, repository.base, licences),
    }


def _readable(path: Path) -> str:
    """A path as valid UTF-8, which Linux does not require of names."""
    return os.fsencode(path).decode(errors="replace")


def mime_type(name: str) -> str:
    return _mime_types().guess_type(name)[0] or "text/plain"


@cache
def _mime_types() -> mimetypes.MimeTypes:
    """Python's own table, without what the machine's /etc/mime.types adds."""
    return mimetypes.MimeTypes()
