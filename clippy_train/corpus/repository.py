"""Git repositories: their names, after the origin that they were cloned from, and whether they have files at all.

Promises: neither git nor any program of the repository runs; only the last two parts of an origin's address are kept,
so no user name or token is.
"""

import re
from collections.abc import Iterable
from configparser import ConfigParser
from configparser import Error as ConfigParserError
from pathlib import Path

_OWNER_AND_NAME = re.compile(r"([^/:@\\\s]+/[^/:@\\\s]+?)(?:\.git)?/*$")


def origin_name(folder: Path) -> str | None:
    """OWNER/REPO of the remote `origin` of a git repository, or None."""
    config = ConfigParser(strict=False, interpolation=None, allow_no_value=True)
    try:
        with (_git_folder(folder) / "config").open(encoding="utf-8", errors="replace") as file:
            config.read_file(file)
        address = config.get('remote "origin"', "url")
    except (OSError, ValueError, ConfigParserError):
        return None
    match = _OWNER_AND_NAME.search(address or "")
    return match[1] if match else None


def git_name(folder: Path, base: Path) -> str:
    """The origin of a git repository, or else the path of its main working tree, relative to `base` if it is inside."""
    git = _git_folder(folder).resolve()
    main = git.parent if git.name == ".git" else folder
    return origin_name(folder) or str(main.relative_to(base) if main.is_relative_to(base) else main.name)


def is_bare(folder: Path, names: Iterable[str]) -> bool:
    """Whether a folder with these entries is a repository without a working tree (`git clone --bare` or `--mirror`)."""
    return {"HEAD", "config", "objects", "refs"} <= set(names) and (folder / "objects").is_dir()


def _git_folder(folder: Path) -> Path:
    """`.git`, or where it points to: in a submodule and a worktree it is a file; a worktree's is its repository's."""
    git = folder / ".git"
    if not git.is_file():
        return git
    git = folder / git.read_text(errors="replace").partition("gitdir:")[2].strip()
    common = git / "commondir"
    return git / common.read_text(errors="replace").strip() if common.is_file() else git
