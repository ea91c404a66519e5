"""How documents become tokens: what a model learns to predict.

Promise: the tokens of a document depend on its text, its place in the corpus, the epoch and the settings alone, so a
stream can be resumed inside it. Fill-in-the-middle costs a hash for each choice, and the tokenizer shorter texts.

A token that a model reads but need not predict is stored as its complement, `~id`, which is negative.
"""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple, Protocol

import numpy as np

from clippy_train.config import DataConfig
from clippy_train.tokenizer import FimIds

Encode = Callable[[list[str]], list[list[int]]]  # texts to their ids, without the end-of-text token
LEFT_TO_RIGHT = "left to right"
PLACE, DRAWS = struct.Struct("<5q"), struct.Struct("<4Q")


class PlacedDocument(NamedTuple):
    """A document and where it stands: line `line`, from 0, of shard `shard` of its corpus."""

    text: str
    shard: int
    line: int
    prompt: str = ""


class Objective(Protocol):
    def __call__(self, epoch: int, documents: list[PlacedDocument]) -> list[np.ndarray]:
        """The tokens of each document in this epoch, int32."""


@dataclass(frozen=True)
class LeftToRight:
    """Every token of a document, in the order of its text.

    Args:
        eos: id appended to every document, or None.
    """

    encode: Encode
    eos: int | None = None

    def __call__(self, epoch: int, documents: list[PlacedDocument]) -> list[np.ndarray]:
        end = [] if self.eos is None else [self.eos]
        return [np.array([*ids, *end], dtype=np.int32) for ids in self.encode([each.text for each in documents])]


@dataclass(frozen=True)
class Completion:
    """A prompt, which is only read, and a text that continues it, which is predicted; both encoded on their own.

    Args:
        eos: id appended to every document, and predicted; or None.
        longest: tokens of a document. What exceeds them is cut off at `cut`: at the `start`, from the prompt only, or
            at the `end`.
    """

    encode: Encode
    eos: int | None
    longest: int
    cut: str = "start"

    def __call__(self, epoch: int, documents: list[PlacedDocument]) -> list[np.ndarray]:
        prompts = self.encode([each.prompt for each in documents])
        texts = LeftToRight(self.encode, self.eos)(epoch, documents)
        return [self._joined(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]

    def _joined(self, prompt: list[int], text: np.ndarray) -> np.ndarray:
        excess = max(0, len(prompt) + len(text) - self.longest)
        read = np.array(prompt[excess:] if self.cut == "start" else prompt, dtype=np.int32)
        return np.concatenate([~read, text])[: self.longest]


def token_ids(tokens: np.ndarray) -> np.ndarray:
    """The ids of tokens that are predicted or only read."""
    return np.where(tokens < 0, ~tokens, tokens)


def describe_objective(data: DataConfig) -> str:
    """What a model learns to predict, in words."""
    if data.prompt_column is not None:
        return f"the text that continues a prompt, {'packed' if data.packing else 'padded'}"
    if not data.fim_rate:
        return LEFT_TO_RIGHT if data.packing else f"{LEFT_TO_RIGHT}, padded"
    of = f"parts of {data.fim_characters:,} characters" if data.fim_characters else "documents"
    return f"fill-in-the-middle in {data.fim_rate:.0%} of {of}, {data.fim_spm_rate:.0%} of them with the suffix first"


class Part(NamedTuple):
    """Consecutive text of a document: one piece, or prefix, middle and suffix."""

    pieces: tuple[str, ...]
    suffix_first: bool = False


@dataclass(frozen=True)
class FillInTheMiddle:
    """Some documents in another order, so that a model learns to write what stands between two texts.

    Text is cut at two of its characters, and its pieces are encoded separately. With P, M and S for the special tokens,
    they become `P prefix S suffix M middle` or, with the suffix first, `P S suffix M prefix middle`; as in StarCoder,
    both end with the middle. Other documents stay as `LeftToRight` has them.

    Args:
        eos: id that ends every middle and every document.
        rate: share of documents, or of the parts of `characters`, that are rearranged.
        spm_rate: share of those that have the suffix first.
        characters: longest part that is rearranged by itself; None takes the whole document.
    """

    encode: Encode
    eos: int
    ids: FimIds
    rate: float
    spm_rate: float
    seed: int
    characters: int | None = None

    def __call__(self, epoch: int, documents: list[PlacedDocument]) -> list[np.ndarray]:
        cut = [list(self._parts(epoch, document)) for document in documents]
        encoded = iter(self.encode([piece for parts in cut for part in parts for piece in part.pieces]))
        return [np.array(self._arranged(parts, encoded), dtype=np.int32) for parts in cut]

    def _parts(self, epoch: int, document: PlacedDocument) -> Iterator[Part]:
        length = max(1, len(document.text))
        size = self.characters or length
        for begin in range(0, length, size):
            yield self._part(document.text[begin : begin + size], epoch, document.shard, document.line, begin)

    def _part(self, text: str, *place: int) -> Part:
        rearranged, suffix_first, *ends = draws(self.seed, *place)
        if not is_among(rearranged, self.rate):
            return Part((text,))
        low, high = sorted(end * (len(text) + 1) >> 64 for end in ends)
        return Part((text[:low], text[low:high], text[high:]), is_among(suffix_first, self.spm_rate))

    def _arranged(self, parts: list[Part], encoded: Iterator[list[int]]) -> list[int]:
        """The ids of a document, taken from those of all pieces."""
        found: list[int] = []
        for part in parts:
            pieces = [next(encoded) for _ in part.pieces]
            if len(pieces) > 1 and found and found[-1] != self.eos:
                found.append(self.eos)  # otherwise a model would learn to write a control token within a text
            found += self._rearranged(part, *pieces) if len(pieces) > 1 else pieces[0]
        return found if len(parts[-1].pieces) > 1 else [*found, self.eos]

    def _rearranged(self, part: Part, prefix: list[int], middle: list[int], suffix: list[int]) -> list[int]:
        p, m, s = self.ids
        head = [p, s, *suffix, m, *prefix] if part.suffix_first else [p, *prefix, s, *suffix, m]
        return [*head, *middle, self.eos]


def draws(*place: int) -> tuple[int, ...]:
    """Four independent numbers of 64 bits that depend on seed, epoch, shard, line and character alone."""
    return DRAWS.unpack(blake2b(PLACE.pack(*place), digest_size=DRAWS.size).digest())


def is_among(draw: int, share: float) -> bool:
    """Whether a draw is among the lowest `share` of all."""
    return (draw >> 11) / 2**53 < share  # as many bits as a float holds: none is rounded up to 1
