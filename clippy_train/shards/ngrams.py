"""Hashes of neighbouring words or tokens: combined from the hashes of each, three times as fast as hashing their text.

Pure.
"""

import numpy as np

Hashes = np.ndarray  # [any number] uint64
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 divided by the golden ratio: spreads a sum over the upper bits


def ngram_hashes(each: Hashes, length: int) -> Hashes:
    """The hashes of every `length` neighbours, in order; none if there are fewer."""
    grams = np.zeros(max(0, len(each) - length + 1), np.uint64)
    for place in range(length):
        grams = (grams + each[place : place + len(grams)]) * _MULTIPLIER
    return grams
