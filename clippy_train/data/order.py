"""Which stream reads what, in which order: pure functions of (weights, number of shards, streams, seed, epoch).

World size, loader processes and crashes are not among the arguments, so they cannot change the order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np


def deal(count: int, weights: Sequence[float]) -> list[int]:
    """`count` in whole numbers, in proportion to `weights` by the largest remainder; of equal ones, the first's."""
    exact = [count * Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
    dealt = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: dealt[index] - exact[index])
    for index in by_remainder[: count - sum(dealt)]:
        dealt[index] += 1
    return dealt


def spread(counts: Sequence[int]) -> list[int]:
    """`counts[k]` times each `k`, in turn: every stretch of the list has nearly the same shares."""
    listed: list[int] = []
    given, whole = [0] * len(counts), sum(counts)
    for length in range(1, whole + 1):
        behind = [count * length - whole * each for count, each in zip(counts, given, strict=True)]
        listed.append(behind.index(max(behind)))
        given[listed[-1]] += 1
    return listed


@dataclass(frozen=True)
class ShardPart:
    """The lines of one shard that a stream reads: those whose number is `residue` modulo `stride`."""

    shard: int
    stride: int
    residue: int


def stream_parts(num_shards: int, streams: int, stream: int, seed: int, epoch: int) -> list[ShardPart]:
    """What `stream` reads in `epoch`, in order. Together the streams read every line of every shard exactly once.

    Each epoch permutes the shards. As many as divide evenly are given to one stream each; each of the remaining ones
    is read by all streams, line by line in turn. So streams stay balanced for any number of shards, at the price of
    decompressing a shared shard once per stream: a multiple of `streams` shards is the cheapest.
    """
    shards = permutation(num_shards, seed, epoch)
    share = num_shards // streams
    own = [ShardPart(int(shard), 1, 0) for shard in shards[stream * share : (stream + 1) * share]]
    shared = [ShardPart(int(shard), streams, stream) for shard in shards[streams * share :]]
    parts = own + shared
    return [parts[i] for i in permutation(len(parts), seed, epoch, stream + 1)]


def permutation(count: int, *key: int) -> np.ndarray:
    """A permutation of range(count) that depends on `key` alone.

    `RandomState`, not `Generator`: NumPy promises that its stream never changes, and a run may outlive a release.
    """
    return np.random.RandomState([part & 0xFFFFFFFF for part in key]).permutation(count)
