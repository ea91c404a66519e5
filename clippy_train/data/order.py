"""In which order a stream reads the corpus: pure functions of (number of shards, streams, seed, epoch).

World size, loader processes and crashes are not among the arguments, so they cannot change the order.
"""

from dataclasses import dataclass

import numpy as np


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
