"""Sorted files: any range of keys comes back, in order and nothing else, whatever was written."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clippy_train.corpus import spool
from clippy_train.corpus.spool import load_records, save_records
from clippy_train.corpus.tables import KEYS, distinct, key_range, load_table, save_table

PAYLOADS = st.binary(max_size=30).map(lambda data: data.replace(b"\n", b" "))
INTEGERS = st.sampled_from([0, 1, 2, KEYS // 2, KEYS - 2, KEYS - 1]) | st.integers(0, KEYS - 1)


def records(payloads: list[bytes], distinct: int) -> list[bytes]:
    """Records with at most `distinct` keys."""
    keys = [hashlib.sha256(b"%d" % (number % distinct)).hexdigest()[:16] for number in range(len(payloads))]
    return [key.encode() + b" " + payload for key, payload in zip(keys, payloads, strict=True)]


@settings(max_examples=50)
@given(st.lists(PAYLOADS, max_size=100), st.sampled_from([1, 2, 1000]), st.integers(1, 7))
def test_the_ranges_of_a_file_are_its_sorted_records(
    tmp_path_factory: pytest.TempPathFactory, payloads: list[bytes], distinct: int, ranges: int
) -> None:
    unsorted = records(payloads, distinct)
    path = tmp_path_factory.mktemp("spool") / "records.zst"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool, "FRAME_BYTES", 100)
        save_records(path, list(unsorted))
    assert list(load_records(path)) == sorted(unsorted)
    parts = [list(load_records(path, *key_range(number, ranges))) for number in range(ranges)]
    assert [record for part in parts for record in part] == sorted(unsorted)


def test_a_range_is_read_without_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "FRAME_BYTES", 10_000)
    path = tmp_path / "records.zst"
    save_records(path, records([b"x" * 1000] * 500, 500))
    damaged = bytearray(path.read_bytes())
    damaged[: len(damaged) // 2] = bytes(len(damaged) // 2)
    path.write_bytes(damaged)
    low, high = key_range(3, 4)
    assert len(list(load_records(path, low, high))) == sum(
        low <= int(record[:16], 16) < high for record in records([b""] * 500, 500)
    )


@given(st.lists(st.tuples(INTEGERS, INTEGERS), max_size=20), st.integers(1, 5))
def test_the_ranges_of_a_table_are_its_sorted_rows(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, int]], ranges: int
) -> None:
    table = np.array(rows, np.uint64).reshape(-1, 2).T
    path = tmp_path_factory.mktemp("tables") / "table.npy"
    save_table(path, table)
    found = [load_table(path, *key_range(number, ranges)).T.tolist() for number in range(ranges)]
    assert [tuple(row) for part in found for row in part] == sorted(rows)
    assert [tuple(row) for row in distinct(table).T.tolist()] == sorted(set(rows))
