"""Sorted tables of 64-bit integers in files, of which a range of the first column is read without the rest.

A table is an array [columns, rows] of uint64. Reading a range costs a binary search and the rows in it.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt

Table = npt.NDArray[np.uint64]
Column = npt.NDArray[np.generic]
KEYS = 1 << 64


def save_table(path: Path, table: Table) -> None:
    """Sort the rows, by the first column and then the next ones, and write them."""
    np.save(path, sorted_table(table))


def load_table(path: Path, low: int = 0, high: int = KEYS) -> Table:
    """The rows whose first column is at least `low` and less than `high`."""
    table = np.load(path, mmap_mode="r")
    begin = np.searchsorted(table[0], np.uint64(low), "left")
    end = np.searchsorted(table[0], np.uint64(high - 1), "right")
    return np.array(table[:, begin:end])


def sorted_table(table: Table) -> Table:
    return table[:, np.lexsort(table[::-1])]


def distinct(table: Table) -> Table:
    """The rows in order, each once."""
    table = sorted_table(table)
    changes = (table[:, 1:] != table[:, :-1]).any(axis=0)
    return table[:, np.concatenate([np.ones(min(1, table.shape[1]), bool), changes])]


def key_range(number: int, count: int) -> tuple[int, int]:
    """The first key, and the key after the last one, of the range `number` of `count` equal ranges of all keys."""
    return number * KEYS // count, (number + 1) * KEYS // count
