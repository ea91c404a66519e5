"""Files of records sorted by a key, of which a range of keys is read without the rest.

A record is a line of bytes that begins with its key, 16 hexadecimal digits. Records are compressed in frames of some
64 KiB; the first key and the place of each frame are in a small table beside the file. Writing holds all records of a
file, reading one range of them.
"""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import zstandard

from clippy_train.corpus.tables import KEYS

DIGITS = 16
FRAME_BYTES = 1 << 16  # before compression


def save_records(path: Path, records: list[bytes]) -> None:
    """Sort the records, and write them to `path` and their index to `path` with the suffix .npy."""
    compressor = zstandard.ZstdCompressor(level=1)
    firsts, offsets = [], []
    with path.open("wb") as file:
        for frame in _frames(sorted(records)):
            firsts.append(int(frame[:DIGITS], 16))
            offsets.append(file.tell())
            file.write(compressor.compress(frame))
    np.save(path.with_suffix(".npy"), np.array([firsts, offsets], np.uint64))


def load_records(path: Path, low: int = 0, high: int = KEYS) -> Iterator[bytes]:
    """The records whose key is at least `low` and less than `high`, in order."""
    firsts, offsets = np.load(path.with_suffix(".npy"))
    begin = max(0, int(np.searchsorted(firsts, np.uint64(low), "left")) - 1)  # the frame before may hold `low` too
    end = int(np.searchsorted(firsts, np.uint64(high - 1), "right"))
    if begin >= end:
        return
    with path.open("rb") as file:
        file.seek(int(offsets[begin]))
        data = file.read(int(offsets[end]) - int(offsets[begin]) if end < len(offsets) else -1)
    first, last = b"%016x" % low, b"%016x" % (high - 1)
    frames = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data), read_across_frames=True)
    for line in io.BufferedReader(frames):
        if first <= line[:DIGITS] <= last:
            yield line[:-1]


def _frames(records: Iterable[bytes]) -> Iterator[bytearray]:
    frame = bytearray()
    for record in records:
        frame += record + b"\n"
        if len(frame) >= FRAME_BYTES:
            yield frame
            frame = bytearray()
    if frame:
        yield frame
