"""What a repository says about itself: its name (the origin that it was cloned from) and its licence.

Promises: neither git nor any program of the repository runs; only the last two parts of an origin's address are kept,
so no user name or token is. Cost: some 20 ms to compare a licence text with those of choosealicense.com.
"""

import re
from configparser import ConfigParser
from configparser import Error as ConfigParserError
from functools import lru_cache
from pathlib import Path

from identify.identify import license_id

MAX_LICENCE_BYTES = 200_000  # larger files hold more than one licence; the longest known one has 35,000
_LICENCE_FILE = re.compile(r"(licen[cs]e|copying|unlicense)([-._].*)?", re.IGNORECASE)
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


@lru_cache(maxsize=16)
def folder_licence(folder: Path) -> str | None:
    """The SPDX id of the licence in a folder, or None. Several licences give `A AND B`: the files do not say whether
    one may choose, so a filter must accept them all."""
    try:
        files = [path for path in sorted(folder.iterdir()) if _LICENCE_FILE.fullmatch(path.name)]
    except OSError:
        return None
    found = {_licence_in(path) for path in files if path.is_file() and not path.is_symlink()}
    return " AND ".join(sorted(name for name in found if name)) or None


def _licence_in(path: Path) -> str | None:
    try:
        return license_id(str(path)) if path.stat().st_size <= MAX_LICENCE_BYTES else None
    except (OSError, UnicodeDecodeError):
        return None


def _git_folder(folder: Path) -> Path:
    """`.git`, or where it points to: in a submodule it is a file."""
    git = folder / ".git"
    if git.is_file():
        return folder / git.read_text(errors="replace").partition("gitdir:")[2].strip()
    return git
