"""In which order a stream reads the corpus: pure functions of (number of shards, streams, seed, epoch).

World size, loader workers and crashes do not appear here, so they cannot change the order.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Part:
    """What a stream reads of one shard: the lines whose number is `residue` modulo `stride`."""

    shard: int
    stride: int
    residue: int


def parts(num_shards: int, streams: int, stream: int, seed: int, epoch: int) -> list[Part]:
    """What `stream` reads in `epoch`, in order. Over all streams, every line of every shard exactly once.

    Shards are permuted anew in each epoch. As many as divide evenly are dealt out whole; each of the remaining ones
    is read by all streams, line by line in turn. So streams stay balanced for any number of shards, at the price of
    decompressing a shared shard once per stream: a number of shards that is a multiple of `streams` is the cheapest.
    """
    shards = shuffled(num_shards, seed, epoch)
    whole = num_shards // streams
    own = [Part(int(shard), 1, 0) for shard in shards[stream * whole : (stream + 1) * whole]]
    shared = [Part(int(shard), streams, stream) for shard in shards[streams * whole :]]
    mine = own + shared
    return [mine[i] for i in shuffled(len(mine), seed, epoch, stream + 1)]


def shuffled(count: int, *key: int) -> np.ndarray:
    """A permutation of range(count) that depends on `key` alone.

    `RandomState` and not `Generator`: NumPy promises that its stream never changes, and a run may outlive a release.
    """
    return np.random.RandomState([part & 0xFFFFFFFF for part in key]).permutation(count)
