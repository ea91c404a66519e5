"""The name of a git repository: the origin that it was cloned from.

Promises: neither git nor any program of the repository runs; only the last two parts of an origin's address are kept,
so no user name or token is.
"""

import re
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


def _git_folder(folder: Path) -> Path:
    """`.git`, or where it points to: in a submodule it is a file."""
    git = folder / ".git"
    if git.is_file():
        return folder / git.read_text(errors="replace").partition("gitdir:")[2].strip()
    return git
