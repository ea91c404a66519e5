"""Files behind a connection that may fail: every request is retried from the same position, after growing pauses."""

import io
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import fsspec
import tenacity

from clippy_train.errors import ClippyError, DataError

T = TypeVar("T")

HTTP = ("http://", "https://")
ATTEMPTS = 6  # of a request, with pauses between them that double: about 15 s
FIRST_PAUSE = 0.5  # seconds
REQUEST_SECONDS = 60.0  # without an answer after which a request over HTTP has failed

log = logging.getLogger(__name__)


def filesystem(name: str) -> Any:
    """The file system of a path or URL; made anew in a forked process, as fsspec demands."""
    if "://" not in name:
        return fsspec.filesystem("file")
    options = {}
    if name.startswith(HTTP):
        from aiohttp import ClientTimeout

        options = {"client_kwargs": {"timeout": ClientTimeout(sock_connect=REQUEST_SECONDS, sock_read=REQUEST_SECONDS)}}
    return fsspec.core.url_to_fs(name, **options)[0]


class RetriedFile(io.RawIOBase):
    """A shard open for reading, whose every request is tried again from the same position when it fails.

    Raises:
        DataError: it does not exist, or goes on failing.
    """

    def __init__(self, name: str, what: str) -> None:
        self._name, self._what = name, what
        self._position = 0
        try:
            self._file = retried(self._opened, what=what)
        except FileNotFoundError as error:
            raise DataError(f"{what} is not there any more") from error
        self._size: int | None = self._file.size  # of the file that was opened first: another may take its place

    def read(self, size: int = -1) -> bytes:
        data = retried(self._read, size, what=self._what)
        self._position += len(data)
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self._size or 0)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

    def _opened(self) -> Any:
        return filesystem(self._name).open(self._name, "rb", cache_type="none")

    def _read(self, size: int) -> bytes:
        if self._file.closed:
            self._file = self._opened()
        try:
            if self._file.tell() != self._position:
                self._file.seek(self._position)
            data = self._file.read(size)
            if not data and size and self._position < (self._size or 0):
                raise OSError(f"ended after {self._position} of {self._size} bytes")
            return data
        except Exception:
            self._file.close()  # whatever state it is in, the next attempt opens it anew
            raise


def retried(function: Callable[..., T], *args: Any, what: str, **kwargs: Any) -> T:
    """Call a function of a file system, again after growing pauses while it fails.

    Raises:
        FileNotFoundError, NotADirectoryError: at once.
        DataError: it failed `ATTEMPTS` times; the message begins with `what`.
    """

    def announce(state: tenacity.RetryCallState) -> None:
        pause = state.next_action.sleep if state.next_action else 0.0
        error = state.outcome.exception() if state.outcome else None
        log.warning("%s failed (%s); next attempt in %.1f s", what, described_error(error), pause)

    attempts = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(ATTEMPTS),
        wait=tenacity.wait_exponential(FIRST_PAUSE) + tenacity.wait_random(0, FIRST_PAUSE),
        retry=tenacity.retry_if_exception(_may_pass),
        before_sleep=announce,
        reraise=True,
    )
    try:
        return attempts(function, *args, **kwargs)
    except (FileNotFoundError, NotADirectoryError, ClippyError):
        raise
    except Exception as error:
        raise DataError(f"{what} cannot be read: {described_error(error)}") from error


def _may_pass(error: BaseException) -> bool:
    """Whether an error of a file system may be gone the next time. Each has exceptions of its own kinds."""
    lasting = (FileNotFoundError, NotADirectoryError, PermissionError, IsADirectoryError, ImportError, ClippyError)
    return isinstance(error, Exception) and not isinstance(error, lasting)


def described_error(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {error}".strip(": ")
