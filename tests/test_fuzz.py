"""Mutated lines and shards: no crash, and every line accepted or rejected, checked by counts made without the reader.

`make fuzz` runs the long form: FUZZ_SHARDS of each format.
"""

import gzip
import json
import os
import random
import re
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from clippy_train.shards import format as shard_format
from clippy_train.shards.format import FEED_BYTES, REASONS, Fields

NUM_SHARDS = int(os.environ.get("FUZZ_SHARDS", "40"))  # of each format
LINES = 80  # in a shard
WORDS = ["def", "return", "self", "été", "变量", "\N{GRINNING FACE}", "\t", "\n", "    ", '"', "\\", "\0", "x" * 50]

Line = tuple[bytes, str | None]  # its bytes, and "" or the reason of its rejection; None if both are possible
Found = tuple[int, str | None, str]  # number, text, reason


def text(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 60)))


def good(rng: random.Random) -> bytes:
    return json.dumps({"text": text(rng), "meta": {"stars": rng.choice([None, 1])}}, ensure_ascii=True).encode()


def cut(rng: random.Random) -> bytes:
    line = good(rng)
    return line[: rng.randrange(1, len(line))]


def with_nul(rng: random.Random) -> bytes:
    line = good(rng)
    position = rng.randrange(len(line))
    return line[:position] + b"\0" + line[position:]


def with_changed_bits(rng: random.Random) -> bytes:
    line = bytearray(good(rng))
    for _ in range(rng.randint(1, 4)):
        line[rng.randrange(len(line))] ^= 1 << rng.randrange(8)
    return bytes(line).replace(b"\n", b" ")


def nested(rng: random.Random) -> bytes:
    depth = rng.choice([10_000, 200_000])
    return b'{"text": "a", "meta": ' + rng.choice([b"[" * depth + b"]" * depth, b'{"a":' * depth]) + b"}"


KINDS: list[tuple[Callable[[random.Random], bytes], str | None]] = [
    (good, ""),
    (lambda rng: json.dumps({"text": text(rng)}, ensure_ascii=False).encode(), ""),
    (lambda rng: b"\xef\xbb\xbf" + good(rng), ""),
    (lambda rng: good(rng) + b"\r", ""),
    (lambda rng: b'{"text": "a", "n": %s}' % rng.choice([b"NaN", b"-Infinity", b"1e999", b"9" * 4000]), ""),
    (lambda rng: b'{"text": 1, "text": "a"}', ""),
    (lambda rng: b'{"text": "a", "text": null}', "no_text"),
    (
        lambda rng: b'{"text": %s}' % rng.choice([b"null", b"7", b'["a"]', b'""', b"{}", b"true", b"NaN"]),
        "no_text",
    ),
    (lambda rng: rng.choice([b"null", b"[]", b"3", b'"text"', b"true", b"NaN", b"{}", b'{"Text": "a"}']), "no_text"),
    (lambda rng: b'{"text": "\\ud8%02x"}' % rng.randrange(256), "not_utf8"),
    (lambda rng: b'{"text": "' + rng.choice([b"\xff", b"caf\xe9", b"\xed\xa0\x80", b"\xc0\xaf"]) + b'"}', "not_utf8"),
    (cut, "not_json"),
    (with_nul, "not_json"),
    (nested, "not_json"),
    (lambda rng: good(rng) + good(rng), "not_json"),
    (lambda rng: b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "not_json"),
    (with_changed_bits, None),
    (lambda rng: re.sub(rb"\s", b"x", rng.randbytes(rng.randint(1, 300))), None),
    (lambda rng: re.sub(rb"[\n\s]", b"x", good(rng).decode().encode(rng.choice(["utf-16", "utf-32"]))), None),
    (lambda rng: b" \t\r"[: rng.randint(0, 3)], "blank"),
]


def make_lines(rng: random.Random) -> list[Line]:
    chosen = rng.choices(KINDS, weights=[8] + [1] * (len(KINDS) - 1), k=rng.randint(0, LINES))
    return [(make(rng), verdict) for make, verdict in chosen]


def read(data: bytes, suffix: str) -> list[Found]:
    return [entry[:3] for entry in shard_format.read_documents(BytesIO(data), f"shard{suffix}", Fields())]


def decompressed(data: bytes, suffix: str) -> tuple[bytes, bool]:
    """What can be decompressed of a shard, fed byte by byte, and whether it is complete."""
    if suffix == ".jsonl":
        return data, True
    new = zstandard.ZstdDecompressor().decompressobj if suffix.endswith("zst") else lambda: zlib.decompressobj(31)
    out, decoder, complete = b"", new(), True
    for position in range(len(data)):
        try:
            out += decoder.decompress(data[position : position + 1])
        except (zstandard.ZstdError, zlib.error):
            return out, False
        complete = decoder.eof
        decoder = new() if complete else decoder
    return out, complete


def numbers(content: bytes, complete: bool) -> list[int]:
    """Numbers of the lines that are not blank; the last one counts only if the content is complete."""
    lines = content.split(b"\n")
    return [number for number, line in enumerate(lines if complete else lines[:-1]) if line.strip()]


def compressed(lines: bytes, suffix: str, rng: random.Random) -> bytes:
    """In frames (or members) that end anywhere, some of them empty or skippable."""
    if suffix == ".jsonl":
        return lines
    ends = sorted(rng.choices(range(len(lines) + 1), k=rng.choice([0, 1, 3])))
    pieces = [lines[begin:end] for begin, end in zip([0, *ends], [*ends, len(lines)], strict=True)]
    if suffix == ".jsonl.gz":
        return b"".join(gzip.compress(piece) for piece in pieces)
    skippable = bytes.fromhex("502a4d18") + (3).to_bytes(4, "little") + b"abc"
    compressor = zstandard.ZstdCompressor(write_checksum=rng.random() < 0.5)
    return b"".join(rng.choice([b"", skippable]) + compressor.compress(piece) for piece in pieces)


def damage(data: bytes, rng: random.Random) -> tuple[bytes, int]:
    """A damaged copy, and the position of the first change."""
    position = rng.randrange(len(data) + 1)
    match rng.randrange(6):
        case 0:
            return data[:position], position
        case 1:
            return b"", 0
        case 2:
            return rng.randbytes(4) + data[4:], 0
        case 3:
            return data + rng.randbytes(rng.randint(1, 50)), len(data)
        case 4:
            return data[:position] + data[position + rng.randint(1, 100) :], position
    changed = bytearray(data or b"\0")
    first = len(changed)
    for _ in range(rng.randint(1, 3)):
        position = rng.randrange(len(changed))
        changed[position] ^= 1 << rng.randrange(8)
        first = min(first, position)
    return bytes(changed), first


def report(seen: Counter[str], suffix: str) -> None:
    counted = ", ".join(f"{reason or 'accepted'} {count}" for reason, count in sorted(seen.items()))
    print(f"\n{suffix}: {NUM_SHARDS} shards, {sum(seen.values())} lines: {counted}")


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_lines_are_accepted_or_rejected_as_they_were_made(suffix: str) -> None:
    seen: Counter[str] = Counter()
    for seed in range(NUM_SHARDS):
        rng = random.Random(f"{suffix} lines {seed}")
        lines = make_lines(rng)
        content = b"\n".join(line for line, _ in lines) + rng.choice([b"", b"\n"])
        found = read(compressed(content, suffix, rng), suffix)
        assert [number for number, _, _ in found] == numbers(content, complete=True), seed
        for number, accepted, reason in found:
            verdict = lines[number][1]
            assert verdict in (reason, None), (seed, lines[number])
            assert (accepted is None) == (reason in REASONS) == bool(reason)
            seen[reason] += 1
    report(seen, suffix)
    assert set(seen) >= {"", "no_text", "not_json", "not_utf8"}


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_a_damaged_shard_yields_the_lines_before_the_damage(suffix: str) -> None:
    seen: Counter[str] = Counter()
    for seed in range(NUM_SHARDS):
        rng = random.Random(f"{suffix} damage {seed}")
        intact = compressed(b"\n".join(line for line, _ in make_lines(rng)), suffix, rng)
        data, unchanged = damage(intact, rng)
        found = read(data, suffix)
        content, complete = decompressed(data, suffix)
        wanted = numbers(content, complete)
        lines = [number for number, _, reason in found if reason != "damaged_shard"]
        assert lines == wanted[: len(lines)], seed
        assert len(found) - len(lines) == (not complete), seed
        assert complete or found[-1][2] == "damaged_shard"
        before, _ = decompressed(data[: max(0, unchanged - FEED_BYTES)], suffix)
        assert len(lines) >= (len(wanted) if complete else len(numbers(before, complete=False))), seed
        seen.update(reason for _, _, reason in found)
    report(seen, suffix)
    assert (seen["damaged_shard"] > 0) == (suffix != ".jsonl")


def test_parquet_of_any_kind_is_read_or_reported() -> None:
    seen: Counter[str] = Counter()
    for seed in range(NUM_SHARDS):
        rng = random.Random(f"parquet {seed}")
        texts = [rng.choice([text(rng), text(rng), None, ""]) for _ in range(rng.randint(0, LINES))]
        column = rng.choice([pa.array(texts, pa.string()), pa.array([len(each or "") for each in texts])])
        sink = BytesIO()
        settings = {"compression": rng.choice(["snappy", "zstd", "none"]), "use_dictionary": rng.random() < 0.5}
        pq.write_table(pa.table({"text": column}), sink, row_group_size=7, write_page_checksum=True, **settings)
        found = read(sink.getvalue(), ".parquet")
        expected = ["" if each and column.type == pa.string() else "no_text" for each in texts]
        assert [(number, reason) for number, _, reason in found] == list(enumerate(expected)), seed
        data, _ = damage(sink.getvalue(), rng)
        after = read(data, ".parquet")
        assert [number for number, _, _ in after] == list(range(len(after))), seed
        assert "damaged_shard" not in [reason for _, _, reason in after[:-1]], seed
        assert len(after) <= len(texts) + 1
        if not after or after[-1][2] != "damaged_shard":
            assert [reason for _, _, reason in after] == expected[: len(after)], seed
        seen.update(reason for _, _, reason in (*found, *after))
    report(seen, ".parquet")
    assert seen["damaged_shard"]


READER = """
import re, sys
from collections import Counter
from pathlib import Path
from clippy_train.shards.format import Fields, read_documents
with open(sys.argv[1], "rb") as file:
    reasons = Counter(entry.reason for entry in read_documents(file, sys.argv[1], Fields()))
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1], dict(reasons))
"""


def read_in_subprocess(path: Path) -> tuple[float, str]:
    """The peak memory in MiB of a process that reads a shard, and what it read."""
    result = subprocess.run([sys.executable, "-c", READER, str(path)], capture_output=True, text=True, check=True)
    kib, reasons = result.stdout.strip().split(" ", 1)
    return int(kib) / 1024, reasons


@pytest.mark.processes
def test_memory_is_bounded_whatever_a_shard_holds(tmp_path: Path) -> None:
    """Bounds are in longest lines: one exists as pieces, bytes, str, value and UTF-8, but not all at once."""
    longest = shard_format.MAX_LINE_BYTES
    hundred_megabytes = b'{"text": "' + b"def f(x):    return x # " * 4_200_000 + b'"}'
    bombs = max(3, NUM_SHARDS // 10)
    cases: list[tuple[str, bytes, str, int]] = [
        ("document.jsonl.zst", zstandard.compress(hundred_megabytes), "{'': 1}", 4),
        ("zeros.jsonl.zst", zstandard.compress(bytes(longest)) * bombs, "{'too_long': 1}", 3),
        ("zeros.jsonl.gz", gzip.compress(bytes(longest), 1) * bombs, "{'too_long': 1}", 2),
        ("blank lines.jsonl.zst", zstandard.compress(b"\n" * (longest // 16)), "{}", 1),
        ("nested.jsonl", b"[" * (longest // 2), "{'not_json': 1}", 2),
        ("number.jsonl", b'{"text": ' + b"9" * (longest // 2) + b"}", "{'not_json': 1}", 3),
    ]
    (tmp_path / "small.jsonl").write_bytes(b'{"text": "a"}')
    base, _ = read_in_subprocess(tmp_path / "small.jsonl")
    used = {}
    for name, data, expected, _ in cases:
        (tmp_path / name).write_bytes(data)
        peak, output = read_in_subprocess(tmp_path / name)
        assert output == expected, name
        used[name] = peak - base
    print("\n" + ", ".join(f"{name} +{grown:.0f} MiB" for name, grown in used.items()))
    for name, _, _, bound in cases:
        assert used[name] * (1 << 20) < bound * longest, name
