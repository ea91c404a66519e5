"""The GPT-2 style tokenizer with tokens for runs of whitespace and, on request, for fill-in-the-middle.

Promise: decode(encode(x)) == x byte for byte on any text, with and without `skip_special_tokens`. The original
registered the whitespace tokens as *special*, so decoding deleted all indentation; here they are plain added tokens.
Those of fill-in-the-middle are special: they stand for no text, and no text of a corpus becomes one of them.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

from clippy_train.config import FIM_TOKENS
from clippy_train.errors import ConfigError, first_line
from clippy_train.files import lfs_hint, looks_local

END_OF_TEXT = "<|endoftext|>"
FIM_NAMES = ("fim_prefix_token", "fim_middle_token", "fim_suffix_token")  # in tokenizer_config.json


class FimIds(NamedTuple):
    """The ids of the tokens before prefix, middle and suffix."""

    prefix: int
    middle: int
    suffix: int


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerFast:
    """Load a fast tokenizer from a folder or from the hub, without running code from there.

    It decodes without "cleaning up" spaces, which changes code.

    Raises:
        ConfigError: it cannot be loaded, is not a fast tokenizer, or has no end-of-text token.
    """
    if looks_local(str(name)) and not Path(name).exists():
        raise ConfigError(f"no tokenizer could be loaded from {name}: no such folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name), trust_remote_code=False)  # otherwise it asks
    except Exception as error:  # the tokenizers library raises nothing more specific
        reason = f"{first_line(error)}{lfs_hint(Path(name))}"
        raise ConfigError(f"no tokenizer could be loaded from {name}: {reason}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer of {name} is not a fast tokenizer with an end-of-text token")
    tokenizer.clean_up_tokenization_spaces = False
    return tokenizer


def train_bpe(texts: Iterable[str], vocab_size: int, model_max_length: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE like GPT-2's: no normaliser, its splitting rule, end-of-text as the last id."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    trained = json.loads(core.to_str())["model"]
    # GPT-2's own class, because transformers 4 cannot load today's general one
    tokenizer = gpt2_tokenizer(trained["vocab"], trained["merges"])
    tokenizer.model_max_length = model_max_length
    return tokenizer


def gpt2_tokenizer(vocabulary: dict[str, int], merges: Iterable[Iterable[str]]) -> PreTrainedTokenizerFast:
    """GPT-2's tokenizer class with a given vocabulary and pairs to merge."""
    pairs: Any = [tuple(pair) for pair in merges]  # transformers declares list[str], but needs pairs
    return GPT2Tokenizer(vocabulary, pairs, clean_up_tokenization_spaces=False)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """A hash of everything that decides a text's ids, independent of file format and library version."""
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    decisive = [core[part] for part in ("model", "added_tokens", "normalizer", "pre_tokenizer")]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def add_whitespace_tokens(tokenizer: PreTrainedTokenizerFast, tokens: list[str], matching: str) -> dict[str, list[int]]:
    """Add the tokens that the tokenizer lacks as plain tokens, in place and in the order given.

    Args:
        matching: `longest` is how today's tokenizers library matches. `first_listed` reproduces the library of 2021,
            which never produced a token listed after one of its own prefixes; such tokens are skipped (and removed if
            the tokenizer has them), and only their ids stay reserved.

    Returns:
        For each new token, the ids that its text had before.

    Raises:
        ConfigError: a token is empty, a skipped token is followed by one that is not, or cannot be removed; or the
            tokenizer has one of them as a *special* token, like the released tokenizers.
    """
    if not all(tokens):
        raise ConfigError("tokenizer.whitespace_tokens: an empty token cannot be added")
    shadowed = [any(token.startswith(first) for first in tokens[:index]) for index, token in enumerate(tokens)]
    if matching == "longest":
        shadowed = [False] * len(tokens)
    elif shadowed != sorted(shadowed):
        raise ConfigError(
            "tokenizer.whitespace_tokens: with tokenizer.matching=first_listed, tokens that begin with an earlier one "
            "are never produced and must come last"
        )
    special = {each.content for each in tokenizer.added_tokens_decoder.values() if each.special}
    if special.union(tokenizer.all_special_tokens) & set(tokens):  # a legacy folder names them beside the vocabulary
        raise ConfigError(
            "the tokenizer registers whitespace tokens as special, so decoding would delete all indentation; use one "
            "without them (tokenizer.base=EleutherAI/gpt-neo-125m); the model keeps its rows for them"
        )
    remove_added_tokens(tokenizer, {token for token, skipped in zip(tokens, shadowed, strict=True) if skipped})
    vocabulary = tokenizer.get_vocab()
    new = [token for token, skipped in zip(tokens, shadowed, strict=True) if not skipped and token not in vocabulary]
    pieces = _pieces(tokenizer, new)
    tokenizer.add_tokens([_exact(token, special=False) for token in new])
    return pieces


def add_fim_tokens(tokenizer: PreTrainedTokenizerFast, tokens: list[str]) -> dict[str, list[int]]:
    """Add the tokens of fill-in-the-middle, unless the tokenizer has them, as named special tokens and in place.

    Args:
        tokens: for prefix, middle and suffix; none adds nothing.

    Returns:
        For each new token, the ids that its text had before.

    Raises:
        ConfigError: the tokenizer has others, or one of these as another token.
    """
    found = fim_tokens(tokenizer)
    if not tokens or found == tokens:
        return {}
    if found:
        raise ConfigError(f"tokenizer.fim_tokens={tokens}: the tokenizer has {found}; set tokenizer.fim_tokens to them")
    taken = [token for token in tokens if token in tokenizer.get_vocab()]
    if taken:
        raise ConfigError(f"tokenizer.fim_tokens={tokens}: {taken[0]} is another token of this vocabulary; rename it")
    pieces = _pieces(tokenizer, tokens)
    # The library accepts and saves names of its list only; it adds those that it finds in a folder.
    tokenizer.SPECIAL_TOKENS_ATTRIBUTES = [*tokenizer.SPECIAL_TOKENS_ATTRIBUTES, *FIM_NAMES]
    named = zip(FIM_NAMES, tokens, strict=True)
    tokenizer.add_special_tokens({name: _exact(token, special=True) for name, token in named})
    return pieces


def fim_tokens(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The tokens before prefix, middle and suffix: those that the folder names, or else StarCoder's; [] if neither."""
    named: dict[str, str] = tokenizer.special_tokens_map
    if named.keys() >= {*FIM_NAMES}:
        return [named[name] for name in FIM_NAMES]
    return FIM_TOKENS if {*FIM_TOKENS} <= {*tokenizer.all_special_tokens} else []


def fim_ids(tokenizer: PreTrainedTokenizerFast) -> FimIds:
    """The ids of `fim_tokens`.

    Raises:
        ConfigError: there are none.
    """
    tokens = fim_tokens(tokenizer)
    if not tokens:
        raise ConfigError(
            "the tokenizer has no tokens for fill-in-the-middle: use a model that was trained with data.fim_rate"
        )
    return FimIds(*(tokenizer.get_vocab()[token] for token in tokens))


def _pieces(tokenizer: PreTrainedTokenizerFast, tokens: list[str]) -> dict[str, list[int]]:
    """The ids of the text of each token."""
    return {token: tokenizer(token, add_special_tokens=False)["input_ids"] for token in tokens}


def _exact(token: str, special: bool) -> AddedToken:
    return AddedToken(token, special=special, normalized=False, lstrip=False, rstrip=False, single_word=False)


def remove_added_tokens(tokenizer: PreTrainedTokenizerFast, tokens: set[str]) -> None:
    """Remove added tokens in place; every other token keeps its id.

    Raises:
        ConfigError: a remaining token would get another id.
    """
    before = tokenizer.get_vocab()
    if not tokens & before.keys():
        return
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    core["added_tokens"] = [token for token in core["added_tokens"] if token["content"] not in tokens]
    without = Tokenizer.from_str(json.dumps(core))
    if without.get_vocab() != {token: index for token, index in before.items() if token not in tokens}:
        raise ConfigError(
            "tokenizer.matching=first_listed: removing the whitespace tokens that are never produced would change the "
            "ids of tokens added after them; start from a tokenizer without whitespace tokens (tokenizer.base)"
        )
    tokenizer._tokenizer = without  # the library has no public way to remove a token


def without_whitespace_tokens(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """The tokenizer's Rust core without its plain added whitespace tokens; ids after theirs may change."""
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    core["added_tokens"] = [t for t in core["added_tokens"] if t["special"] or not t["content"].isspace()]
    return Tokenizer.from_str(json.dumps(core))


def is_byte_level(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the tokens stand for bytes, as `token_bytes` requires."""
    return (json.loads(tokenizer.backend_tokenizer.to_str())["decoder"] or {}).get("type") == "ByteLevel"


def token_bytes(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> np.ndarray:
    """Bytes of text that each id stands for, `[vocab_size]` int32; 0 for special tokens and unused ids.

    They make losses comparable between tokenizers (bits per byte).
    """
    lengths = np.zeros(vocab_size, dtype=np.int32)
    added = tokenizer.added_tokens_decoder
    for token, index in tokenizer.get_vocab().items():
        if index in added:
            lengths[index] = 0 if added[index].special else len(token.encode())
        else:
            lengths[index] = len(token)  # byte-level BPE writes every byte as one character
    return lengths


def encoder(tokenizer: PreTrainedTokenizerFast) -> Callable[[list[str]], list[list[int]]]:
    """A picklable function that maps texts to ids through the Rust core, without adding special tokens.

    If the tokenizer has tokens for fill-in-the-middle, a text that spells a special token is nothing but text.
    """
    return partial(encode_texts, tokenizer.backend_tokenizer, literal=bool(fim_tokens(tokenizer)))


def encode_texts(core: Tokenizer, texts: list[str], literal: bool = False) -> list[list[int]]:
    """The ids of each text, without adding special tokens.

    Args:
        literal: whether text that spells a special token is text, or that token.
    """
    core.encode_special_tokens = literal  # transformers sets it as well before each of its own calls
    return [encoding.ids for encoding in core.encode_batch_fast(texts, add_special_tokens=False)]
