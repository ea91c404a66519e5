"""Checks a run's ledger: reads and tokenises a corpus in one pass, with no code of the run."""

import json
from collections.abc import Callable, Iterable
from hashlib import blake2b
from pathlib import Path

import numpy as np
import zstandard

Span = list[int]  # stream, epoch, shard, line, first token, last token + 1
Documents = dict[tuple[int, int], list[int]]  # (shard, line) -> token ids


def read_documents(folder: Path, encode: Callable[[str], list[int]]) -> Documents:
    """The token ids of every document of a split; `encode` adds the end-of-text if the run does."""
    return {place: encode(text) for place, text in read_texts(folder).items()}


def read_texts(folder: Path) -> dict[tuple[int, int], str]:
    """The text of every document of a split, by shard and line."""
    texts = {}
    for shard, path in enumerate(sorted(folder.iterdir())):
        raw = zstandard.ZstdDecompressor().decompressobj().decompress(path.read_bytes())
        for line, content in enumerate(raw.decode().split("\n")):
            text = json.loads(content).get("text") if content else None
            if text:
                texts[shard, line] = text
    return texts


def tokens(documents: Documents, spans: Iterable[Span]) -> list[int]:
    return [token for _, _, shard, line, first, end in spans for token in documents[shard, line][first:end]]


def completed_epochs(spans: list[Span]) -> int:
    """How many epochs every stream has completed."""
    reached: dict[int, int] = {}
    for stream, epoch, *_ in spans:
        reached[stream] = max(epoch, reached.get(stream, 0))
    return min(reached.values())


def lost_and_repeated(documents: Documents, spans: list[Span], epoch: int) -> tuple[int, int]:
    """How many tokens of an epoch were never trained, and how often tokens were trained again."""
    seen = {place: np.zeros(len(ids), dtype=int) for place, ids in documents.items()}
    for _, span_epoch, shard, line, first, end in spans:
        if span_epoch == epoch:
            assert 0 <= first < end <= len(documents[shard, line])
            seen[shard, line][first:end] += 1
    counts = np.concatenate(list(seen.values()))
    return int((counts == 0).sum()), int(np.maximum(counts - 1, 0).sum())


def digest(ids: list[int], seq_len: int) -> str:
    """`data/digest` of a step with the blocks `ids`, concatenated."""
    blocks = np.array(ids, dtype="<i4").reshape(-1, seq_len)
    sums = sum(int.from_bytes(blake2b(block.tobytes(), digest_size=8).digest(), "little") for block in blocks)
    return f"{sums % 2**64:016x}"
