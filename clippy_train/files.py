"""Files and folders that are complete or absent: written under another name beside their place, then renamed."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import TextIO

from clippy_train.errors import ConfigError

STAGING = ".writing"  # suffix of what is not complete yet
NO_ROOM = 1 << 16  # bytes: less than this left on a file system explains a write that failed
LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # how a file begins whose content Git LFS did not fetch


@contextmanager
def atomic_write(path: Path, durable: bool = False) -> Iterator[TextIO]:
    """Open a text file that replaces `path` as a whole when the block ends; if the block raises, nothing changes.

    A link stays, and what it names is replaced.

    Args:
        durable: flush the content to the disk first.
    """
    path = path.resolve()
    staging = path.with_name(path.name + STAGING)
    try:
        with staging.open("w", newline="") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        staging.replace(path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise


@contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Keep other processes out of a block, by a file that exists only while one is in it.

    Args:
        busy: what to tell a second one.

    Raises:
        ConfigError: another process is in the block.
    """
    with path.open("a") as lock:
        if not take_lock(lock.fileno()) or not os.fstat(lock.fileno()).st_nlink:  # its holder has just removed it
            raise ConfigError(busy)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def take_lock(descriptor: int) -> bool:
    """Whether this process now holds the lock on a file. True as well where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def require_writable(out: str | None) -> None:
    """Check before the work, not after, that the file that `out=` names can be written; None names none.

    Raises:
        ConfigError: it is a folder or a device, or its folder is not writable.
    """
    if out is None:
        return
    path = Path(out)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out={path}: {error}") from error
    if (path.exists() and not path.is_file()) or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"out={path} is not a file, or its folder is not writable: name a file")


def replace_link(link: Path, target: Path) -> None:
    """Make `link` a symbolic link to `target`, which is in the same folder; an older link is replaced in one step."""
    staging = link.with_name(link.name + STAGING)
    staging.unlink(missing_ok=True)
    staging.symlink_to(target.name)
    try:
        staging.replace(link)
    except OSError:
        staging.unlink()
        raise


def fsync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(path: Path, setting: str) -> Iterator[Path]:
    """Fill a new folder: yields a staging folder that becomes `path` when the block ends and is removed if it raises.

    Args:
        setting: the key that names `path`, for the message.

    Raises:
        ConfigError: `path` holds something, since nothing is ever overwritten; or it cannot be made.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{setting}={path} exists and is not empty: choose another folder or remove it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise ConfigError(f"{setting}={path} cannot be made: {error.strerror}") from error
    try:
        yield staging
        staging.chmod(0o777 & ~_umask())
        staging.rename(path)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def full_disks(*paths: Path) -> str:
    """Which of these existing paths have no room left, as a part of a sentence; libraries have other words for it."""
    return " and ".join(str(path) for path in paths if _is_full(path))


def _is_full(path: Path) -> bool:
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize < NO_ROOM or (found.f_files > 0 and found.f_favail == 0)


def looks_local(name: str) -> bool:
    """Whether a name is a path: a hub name is NAME or ORGANISATION/NAME."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists()


def file_name(value: str) -> str:
    """The name of a file or folder; a hub's name, which has no ending, stays."""
    path = PurePath(value)
    return value if value.count("/") == 1 and not path.suffix and not path.is_absolute() else path.name


def lfs_hint(folder: Path) -> str:
    """What to do about a folder that cannot be loaded because Git LFS did not fetch its files; else nothing."""
    for path in sorted(folder.glob("*")):
        if path.is_file():
            with path.open("rb") as file:
                if file.read(len(LFS_POINTER)) == LFS_POINTER:
                    return f" ({path.name} is only a pointer of Git LFS: run `git lfs pull` in that folder)"
    return ""
