"""Shards on disk: what is written is read back, and what cannot be read is reported with its reason."""

import gzip
import hashlib
import json
import random
import tracemalloc
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from clippy_train.errors import ConfigError
from clippy_train.files import new_folder
from clippy_train.shards import format as shard_format
from clippy_train.shards.format import Entry, Fields, Selection, ShardWriter, document_line, line_entry

Line = tuple[int, str | None, str]  # number, text, reason
Flushed = tuple[list[str], list[int], bytes]


def jsonl(*texts: str) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def frame(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


def shard(folder: Path, data: bytes) -> Path:
    path = folder / "00000.jsonl.zst"
    path.write_bytes(data)
    return path


def documents(path: Path, column: str, start: int = 0, stride: int = 1, residue: int = 0) -> Iterator[Line]:
    with path.open("rb") as file:
        for entry in shard_format.read_documents(file, path.name, Fields(column), Selection(start, stride, residue)):
            assert entry.meta is None
            yield entry[:3]


def texts(lines: Iterable[Line]) -> list[str]:
    return [text for _, text, _ in lines if text is not None]


def rejections(lines: Iterable[Line]) -> list[tuple[int, str]]:
    return [(number, reason) for number, text, reason in lines if text is None]


@pytest.fixture(scope="module")
def flushed() -> Flushed:
    """Texts, `ends`, and a frame with one block per line: from offset `ends[i]` on, text i is complete."""
    rng = random.Random(1)
    wanted = [rng.randbytes(rng.randint(10, 9000)).hex() for _ in range(40)]
    compressor = zstandard.ZstdCompressor(write_checksum=True).compressobj()
    data, ends = b"", []
    for text in wanted:
        data += compressor.compress(jsonl(text)) + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
        ends.append(len(data))
    return wanted, ends, data + compressor.flush()


@pytest.mark.slow
@settings(max_examples=50)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1)), st.integers(1, 200))
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, wanted: list[str], shard_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("written") / "train"
    writer = ShardWriter(folder, shard_bytes)
    for text in wanted:
        writer.write(document_line({"text": text, "meta": {"stars": None}}))
    writer.close()
    found = [line for path in sorted(folder.iterdir()) for line in documents(path, "text")]
    assert [(text, reason) for _, text, reason in found] == [(text, "") for text in wanted]


def test_a_shard_ends_with_the_line_that_fills_it(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "train", shard_bytes=2 * len('{"text":"a"}\n'))
    for text in "abcde":
        writer.write(document_line({"text": text}))
    writer.close()
    found = {path.name: texts(documents(path, "text")) for path in (tmp_path / "train").iterdir()}
    assert found == {"00000.jsonl.zst": ["a", "b"], "00001.jsonl.zst": ["c", "d"], "00002.jsonl.zst": ["e"]}


def test_only_a_single_line_may_exceed_the_size_of_a_shard(tmp_path: Path) -> None:
    lines = [document_line({"text": "a" * size}) for size in (5, 50, 5, 5, 200, 5)]
    writer = ShardWriter(tmp_path / "train", shard_bytes=100)
    for line in lines:
        writer.write(line)
    writer.close()
    shards = [zstandard.decompress(path.read_bytes()) for path in sorted((tmp_path / "train").iterdir())]
    assert b"".join(shards).splitlines() == lines
    assert [len(shard) <= 100 or shard.count(b"\n") == 1 for shard in shards] == [True] * len(shards)
    assert len(shards) == 4


def test_written_files_are_listed_with_their_checksums(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "train", shard_bytes=1000)
    for text in ("a", "b"):
        writer.write(document_line({"text": text}))
    writer.close()
    data = (tmp_path / "train" / "00000.jsonl.zst").read_bytes()
    (listed,) = writer.files
    assert listed["name"] == "train/00000.jsonl.zst"
    assert (listed["documents"], listed["bytes"]) == (2, len(data))
    assert listed["sha256"] == hashlib.sha256(data).hexdigest()


def test_a_writer_without_documents_writes_no_file(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "train", shard_bytes=1000)
    writer.close()
    assert list((tmp_path / "train").iterdir()) == []
    assert writer.files == []


def test_a_written_shard_carries_a_checksum(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "train", shard_bytes=1)
    writer.write(document_line({"text": "a"}))
    data = (tmp_path / "train" / "00000.jsonl.zst").read_bytes()
    assert zstandard.get_frame_parameters(data).has_checksum


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "not_json"),
        (b"a", "not_json"),
        (b'{"text": "a"}{"text": "b"}', "not_json"),
        (b'{"text": "a\tb"}', "not_json"),
        (b"[" * 200_000, "not_json"),
        (b'{"text": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "not_json"),
        (b'{"text": ' + b"9" * 5000 + b"}", "not_json"),
        (b'{"body": "a"}', "no_text"),
        (b'{"text": null}', "no_text"),
        (b'{"text": 1}', "no_text"),
        (b'{"text": ["a"]}', "no_text"),
        (b'{"text": ""}', "no_text"),
        (b'"text"', "no_text"),
        (b'["text"]', "no_text"),
        (b"null", "no_text"),
        (b'{"text": "\xff"}', "not_utf8"),
        (b'{"text": "caf\xe9"}', "not_utf8"),
        (b'{"text": "\\ud800"}', "not_utf8"),
        (b'{"text": "\xed\xa0\x80"}', "not_utf8"),
    ],
)
def test_an_unusable_line_is_reported_with_its_reason(tmp_path: Path, line: bytes, reason: str) -> None:
    path = shard(tmp_path, frame(jsonl("before") + line + b"\n" + jsonl("after")))
    assert list(documents(path, "text")) == [(0, "before", ""), (1, None, reason), (2, "after", "")]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b'{"text": "a", "meta": {"stars": NaN}}', "a"),
        (b'{"text": "\\ud83d\\ude00"}', "\N{GRINNING FACE}"),
        (b'{"text": "\\u0000\\n"}', "\0\n"),
        (b'\xef\xbb\xbf{"text": "a"}', "a"),
        (b' {"text": " "} ', " "),
    ],
)
def test_an_unusual_line_is_still_used(line: bytes, text: str) -> None:
    assert line_entry(0, line, Fields()) == Entry(0, text, "", None)


def test_an_entry_has_the_meta_on_request() -> None:
    line = document_line({"text": "a", "meta": {"stars": "3", "repo_language": "C"}})
    meta = line_entry(0, line, Fields(with_meta=True)).meta
    assert meta is not None
    assert {name: value for name, value in meta.items() if value is not None} == {"stars": 3, "repo_language": "C"}


def test_the_text_comes_from_the_named_column(tmp_path: Path) -> None:
    path = shard(tmp_path, frame(b'{"text": "a", "body": "b"}\n'))
    assert texts(documents(path, "body")) == ["b"]


def test_carriage_returns_before_line_ends_are_not_part_of_a_line(tmp_path: Path) -> None:
    path = shard(tmp_path, frame(jsonl("a", "b").replace(b"\n", b"\r\n")))
    assert list(documents(path, "text")) == [(0, "a", ""), (1, "b", "")]


def test_blank_lines_have_a_number_but_are_not_returned(tmp_path: Path) -> None:
    path = shard(tmp_path, frame(b"\n" + jsonl("a") + b" \t\n\r\n" + jsonl("b") + b"\n\n"))
    assert list(documents(path, "text")) == [(1, "a", ""), (4, "b", "")]


def test_the_last_line_needs_no_line_end(tmp_path: Path) -> None:
    path = shard(tmp_path, frame(jsonl("a", "b").rstrip()))
    assert texts(documents(path, "text")) == ["a", "b"]


def test_a_too_long_line_is_skipped_between_its_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_format, "MAX_LINE_BYTES", 100)
    path = shard(tmp_path, frame(jsonl("a", "x" * 100, "b", "y" * 100_000, "c")))
    found = list(documents(path, "text"))
    assert texts(found) == ["a", "b", "c"]
    assert rejections(found) == [(1, "too_long"), (3, "too_long")]


def test_a_too_long_last_line_without_an_end_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_format, "MAX_LINE_BYTES", 100)
    path = shard(tmp_path, frame(jsonl("a", "x" * 100).rstrip()))
    assert list(documents(path, "text")) == [(0, "a", ""), (1, None, "too_long")]


def test_a_line_of_exactly_the_maximum_size_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = jsonl("x" * 50)
    path = shard(tmp_path, frame(line))
    monkeypatch.setattr(shard_format, "MAX_LINE_BYTES", len(line) - 1)
    assert texts(documents(path, "text")) == ["x" * 50]
    monkeypatch.setattr(shard_format, "MAX_LINE_BYTES", len(line) - 2)
    assert rejections(documents(path, "text")) == [(0, "too_long")]


def test_a_too_long_line_is_not_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_format, "MAX_LINE_BYTES", 1 << 20)
    path = shard(tmp_path, frame(jsonl(random.Random(0).randbytes(8 << 20).hex())))
    assert peak_memory(path) < 4 << 20


@pytest.mark.slow
def test_a_too_long_line_that_compresses_well_is_not_held_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_format, "MAX_LINE_BYTES", 1 << 20)
    compressor = zstandard.ZstdCompressor(level=1).compressobj()
    line = b"".join(compressor.compress(b"x" * (1 << 20)) for _ in range(400)) + compressor.flush()
    assert peak_memory(shard(tmp_path, line)) < 320 << 20


def peak_memory(path: Path) -> int:
    """The most bytes held while a shard is read whose only line is too long."""
    tracemalloc.start()
    try:
        assert rejections(documents(path, "text")) == [(0, "too_long")]
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_an_empty_file_has_no_document(tmp_path: Path) -> None:
    assert list(documents(shard(tmp_path, b""), "text")) == []


def test_an_empty_frame_has_no_document(tmp_path: Path) -> None:
    assert list(documents(shard(tmp_path, frame(b"")), "text")) == []


def test_frames_are_read_one_after_another(tmp_path: Path) -> None:
    path = shard(tmp_path, frame(jsonl("a")) + frame(b"") + frame(jsonl("b", "c")))
    assert list(documents(path, "text")) == [(0, "a", ""), (1, "b", ""), (2, "c", "")]


def test_a_line_may_continue_in_the_next_frame(tmp_path: Path) -> None:
    data = jsonl("a", "b", "c")
    path = shard(tmp_path, b"".join(frame(data[i : i + 5]) for i in range(0, len(data), 5)))
    assert texts(documents(path, "text")) == ["a", "b", "c"]


def test_a_skippable_frame_is_skipped(tmp_path: Path) -> None:
    skippable = bytes.fromhex("502a4d18") + (3).to_bytes(4, "little") + b"abc"
    path = shard(tmp_path, skippable + frame(jsonl("a")) + skippable + frame(jsonl("b")) + skippable)
    assert list(documents(path, "text")) == [(0, "a", ""), (1, "b", "")]


def test_a_shard_larger_than_a_read_is_read_to_its_end(tmp_path: Path, flushed: Flushed) -> None:
    wanted, _, data = flushed
    assert len(data) > 10 * shard_format.FEED_BYTES
    assert list(documents(shard(tmp_path, data), "text")) == [(i, text, "") for i, text in enumerate(wanted)]


def test_truncation_is_reported_after_the_good_lines(tmp_path: Path, flushed: Flushed) -> None:
    wanted, ends, data = flushed
    cuts = {cut + around for cut in ends for around in (-1, 0, 1)} | set(range(1, len(data), 4999)) | {len(data) - 1}
    for cut in sorted(cut for cut in cuts if cut < len(data)):
        complete = sum(end <= cut for end in ends)
        good = [(i, text, "") for i, text in enumerate(wanted[:complete])]
        expected = [*good, (complete, None, "damaged_shard")]
        assert list(documents(shard(tmp_path, data[:cut]), "text")) == expected, cut


def test_truncation_is_reported_at_any_position(tmp_path: Path) -> None:
    data = frame(jsonl("a", "b")) + frame(jsonl("c"))
    first = len(frame(jsonl("a", "b")))
    for cut in set(range(1, len(data))) - {first}:
        assert rejections(documents(shard(tmp_path, data[:cut]), "text"))[-1][1] == "damaged_shard", cut


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_a_changed_byte_is_reported_at_any_position(tmp_path: Path, mask: int) -> None:
    data = frame(jsonl(*(f"text {number}" for number in range(30))))
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= mask
        reasons = [reason for _, reason in rejections(documents(shard(tmp_path, bytes(changed)), "text"))]
        assert reasons.count("damaged_shard") == 1, position
        assert reasons[-1] == "damaged_shard", position


def test_lines_before_a_changed_byte_are_good(tmp_path: Path, flushed: Flushed) -> None:
    wanted, ends, data = flushed
    for position in range(20, len(data), 9973):
        changed = bytearray(data)
        changed[position] ^= 0xFF
        found = list(documents(shard(tmp_path, bytes(changed)), "text"))
        before = sum(end + shard_format.FEED_BYTES <= position for end in ends)
        assert texts(found)[:before] == wanted[:before], position
        assert rejections(found)[-1][1] == "damaged_shard", position


def test_frames_before_a_damaged_one_are_good(tmp_path: Path) -> None:
    path = shard(tmp_path, frame(jsonl("a", "b")) + frame(jsonl("c"))[:-1] + b"\0")
    assert list(documents(path, "text"))[:2] == [(0, "a", ""), (1, "b", "")]
    assert rejections(documents(path, "text"))[-1][1] == "damaged_shard"


@pytest.mark.parametrize("garbage", [b"\0", b"garbage", jsonl("plain"), frame(b"")[:3], b"\0" * 100_000])
def test_garbage_after_the_last_frame_is_damage(tmp_path: Path, garbage: bytes) -> None:
    path = shard(tmp_path, frame(jsonl("a", "b")) + garbage)
    assert list(documents(path, "text")) == [(0, "a", ""), (1, "b", ""), (2, None, "damaged_shard")]


def test_a_shard_that_was_never_compressed_is_damaged(tmp_path: Path) -> None:
    assert list(documents(shard(tmp_path, jsonl("a")), "text")) == [(0, None, "damaged_shard")]


def test_an_incomplete_line_is_not_a_document(tmp_path: Path) -> None:
    path = shard(tmp_path, frame(jsonl("a").rstrip()) + b"garbage")
    assert list(documents(path, "text")) == [(0, None, "damaged_shard")]


@settings(max_examples=60)
@given(st.integers(0, 30), st.integers(0, 35), st.integers(1, 6), st.data())
def test_lines_are_selected_by_start_and_residue(
    tmp_path_factory: pytest.TempPathFactory, count: int, start: int, stride: int, data: st.DataObject
) -> None:
    residue = data.draw(st.integers(0, stride - 1))
    path = shard(tmp_path_factory.mktemp("selection"), frame(jsonl(*map(str, range(count)))))
    found = list(documents(path, "text", start, stride, residue))
    assert found == [(i, str(i), "") for i in range(start, count) if i % stride == residue]


def test_damage_is_reported_to_one_residue_only(tmp_path: Path) -> None:
    path = shard(tmp_path, frame(jsonl("a", "b", "c", "d")) + b"garbage")
    found = [rejections(documents(path, "text", 0, 3, residue)) for residue in range(3)]
    assert found == [[], [(4, "damaged_shard")], []]


def test_damage_before_the_start_is_not_reported(tmp_path: Path) -> None:
    path = shard(tmp_path, frame(jsonl("a")) + b"garbage")
    assert list(documents(path, "text", start=1)) == [(1, None, "damaged_shard")]
    assert list(documents(path, "text", start=2)) == []


def test_a_new_folder_appears_with_its_content_when_the_block_ends(tmp_path: Path) -> None:
    with new_folder(tmp_path / "deep" / "out", "out") as folder:
        (folder / "file").write_text("content")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "file").read_text() == "content"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_a_new_folder_is_removed_when_the_block_raises(tmp_path: Path) -> None:
    def interrupted() -> None:
        with new_folder(tmp_path / "out", "out") as folder:
            (folder / "file").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_new_folder_may_exist_empty(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out", "out") as folder:
        (folder / "file").write_text("content")
    assert (tmp_path / "out" / "file").read_text() == "content"


@pytest.mark.parametrize("taken", ["out", "out/file"])
def test_a_new_folder_never_overwrites_what_exists(tmp_path: Path, taken: str) -> None:
    (tmp_path / taken).parent.mkdir(exist_ok=True)
    (tmp_path / taken).write_text("precious")
    with (
        pytest.raises(ConfigError, match=r"some\.key=.*out exists and is not empty"),
        new_folder(tmp_path / "out", "some.key"),
    ):
        pass
    assert (tmp_path / taken).read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_new_folder_has_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    with new_folder(tmp_path / "out", "out"):
        pass
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def parquet(tmp_path: Path, **columns: Any) -> tuple[Path, bytearray, pq.FileMetaData]:
    """A parquet shard with checksums and two rows per row group, its bytes and its metadata."""
    path = tmp_path / "0.parquet"
    pq.write_table(
        pa.table(columns), path, row_group_size=2, write_page_checksum=True, use_dictionary=False, compression="none"
    )
    return path, bytearray(path.read_bytes()), pq.read_metadata(path)


def damage_column(path: Path, data: bytearray, metadata: pq.FileMetaData, group: int, column: int) -> None:
    chunk = metadata.row_group(group).column(column)
    data[chunk.data_page_offset + chunk.total_compressed_size - 1] ^= 0x01
    path.write_bytes(data)


def test_unselected_row_groups_and_columns_are_not_read(tmp_path: Path) -> None:
    path, data, metadata = parquet(tmp_path, text=["a", "b", "c", "d"], other=["x" * 99, "y" * 99, "z" * 99, "z"])
    damage_column(path, data, metadata, group=0, column=0)
    damage_column(path, data, metadata, group=1, column=1)
    assert list(documents(path, "text", start=2)) == [(2, "c", ""), (3, "d", "")]
    assert list(documents(path, "text")) == [(0, None, "damaged_shard")]


def test_rows_before_a_damaged_row_group_are_good(tmp_path: Path) -> None:
    path, data, metadata = parquet(tmp_path, text=["a", "b", "c", "d"])
    damage_column(path, data, metadata, group=1, column=0)
    assert list(documents(path, "text")) == [(0, "a", ""), (1, "b", ""), (2, None, "damaged_shard")]


def test_unusable_rows_are_reported_with_their_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_format, "MAX_LINE_BYTES", 5)
    invalid = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")])
    column = pa.concat_arrays([pa.array(["a", None, "", "toolong"]), invalid])
    path, _, _ = parquet(tmp_path, text=column)
    reasons = ["", "no_text", "no_text", "too_long", "not_utf8"]
    assert [(reason) for _, _, reason in documents(path, "text")] == reasons
    assert [reason for _, _, reason in documents(path, "code")] == ["no_text"] * len(reasons)


@pytest.mark.parametrize("cut", [1, 4, 5, 100])
def test_a_truncated_parquet_file_is_damaged(tmp_path: Path, cut: int) -> None:
    path, data, _ = parquet(tmp_path, text=["a", "b", "c", "d"])
    path.write_bytes(data[:-cut])
    assert list(documents(path, "text")) == [(0, None, "damaged_shard")]


def test_members_of_a_gzip_file_are_read_one_after_another(tmp_path: Path) -> None:
    path = tmp_path / "0.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl("a")) + gzip.compress(b"") + gzip.compress(jsonl("b")))
    assert list(documents(path, "text")) == [(0, "a", ""), (1, "b", "")]


def test_gzip_truncation_is_reported_at_any_position(tmp_path: Path) -> None:
    path, data = tmp_path / "0.jsonl.gz", gzip.compress(jsonl("a", "b"))
    for cut in range(1, len(data)):
        path.write_bytes(data[:cut])
        assert rejections(documents(path, "text"))[-1][1] == "damaged_shard", cut
