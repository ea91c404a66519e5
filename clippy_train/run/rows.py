"""The files of rows in a run's folder, one JSON object a line: what was logged at which step. Needs no torch."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clippy_train.files import atomic_write

log = logging.getLogger(__name__)


class RowFile:
    """One JSON object a line. Rows behind `resumed_step`, of another life of the run, go first: they come again.

    Rows that a full disk refuses wait for the next one that it takes.
    """

    def __init__(self, path: Path, resumed_step: int) -> None:
        self.path = path
        with atomic_write(path) as file:
            file.writelines(json.dumps(row) + "\n" for row in read_rows(path) if row["step"] <= resumed_step)
        self._size = path.stat().st_size
        self._unwritten = b""

    def append(self, row: dict[str, Any]) -> None:
        self._unwritten += json.dumps(row).encode() + b"\n"
        try:
            with self.path.open("r+b") as file:
                file.truncate(self._size)  # what is left of a write that failed
                file.seek(self._size)
                file.write(self._unwritten)
        except OSError as error:
            log.error("%s: step %s is not written yet: %s", self.path, row["step"], error)
            return
        self._size += len(self._unwritten)
        self._unwritten = b""


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file of JSON objects; one that a crash cut short is left out."""
    if not path.exists():
        return
    with path.open() as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:
                log.warning("%s: a line that was cut short is dropped", path)
