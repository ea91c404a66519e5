"""The JSONL files in a run's folder: one row for what was logged at a step. Needs no torch."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clippy_train.files import atomic_write

SCORE = "val/bits_per_byte"  # of a validation, in metrics.jsonl: the lower, the better

log = logging.getLogger(__name__)


class RowFile:
    """A file of rows, open for appending.

    On resume, drops rows after `resumed_step`: those steps run again. Rows that a full disk refuses are kept, and
    written with the next row that succeeds.
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
                file.truncate(self._size)  # removes the rest of a write that failed
                file.seek(self._size)
                file.write(self._unwritten)
        except OSError as error:
            log.error("%s: the row of step %s is not written yet: %s", self.path, row["step"], error)
            return
        self._size += len(self._unwritten)
        self._unwritten = b""


def read_rows(path: Path, key: str = "") -> Iterator[dict[str, Any]]:
    """The rows of a file that have `key`, without one that a crash cut short or a disk damaged."""
    if not path.exists():
        return
    with path.open(errors="replace") as file:
        for line in file:
            if key and f'"{key}"' not in line:
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                yield row
            else:
                log.warning("%s: dropped a line that is damaged or was cut short", path)


def validated(path: Path, step: int) -> bool:
    """Whether a file of metrics has the validation after `step`."""
    return any(row["step"] == step for row in read_rows(path, SCORE))
