"""Which documents hold a problem of a benchmark: n-grams that do not depend on white space, comments or names.

The rule follows StarCoder's, which removed the files with a description or a reference solution of a benchmark. That
one searches for the exact text; here a document holds a problem if it has at least `SHARE` of the n-grams of the
problem's description (`WORDS` words), or of its program (`TOKENS` tokens; other names than keywords, Python's built-ins
and attributes are all the same). A text of few n-grams is in ordinary code too, and is not searched for. Pure
functions of the text and the files. Cost: 5 MB/s of text.
"""

import builtins
import keyword
import re
import zlib
from collections.abc import Callable, Iterable
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np

from clippy_train.shards.ngrams import Hashes, ngram_hashes
from clippy_train.shards.problems import Problem, read_problems

WORDS, TOKENS = 6, 12  # in an n-gram
MIN_GRAMS = 6  # of a text that is searched for
SHARE = 0.6
_WORD = re.compile(r"[^\W\d_]+")
_EXAMPLE = re.compile(r"^\s*(?:>>>|assert\b).*", re.MULTILINE)
_TOKEN = re.compile(
    r'"""[\s\S]*?"""|\'\'\'[\s\S]*?\'\'\'|#.*'  # docstrings and comments
    r'|"(?:[^"\\\n]|\\.)*"|\'(?:[^\'\\\n]|\\.)*\''
    r"|\.\s*[^\W\d]\w*|[^\W\d]\w*|\d[\w.]*|[^\w\s]"
)
_NAMED = {*keyword.kwlist, *dir(builtins)}  # names that a copy cannot change


class Index(NamedTuple):
    """The n-grams of some texts.

    Attributes:
        grams: those of every text, ascending.
        owners: the text of each of them.
        sizes: the number of n-grams of each text.
    """

    grams: Hashes
    owners: np.ndarray
    sizes: np.ndarray

    def shares(self, grams: Hashes) -> np.ndarray:
        """The share of the n-grams of each text that are among `grams`."""
        places = np.searchsorted(self.grams, grams).clip(max=len(self.grams) - 1)
        found = np.isin(self.grams, np.unique(grams[self.grams[places] == grams]))
        return np.asarray(np.bincount(self.owners[found], minlength=len(self.sizes)) / self.sizes)


def held_problem(text: str, files: Iterable[str]) -> str | None:
    """The id of the problem that a text holds most of, if that is enough to say that it holds it.

    Args:
        files: of problems, as `read_problems` takes them.
    """
    for ids, index, grams_of in _indices(tuple(files)):
        shares = index.shares(grams_of(text))
        if shares.max() >= SHARE:
            return ids[int(shares.argmax())]
    return None


@cache
def _indices(files: tuple[str, ...]) -> list[tuple[list[str], Index, Callable[[str], Hashes]]]:
    """What is searched for: the problems' ids, their n-grams, and how a text is cut into such n-grams."""
    problems = [problem for file in files for problem in read_problems(file, "filter.decontaminate")]
    described = _index(problems, lambda each: _word_grams(_EXAMPLE.sub("", each.prompt)))
    solved = _index(problems, lambda each: _token_grams(each.prompt + each.reference))
    kinds = ((*described, _word_grams), (*solved, _token_grams))
    return [(ids, index, grams_of) for ids, index, grams_of in kinds if ids]


def _index(problems: list[Problem], grams_of: Callable[[Problem], Hashes]) -> tuple[list[str], Index]:
    found = [(str(each.task_id), np.unique(grams_of(each))) for each in problems]
    kept = [(name, grams) for name, grams in found if len(grams) >= MIN_GRAMS]
    sizes = np.array([len(grams) for _, grams in kept], np.int64)
    owners = np.repeat(np.arange(len(kept)), sizes)
    every = np.concatenate([np.empty(0, np.uint64), *(grams for _, grams in kept)])
    order = np.argsort(every, kind="stable")
    return [name for name, _ in kept], Index(every[order], owners[order], sizes)


def _word_grams(text: str) -> Hashes:
    return ngram_hashes(np.fromiter(map(_hash, _WORD.findall(text.lower())), np.uint64), WORDS)


def _token_grams(text: str) -> Hashes:
    return ngram_hashes(np.fromiter(filter(None, map(_token_hash, _TOKEN.findall(text))), np.uint64), TOKENS)


@lru_cache(1 << 16)
def _token_hash(token: str) -> int:
    """A number for what a token is in any copy of a program; 0 for what a copy can lack."""
    if token[0] == "#" or token[:3] in ('"""', "'''"):
        return 0
    if token[0] in "\"'":
        return _hash(f"'{token[1:-1]}")
    if token[0] == ".":
        return _hash(f".{token[1:].strip()}")
    return _hash("name" if (token[0] == "_" or token[0].isalpha()) and token not in _NAMED else token)


def _hash(token: str) -> int:
    return zlib.crc32(token.encode()) + 1  # never 0
