"""An external sort: records that need not fit in memory come back in the order of their keys.

Promises: memory is bounded, whatever the number and the size of the records: 16 MiB of buffers while they are added,
one bucket while they are drained. Disk holds them once, compressed, and is freed bucket by bucket.
"""

import io
from collections.abc import Iterator
from pathlib import Path

import zstandard

BUCKETS = 256  # two hexadecimal digits of the key
BUFFER_BYTES = 1 << 16  # per bucket, before they go to disk as one frame
BUCKET_BYTES = 1 << 24  # a larger bucket is spooled again by its next two digits
MAX_DEPTH = 8  # records equal up to here share one key, so no digit can separate them


class Spool:
    """Records are lines of bytes that begin with at least `2 * MAX_DEPTH` evenly distributed hexadecimal digits."""

    def __init__(self, folder: Path, depth: int = 0) -> None:
        folder.mkdir()
        self.folder, self.depth = folder, depth
        self._buffers = [bytearray() for _ in range(BUCKETS)]
        self._sizes = [0] * BUCKETS
        self._compressor = zstandard.ZstdCompressor(level=1)

    def add(self, record: bytes) -> None:
        bucket = int(record[2 * self.depth : 2 * self.depth + 2], 16)
        self._buffers[bucket] += record + b"\n"
        self._sizes[bucket] += len(record) + 1
        if len(self._buffers[bucket]) >= BUFFER_BYTES:
            self._flush(bucket)

    def drain(self) -> Iterator[bytes]:
        """All records, sorted; each bucket is deleted before its records are returned."""
        for bucket in range(BUCKETS):
            self._flush(bucket)
        for bucket, size in enumerate(self._sizes):
            if size > BUCKET_BYTES and self.depth + 1 < MAX_DEPTH:
                inner = Spool(self.folder / f"{bucket:02x}.again", self.depth + 1)
                for record in self._records(bucket):
                    inner.add(record)
                self._path(bucket).unlink()
                yield from inner.drain()
            elif size:
                records = sorted(self._records(bucket))
                self._path(bucket).unlink()
                yield from records

    def _flush(self, bucket: int) -> None:
        if self._buffers[bucket]:
            with self._path(bucket).open("ab") as file:
                file.write(self._compressor.compress(self._buffers[bucket]))
            self._buffers[bucket].clear()

    def _records(self, bucket: int) -> Iterator[bytes]:
        with self._path(bucket).open("rb") as file:
            reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
            for line in io.BufferedReader(reader):
                yield line[:-1]

    def _path(self, bucket: int) -> Path:
        return self.folder / f"{bucket:02x}.zst"
