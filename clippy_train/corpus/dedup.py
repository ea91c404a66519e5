"""Duplicate documents: exact ones (the same words in the same order), and near ones (MinHash LSH).

Promises: the first document of a fixed order is kept, so the result is a function of that order. Only words (runs of
letters, digits and underscores) are compared, as in the original: whitespace and punctuation do not count. Cost on one
core: 20 MB/s for `exact`, 2 MB/s for `near`; memory grows by some 100 bytes and some 9 kB per kept document.
"""

import hashlib
import re
from itertools import islice

from datasketch import MinHash, MinHashLSH

from clippy_train.config import DedupConfig
from clippy_train.errors import ConfigError

SHINGLE = 5  # words, as in The Stack's and StarCoder's deduplication
BATCH = 10_000  # shingles hashed at once: MinHash holds `permutations` numbers for each
_WORD = re.compile(r"\w+")


class DuplicateIndex:
    """The documents that later ones are compared with.

    Raises:
        ConfigError: no index can be built for the threshold with so few permutations.
    """

    def __init__(self, config: DedupConfig) -> None:
        self.config = config
        self._seen: set[bytes] = set()
        self._near = _index(config) if config.near else None

    def add(self, text: str) -> str | None:
        """Add a document unless it is a duplicate; return `exact_duplicate`, `near_duplicate` or None."""
        words = _WORD.findall(text) if self.config.exact or self.config.near else []
        if self.config.exact and not self._is_new(words):
            return "exact_duplicate"
        if self._near is None:
            return None
        signature = sketch(words, self.config.permutations)
        if self._near.query(signature):
            return "near_duplicate"
        self._near.insert(len(self._near.keys), signature, check_duplication=False)
        return None

    def _is_new(self, words: list[str]) -> bool:
        digest = hashlib.blake2b(" ".join(words).encode(), digest_size=16).digest()
        before = len(self._seen)
        self._seen.add(digest)
        return len(self._seen) > before


def sketch(words: list[str], permutations: int) -> MinHash:
    """The MinHash of a document's shingles; a document shorter than a shingle counts as one."""
    signature = MinHash(num_perm=permutations)
    shingles = iter({" ".join(words[i : i + SHINGLE]).encode() for i in range(max(1, len(words) - SHINGLE + 1))})
    while batch := list(islice(shingles, BATCH)):
        signature.update_batch(batch)
    return signature


def _index(config: DedupConfig) -> MinHashLSH:
    try:
        return MinHashLSH(threshold=config.threshold, num_perm=config.permutations)
    except ValueError as error:
        raise ConfigError(
            f"dedup.threshold={config.threshold}, dedup.permutations={config.permutations}: {error}; "
            "use more permutations or a lower threshold"
        ) from error
