"""The judge of a run's ledger: reads and tokenises a corpus by itself, in one pass; shares no code with the run."""

import json
from collections.abc import Callable, Iterable
from hashlib import blake2b
from pathlib import Path

import numpy as np
import zstandard

Span = list[int]  # stream, epoch, shard, line, first token, last token + 1
Documents = dict[tuple[int, int], list[int]]  # (shard, line) -> token ids


def read_documents(folder: Path, encode: Callable[[str], list[int]]) -> Documents:
    """The token ids of every document of a split; `encode` adds the end-of-text where the run does."""
    documents = {}
    for shard, path in enumerate(sorted(folder.iterdir())):
        raw = zstandard.ZstdDecompressor().decompressobj().decompress(path.read_bytes())
        for line, content in enumerate(raw.decode().split("\n")):
            text = json.loads(content).get("text") if content else None
            if text:
                documents[shard, line] = encode(text)
    return documents


def tokens(documents: Documents, spans: Iterable[Span]) -> list[int]:
    return [token for _, _, shard, line, first, end in spans for token in documents[shard, line][first:end]]


def whole_epochs(spans: list[Span]) -> int:
    """How many epochs every stream has behind it."""
    reached: dict[int, int] = {}
    for stream, epoch, *_ in spans:
        reached[stream] = max(epoch, reached.get(stream, 0))
    return min(reached.values())


def lost_and_repeated(documents: Documents, spans: list[Span], epoch: int) -> tuple[int, int]:
    """Tokens of an epoch that were never trained, and tokens that were trained again."""
    seen = {place: np.zeros(len(ids), dtype=int) for place, ids in documents.items()}
    for _, of, shard, line, first, end in spans:
        if of == epoch:
            assert 0 <= first < end <= len(documents[shard, line])
            seen[shard, line][first:end] += 1
    counts = np.concatenate(list(seen.values()))
    return int((counts == 0).sum()), int(np.maximum(counts - 1, 0).sum())


def digest(ids: list[int], seq_len: int) -> str:
    """`data/digest` of a step whose blocks, one after another, are `ids`."""
    rows = np.array(ids, dtype="<i4").reshape(-1, seq_len)
    sums = sum(int.from_bytes(blake2b(row.tobytes(), digest_size=8).digest(), "little") for row in rows)
    return f"{sums % 2**64:016x}"
