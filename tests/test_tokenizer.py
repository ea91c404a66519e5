"""The tokenizer reproduces every byte of a program, whatever its indentation, also after saving and loading it."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import CODE, WHITESPACE_TOKENS, gpt2_bpe, small_bpe
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from clippy_train.errors import ConfigError
from clippy_train.files import LFS_POINTER
from clippy_train.tokenizer import END_OF_TEXT, add_whitespace_tokens, load_tokenizer, token_bytes

INDENTATION = ["\t", "\t\t", "\t\t\t", " ", "  ", "   ", "    ", "        ", "            ", "\t  ", "  \t", "\u00a0"]
LINE_ENDS = ["\n", "\r\n", "\r", "\n\n", "  \n", "\t\n", " \r\n", ""]
WORDS = [
    "def f(x):",
    "return x",
    "x, y = 1 , 2",
    "it 's n't .",
    "'''doc'''",
    "# naïve — 変数 🙂",
    "e\u0301",
    "\x00\x7f",
    "",
]
LINES = st.builds("{}{}{}".format, *map(st.sampled_from, (INDENTATION, WORDS, LINE_ENDS)))
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)  # lone surrogates have no UTF-8 bytes
TEXTS = st.one_of(st.lists(LINES, max_size=12).map("".join), ANY_TEXT, st.text(" \t\r\n", max_size=40)).filter(
    lambda text: END_OF_TEXT not in text
)


Maker = Callable[[], PreTrainedTokenizerFast]


@pytest.fixture(scope="module", params=[small_bpe, gpt2_bpe])
def make(request: pytest.FixtureRequest) -> Maker:
    """A function that makes a fresh base tokenizer: the project's BPE, or GPT-2's."""
    maker: Maker = request.param
    return maker


@pytest.fixture(scope="module", params=["as built", "reloaded"])
def extended(
    request: pytest.FixtureRequest, make: Maker, tmp_path_factory: pytest.TempPathFactory
) -> PreTrainedTokenizerFast:
    """A tokenizer with the whitespace tokens, as built or loaded from a folder."""
    tokenizer = make()
    add_whitespace_tokens(tokenizer, WHITESPACE_TOKENS, "longest")
    if request.param == "as built":
        return tokenizer
    folder = tmp_path_factory.mktemp("saved")
    tokenizer.save_pretrained(folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def lengths(extended: PreTrainedTokenizerFast) -> np.ndarray:
    return token_bytes(extended, len(extended))


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@pytest.mark.slow
@settings(max_examples=150)
@given(text=TEXTS)
def test_decoding_gives_back_every_byte(extended: PreTrainedTokenizerFast, text: str) -> None:
    ids = encode(extended, text)
    assert str(extended.decode(ids)).encode() == text.encode()
    assert str(extended.decode(ids, skip_special_tokens=True)).encode() == text.encode()


@pytest.mark.slow
@settings(max_examples=150)
@given(text=TEXTS)
def test_token_bytes_count_the_bytes_of_any_text(
    extended: PreTrainedTokenizerFast, lengths: np.ndarray, text: str
) -> None:
    assert lengths[encode(extended, text)].sum() == len(text.encode())


def test_a_spelled_out_end_of_text_is_the_only_text_that_skipping_special_tokens_removes(
    extended: PreTrainedTokenizerFast,
) -> None:
    ids = encode(extended, f"  a{END_OF_TEXT}\t\tb")
    assert extended.eos_token_id in ids
    assert extended.decode(ids) == f"  a{END_OF_TEXT}\t\tb"
    assert extended.decode(ids, skip_special_tokens=True) == "  a\t\tb"


def test_end_of_text_and_unused_rows_have_no_bytes(extended: PreTrainedTokenizerFast) -> None:
    lengths = token_bytes(extended, len(extended) + 3)
    assert lengths.shape == (len(extended) + 3,)
    assert lengths[extended.eos_token_id] == 0
    assert not lengths[len(extended) :].any()
    assert (lengths == 0).sum() == 4


def test_whitespace_tokens_are_plain_added_tokens(extended: PreTrainedTokenizerFast) -> None:
    added = {token.content: token for token in extended.added_tokens_decoder.values()}
    for text in WHITESPACE_TOKENS:
        token = added[text]
        properties = [token.special, token.normalized, token.lstrip, token.rstrip, token.single_word]
        assert properties == [False] * 5
    assert not set(WHITESPACE_TOKENS) & set(extended.all_special_tokens)


def test_new_ids_follow_the_old_ones_in_the_order_listed(make: Maker) -> None:
    tokenizer = make()
    old, ids_before = len(tokenizer), {token: encode(tokenizer, token) for token in WHITESPACE_TOKENS}
    assert add_whitespace_tokens(tokenizer, WHITESPACE_TOKENS, "longest") == ids_before
    assert tokenizer.convert_tokens_to_ids(WHITESPACE_TOKENS) == [old, old + 1, old + 2, old + 3]


@pytest.mark.parametrize(
    ("matching", "expected"),
    [  # by position in the list of tokens: 0 two tabs, 1 two spaces, 2 four spaces, 3 eight spaces
        ("longest", {"\t\t": [0], "  ": [1], "    ": [2], "        ": [3], " " * 14: [3, 2, 1], "\t" * 4: [0, 0]}),
        ("first_listed", {"\t\t": [0], "  ": [1], "    ": [1] * 2, "        ": [1] * 4, " " * 14: [1] * 7}),
    ],
)
def test_which_token_matches_where_several_fit(make: Maker, matching: str, expected: dict[str, list[int]]) -> None:
    tokenizer = make()
    old = len(tokenizer)
    add_whitespace_tokens(tokenizer, WHITESPACE_TOKENS, matching)
    assert {text: encode(tokenizer, text) for text in expected} == {
        text: [old + place for place in places] for text, places in expected.items()
    }


@pytest.mark.parametrize("matching", ["longest", "first_listed"])
def test_adding_twice_changes_nothing(make: Maker, matching: str) -> None:
    tokenizer = make()
    add_whitespace_tokens(tokenizer, WHITESPACE_TOKENS, matching)
    before = tokenizer.get_vocab()
    assert add_whitespace_tokens(tokenizer, WHITESPACE_TOKENS, matching) == {}
    assert tokenizer.get_vocab() == before


def test_first_listed_removes_tokens_that_it_never_produces(make: Maker, tmp_path: Path) -> None:
    fresh, extended = make(), make()
    add_whitespace_tokens(fresh, WHITESPACE_TOKENS, "first_listed")
    add_whitespace_tokens(extended, WHITESPACE_TOKENS, "longest")
    assert add_whitespace_tokens(extended, WHITESPACE_TOKENS, "first_listed") == {}
    extended.save_pretrained(tmp_path)
    for each in (extended, load_tokenizer(tmp_path)):
        assert each.get_vocab() == fresh.get_vocab()
        assert all(encode(each, text) == encode(fresh, text) for text in CODE)
        assert each.eos_token_id == fresh.eos_token_id


def test_removing_tokens_is_refused_if_later_ids_would_change() -> None:
    tokenizer = small_bpe()
    add_whitespace_tokens(tokenizer, WHITESPACE_TOKENS, "longest")
    tokenizer.add_tokens(["<mask>"])
    before = tokenizer.get_vocab()
    with pytest.raises(ConfigError, match="first_listed"):
        add_whitespace_tokens(tokenizer, WHITESPACE_TOKENS, "first_listed")
    assert tokenizer.get_vocab() == before


@pytest.mark.parametrize(
    ("tokens", "matching"),
    [(["  ", "    ", "\t\t"], "first_listed"), (["  ", ""], "longest"), (["  ", ""], "first_listed")],
)
def test_unusable_tokens_are_refused_before_anything_is_added(tokens: list[str], matching: str) -> None:
    tokenizer = small_bpe()
    old = len(tokenizer)
    with pytest.raises(ConfigError, match=r"tokenizer\.whitespace_tokens"):
        add_whitespace_tokens(tokenizer, tokens, matching)
    assert len(tokenizer) == old


def test_the_same_order_is_allowed_with_longest_matching() -> None:
    assert list(add_whitespace_tokens(small_bpe(), ["  ", "    ", "\t\t"], "longest")) == ["  ", "    ", "\t\t"]


def test_a_trained_bpe_has_the_requested_size_and_end_of_text_last() -> None:
    tokenizer = small_bpe()
    assert len(tokenizer) == 330
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == 329
    assert max(len(encode(tokenizer, text)) / len(text.encode()) for text in CODE) < 0.8


def test_a_folder_without_a_tokenizer_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tokenizer could be loaded from .*nothing: no such folder"):
        load_tokenizer(tmp_path / "nothing")


def test_a_tokenizer_without_end_of_text_is_a_configuration_error(tmp_path: Path) -> None:
    tokenizer = small_bpe()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="end-of-text"):
        load_tokenizer(tmp_path)


def test_whitespace_tokens_that_are_special_are_refused() -> None:
    """They are special in the released tokenizers, whose decoding deletes indentation."""
    tokenizer = small_bpe()
    tokenizer.add_tokens([AddedToken("    ", special=True)])
    with pytest.raises(ConfigError, match="delete all indentation"):
        add_whitespace_tokens(tokenizer, WHITESPACE_TOKENS, "longest")


@pytest.fixture
def legacy(tmp_path: Path) -> Path:
    """A folder as older versions of transformers wrote it, with the whitespace tokens among the special ones."""
    model = json.loads(small_bpe().backend_tokenizer.to_str())["model"]
    vocabulary = {**model["vocab"], END_OF_TEXT: len(model["vocab"])}
    added = {token: len(vocabulary) + number for number, token in enumerate(WHITESPACE_TOKENS)}
    special = {"eos_token": END_OF_TEXT, "additional_special_tokens": WHITESPACE_TOKENS}
    for name, content in {
        "vocab.json": vocabulary,
        "added_tokens.json": added,
        "special_tokens_map.json": special,
        "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "clean_up_tokenization_spaces": True},
        "config.json": {"model_type": "gpt_neo"},
    }.items():
        (tmp_path / name).write_text(json.dumps(content))
    merges = "".join(" ".join(pair) + "\n" for pair in model["merges"])
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}")
    return tmp_path


def test_whitespace_tokens_that_are_special_in_a_legacy_folder_are_refused(legacy: Path) -> None:
    with pytest.raises(ConfigError, match="delete all indentation"):
        add_whitespace_tokens(load_tokenizer(legacy), WHITESPACE_TOKENS, "longest")


def test_decoding_never_cleans_up_spaces(legacy: Path) -> None:
    tokenizer = load_tokenizer(legacy)
    assert tokenizer.decode(tokenizer("a , b . c").input_ids) == "a , b . c"
    tokenizer.save_pretrained(legacy / "new")
    assert json.loads((legacy / "new" / "tokenizer_config.json").read_text())["clean_up_tokenization_spaces"] is False


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [(LFS_POINTER + b"v1\nsize 9\n", "{} is only a pointer of Git LFS"), (b"zz qq\n", "could be loaded from")],
    ids=["pointer", "damaged"],
)
def test_a_damaged_tokenizer_is_a_configuration_error(legacy: Path, name: str, content: bytes, message: str) -> None:
    (legacy / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message.format(name)):
        load_tokenizer(legacy)


def test_ids_on_the_gpt2_vocabulary_are_those_of_the_originals_construction() -> None:
    """The original's tokenizer is GPT-2's vocabulary plus the four tokens as special ones, in the same order."""
    ours, original = gpt2_bpe(), gpt2_bpe()
    add_whitespace_tokens(ours, WHITESPACE_TOKENS, "longest")
    original.add_special_tokens({"additional_special_tokens": WHITESPACE_TOKENS})
    samples = [*CODE, *(f"{indent}return x{end}" for indent in INDENTATION for end in LINE_ENDS)]
    assert [ours(text).input_ids for text in samples] == [original(text).input_ids for text in samples]


def test_a_tokenizer_saved_by_transformers_4_keeps_its_ids() -> None:
    """`data/tokenizer_transformers_4`: GPT-2's class with plain whitespace tokens, saved by transformers 4.46.3."""
    folder = Path(__file__).parent / "data" / "tokenizer_transformers_4"
    tokenizer = load_tokenizer(folder)
    assert not add_whitespace_tokens(tokenizer, WHITESPACE_TOKENS, "longest")
    for recorded in json.loads((folder / "ids.json").read_text()):
        ids = tokenizer(recorded["text"]).input_ids
        assert ids == recorded["ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == recorded["text"]
