"""The external sort: every record comes back once, in order, however often it is spooled."""

import hashlib
import itertools
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clippy_train.corpus import spool
from clippy_train.corpus.spool import MAX_DEPTH, Spool

numbers = itertools.count()
PAYLOADS = st.binary(max_size=30).map(lambda data: data.replace(b"\n", b" "))


def records(payloads: list[bytes], distinct: int) -> list[bytes]:
    """Records with at most `distinct` keys."""
    keys = [hashlib.sha256(b"%d" % (number % distinct)).hexdigest() for number in range(len(payloads))]
    return [key.encode() + b" " + payload for key, payload in zip(keys, payloads, strict=True)]


def drained(folder: Path, unsorted: list[bytes]) -> list[bytes]:
    spooled = Spool(folder / f"spool-{next(numbers)}")
    for record in unsorted:
        spooled.add(record)
    return list(spooled.drain())


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers and buckets of a few records."""
    monkeypatch.setattr(spool, "BUFFER_BYTES", 100)
    monkeypatch.setattr(spool, "BUCKET_BYTES", 200)


@settings(max_examples=30)
@given(st.lists(PAYLOADS, max_size=100), st.sampled_from([1, 2, 1000]))
def test_records_come_back_sorted(
    tmp_path_factory: pytest.TempPathFactory, payloads: list[bytes], distinct: int
) -> None:
    unsorted = records(payloads, distinct)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool, "BUFFER_BYTES", 100)
        patch.setattr(spool, "BUCKET_BYTES", 200)
        assert drained(tmp_path_factory.mktemp("spool"), unsorted) == sorted(unsorted)


def test_only_large_buckets_are_spooled_again(tmp_path: Path, small: None) -> None:
    unsorted = records([b"x" * 50] * 500, 500)
    sizes: Counter[str] = Counter()
    for record in unsorted:
        sizes[record[:2].decode()] += len(record) + 1
    assert drained(tmp_path, unsorted) == sorted(unsorted)
    again = {path.name.removesuffix(".again") for path in tmp_path.glob("*/*.again")}
    assert again == {digits for digits, size in sizes.items() if size > 200} != set(sizes)


def test_records_of_one_key_are_not_spooled_forever(tmp_path: Path, small: None) -> None:
    unsorted = records([b"%d" % number for number in range(100)], 1)
    assert drained(tmp_path, unsorted) == sorted(unsorted)
    assert len(list(tmp_path.rglob("*.again"))) == MAX_DEPTH - 1


def test_disk_is_freed_bucket_by_bucket(tmp_path: Path) -> None:
    spooled = Spool(tmp_path / "spool")
    for record in records([b"x" * 1000] * 500, 500):
        spooled.add(record)
    records_out = spooled.drain()
    next(records_out)
    files = len(list((tmp_path / "spool").iterdir()))
    for _ in range(250):
        next(records_out)
    assert len(list((tmp_path / "spool").iterdir())) < files
    assert len(list(records_out)) == 249
    assert not list((tmp_path / "spool").iterdir())
