"""Files on connections that may fail: every request is retried from the same position, with growing pauses."""

import io
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import fsspec
import tenacity

from clippy_train.errors import ClippyError, DataError

T = TypeVar("T")

HTTP = ("http://", "https://")
ATTEMPTS = 6  # per request, with pauses that double: about 15 s in all
FIRST_PAUSE = 0.5  # seconds
REQUEST_SECONDS = 60.0  # without an answer, then an HTTP request has failed

log = logging.getLogger(__name__)


def filesystem(name: str) -> Any:
    """The file system of a path or URL; a new one in a forked process, as fsspec requires."""
    if "://" not in name:
        return fsspec.filesystem("file")
    options = {}
    if name.startswith(HTTP):
        from aiohttp import ClientTimeout

        options = {"client_kwargs": {"timeout": ClientTimeout(sock_connect=REQUEST_SECONDS, sock_read=REQUEST_SECONDS)}}
    return fsspec.core.url_to_fs(name, **options)[0]


class RetriedFile(io.RawIOBase):
    """A shard open for reading; a request that fails is retried from the same position.

    Args:
        what: names the shard in messages.

    Raises:
        DataError: it does not exist, or keeps failing.
    """

    def __init__(self, name: str, what: str) -> None:
        self._name, self._what = name, what
        self._position = 0
        self._file = retried(self._opened, what=what)
        self._size: int | None = self._file.size  # when first opened: the file may be replaced later

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
        try:
            return filesystem(self._name).open(self._name, "rb", cache_type="none")
        except FileNotFoundError as error:
            cause = error.__cause__  # fsspec says "not found" of every HTTP request that fails here, by a timeout too
            if cause is not None and getattr(cause, "status", None) not in (404, 410):
                raise cause from None
            raise DataError(f"{self._what} no longer exists") from error

    def _read(self, size: int) -> bytes:
        if self._file.closed:
            self._file = self._opened()
        try:
            if self._file.tell() != self._position:
                self._file.seek(self._position)
            data: bytes = self._file.read(size)
            if not data and size and self._position < (self._size or 0):
                raise OSError(f"ended after {self._position} of {self._size} bytes")
            return data
        except Exception:
            self._file.close()  # its state is unknown; the next attempt opens it again
            raise


def retried(function: Callable[..., T], *args: Any, what: str, **kwargs: Any) -> T:
    """Call a function of a file system, and again after growing pauses while it fails.

    Raises:
        FileNotFoundError, NotADirectoryError: at once.
        DataError: it failed `ATTEMPTS` times; the message begins with `what`.
    """

    def log_failure(state: tenacity.RetryCallState) -> None:
        pause = state.next_action.sleep if state.next_action else 0.0
        error = state.outcome.exception() if state.outcome else None
        log.warning("%s failed (%s); next attempt in %.1f s", what, error_summary(error), pause)

    attempts = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(ATTEMPTS),
        wait=tenacity.wait_exponential(FIRST_PAUSE) + tenacity.wait_random(0, FIRST_PAUSE),
        retry=tenacity.retry_if_exception(_is_transient),
        before_sleep=log_failure,
        reraise=True,
    )
    try:
        return attempts(function, *args, **kwargs)
    except (FileNotFoundError, NotADirectoryError, ClippyError) as error:
        # The frames of the attempts hold it in a cycle, and through it what all callers hold (loader processes, say).
        error.__traceback__ = None
        raise
    except Exception as error:
        raise DataError(f"{what} cannot be read: {error_summary(error)}") from error


def _is_transient(error: BaseException) -> bool:
    """Whether a retry may succeed. File systems raise their own classes, so only the permanent errors are listed."""
    permanent = (FileNotFoundError, NotADirectoryError, PermissionError, IsADirectoryError, ImportError, ClippyError)
    return isinstance(error, Exception) and not isinstance(error, permanent)


def error_summary(error: BaseException | None) -> str:
    """The type and message of an error."""
    return f"{type(error).__name__}: {error}".strip(": ")
