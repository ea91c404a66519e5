"""Fill-in-the-middle: what becomes of a document depends on its place, the epoch and the settings alone; its pieces are
its text; and control tokens come from the objective only, never from a text."""

import json
import struct
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from hashlib import blake2b
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle
from support.models import CODE, gpt_neo, small_bpe
from support.runs import Runs
from transformers import PreTrainedTokenizerFast

from clippy_train.cli import main
from clippy_train.compose import compose
from clippy_train.config import FIM_TOKENS, ExportConfig, ExtendConfig, TokenizerConfig, TrainConfig
from clippy_train.data.batches import train_batches, validation_batches
from clippy_train.data.objectives import FillInTheMiddle, LeftToRight, PlacedDocument
from clippy_train.data.stream import COUNTS, START, Block, Cursor, Stream
from clippy_train.errors import ConfigError, DataError
from clippy_train.hf.export import export_run
from clippy_train.hf.extend import extend_folder
from clippy_train.model.build import build_model, extend_model
from clippy_train.model.embeddings import embedding_weight
from clippy_train.model.load import save_model
from clippy_train.model.sample import Gap, generate_tokens, prompt_ids
from clippy_train.run.folder import LEDGER
from clippy_train.run.rows import read_rows
from clippy_train.shards.format import Fields
from clippy_train.shards.sources import FileCorpus
from clippy_train.tokenizer import FimIds, add_fim_tokens, encoder, fim_ids, fim_tokens, load_tokenizer, token_bytes

EOS, IDS = 0xD800, FimIds(0xD801, 0xD802, 0xD803)  # surrogates, which no text has
P, M, S = IDS
TEXTS = st.text(max_size=30)


def characters(texts: list[str]) -> list[list[int]]:
    """One token for each character."""
    return [list(map(ord, text)) for text in texts]


def objective(rate: float = 1.0, spm_rate: float = 0.5, seed: int = 0, part: int | None = None) -> FillInTheMiddle:
    return FillInTheMiddle(characters, EOS, IDS, rate, spm_rate, seed, part)


def placed(texts: list[str]) -> list[PlacedDocument]:
    return [PlacedDocument(text, number % 3, number) for number, text in enumerate(texts)]


def restored(ids: list[int]) -> tuple[str, Counter[str]]:
    """The text that a document's ids were made from, and how often each order occurs; checks their form."""
    found, orders = "", Counter[str]()
    while ids:
        if ids[0] != P:  # text as it is, up to the next part or the end
            end = next(place for place, each in enumerate(ids) if each in (P, EOS))
            found, ids = found + text(ids[:end]), ids[end + (ids[end] == EOS) :]
            orders["left to right"] += 1
            continue
        end = ids.index(EOS)
        part, ids = ids[1:end], ids[end + 1 :]
        s, m = part.index(S), part.index(M)
        assert s < m
        if s:
            pieces = part[:s], part[m + 1 :], part[s + 1 : m]
            orders["prefix first"] += 1
        else:  # with the suffix first, or an empty prefix
            pieces = [], part[m + 1 :], part[1:m]
            orders["suffix first"] += 1
        found += "".join(map(text, pieces))
    return found, orders


def text(ids: list[int]) -> str:
    return "".join(map(chr, ids))


@pytest.mark.slow
@given(st.lists(TEXTS, max_size=5), st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**31), st.integers(0, 9))
def test_the_pieces_of_a_document_are_its_text(
    texts: list[str], rate: float, spm_rate: float, seed: int, epoch: int
) -> None:
    for size in (None, 1, 7):
        for document, ids in zip(texts, objective(rate, spm_rate, seed, size)(epoch, placed(texts)), strict=True):
            assert ids.dtype == np.int32
            assert ids[-1] == EOS
            assert restored(ids.tolist())[0] == document


def test_the_order_of_the_pieces_is_that_of_starcoder() -> None:
    (prefix_first,), (suffix_first,) = (objective(1, spm, seed=1)(0, placed(["abcdefgh"])) for spm in (0, 1))
    pieces = text(prefix_first.tolist()[:-1])
    prefix, _, rest = pieces[1:].partition(chr(S))
    suffix, _, middle = rest.partition(chr(M))
    assert prefix + middle + suffix == "abcdefgh"
    assert 0 < len(prefix) < len(prefix + middle) < 8  # so that the orders differ
    assert prefix_first.tolist() == [P, *map(ord, prefix), S, *map(ord, suffix), M, *map(ord, middle), EOS]
    assert suffix_first.tolist() == [P, S, *map(ord, suffix), M, *map(ord, prefix + middle), EOS]


@pytest.mark.slow
def test_the_shares_are_those_of_the_settings() -> None:
    letters = "abcdefghijklmnopqrstuvwxyz"
    orders = Counter[str]()
    for ids in objective(0.7, 0.25)(0, placed([letters] * 4000)):
        orders += restored(ids.tolist())[1]
    assert orders["left to right"] / 4000 == pytest.approx(0.3, abs=0.03)
    empty = (2 * 27 - 1) / 27**2  # share of prefixes; with an empty one, both orders look alike
    assert orders["suffix first"] / 4000 == pytest.approx(0.7 * (0.25 + 0.75 * empty), abs=0.03)


def test_each_part_of_a_long_document_has_a_choice_and_an_end_of_its_own() -> None:
    found = [ids.tolist() for ids in objective(0.7, part=10)(0, placed(["abcdefghijklmnopqrstuvwxyz"] * 1000))]
    assert sum(ids.count(P) for ids in found) / 3000 == pytest.approx(0.7, abs=0.03)
    assert {ids.count(P) for ids in found} == {0, 1, 2, 3}
    for ids in found:
        assert ids[-1] == EOS
        assert all(before == EOS for before, token in pairwise(ids) if token == P)  # never within a text


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_the_extremes_of_the_rate_leave_out_nothing(rate: float) -> None:
    documents = placed([str(number) for number in range(500)])
    rearranged = [ids.tolist()[0] == P for ids in objective(rate)(0, documents)]
    assert rearranged == [bool(rate)] * 500
    if not rate:
        assert [each.tolist() for each in objective(rate)(0, documents)] == [
            each.tolist() for each in LeftToRight(characters, EOS)(0, documents)
        ]


def test_every_cut_is_as_likely() -> None:
    seen = Counter[tuple[int, int]]()
    for ids in objective(1, 0)(0, placed(["ab"] * 9000)):
        prefix, _, rest = text(ids.tolist()[1:-1]).partition(chr(S))
        seen[len(prefix), len(rest.partition(chr(M))[2])] += 1
    # Two of three places, in any order: both the same with 1 / 9, two different ones with 2 / 9.
    places = {(low, high - low): 1 + (low < high) for low in range(3) for high in range(low, 3)}
    assert {place: count / 1000 for place, count in seen.items()} == pytest.approx(places, abs=0.12)


@given(st.lists(TEXTS, min_size=1, max_size=8), st.data())
def test_what_becomes_of_a_document_depends_on_its_place_and_the_epoch_alone(
    texts: list[str], data: st.DataObject
) -> None:
    documents = placed(texts)
    together = [each.tolist() for each in objective(0.5, part=9)(3, documents)]
    assert [objective(0.5, part=9)(3, [each])[0].tolist() for each in documents] == together
    some = data.draw(st.permutations(range(len(texts))))
    again = objective(0.5, part=9)(3, [documents[index] for index in some])
    assert [each.tolist() for each in again] == [together[index] for index in some]


def test_every_part_of_the_place_decides() -> None:
    document = PlacedDocument(CODE[0], 1, 2)

    def tokens(seed: int, epoch: int, each: PlacedDocument) -> tuple[int, ...]:
        return tuple(objective(seed=seed)(epoch, [each])[0].tolist())

    others = {
        tokens(0, 0, document),
        tokens(1, 0, document),
        tokens(0, 1, document),
        tokens(0, 0, document._replace(shard=2)),
        tokens(0, 0, document._replace(line=3)),
    }
    assert len(others) == 5


@pytest.mark.parametrize("content", ["", "x", "🙂", "\x00"])
def test_the_shortest_texts_have_pieces_too(content: str) -> None:
    for number in range(20):
        (ids,) = objective()(number, placed([content]))
        assert len(ids) == len(content) + 4
        assert restored(ids.tolist())[0] == content


# Streams


@pytest.mark.slow
@settings(max_examples=20)
@given(
    st.lists(st.lists(st.text("ab\n", min_size=1, max_size=40), max_size=6), min_size=1, max_size=3),
    st.integers(1, 3),
    st.sampled_from([None, 1, 12]),
)
def test_a_stream_that_starts_at_a_cursor_continues_with_the_same_blocks(
    shards: list[list[str]], streams: int, size: int | None
) -> None:
    if sum(map(len, shards)) < streams:
        return
    with tempfile.TemporaryDirectory() as folder:
        corpus = _corpus(Path(folder), shards)
        for index in range(streams):
            stream = Stream(corpus, objective(0.8, part=size), 5, index, streams, seed=1, window=4)
            blocks = _take(stream, START, 20)
            for number, block in enumerate(blocks[:-3]):
                again = _take(stream, block.cursor, 3)
                assert [_comparable(each) for each in again] == [
                    _comparable(each) for each in blocks[number + 1 : number + 4]
                ]


@pytest.mark.slow
@settings(max_examples=60)
@given(st.lists(st.text("ab\n", min_size=1, max_size=40), min_size=1, max_size=9), st.sampled_from([None, 12]))
def test_the_ledger_has_every_token_of_an_epoch_once_and_counts_the_original_text(
    texts: list[str], size: int | None
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        stream = Stream(_corpus(Path(folder), [texts]), objective(0.8, part=size), seq_len=1, window=4)
        whole = objective(0.8, part=size)
        expected = {
            line: whole(0, [PlacedDocument(content, 0, line)])[0].tolist() for line, content in enumerate(texts)
        }
        blocks = _take(stream, START, sum(map(len, expected.values())))
    seen: dict[int, list[int]] = {line: [] for line in expected}
    for block in blocks:
        for span in block.spans:
            assert (span.epoch, span.shard, span.first) == (0, 0, len(seen[span.line]))
            seen[span.line] += block.tokens.tolist()
    assert seen == expected
    counts = dict(zip(COUNTS, np.sum([block.counts for block in blocks], axis=0).tolist(), strict=True))
    assert (counts["documents"], counts["characters"]) == (len(texts), sum(map(len, texts)))


def _corpus(folder: Path, shards: list[list[str]]) -> FileCorpus:
    paths = [folder / f"{number}.jsonl" for number in range(len(shards))]
    for path, lines in zip(paths, shards, strict=True):
        path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return FileCorpus("data.path", tuple(map(str, paths)), "", Fields())


def _take(stream: Stream, cursor: Cursor, count: int) -> list[Block]:
    blocks: list[Block] = []
    with suppress(DataError):  # no documents for this stream
        blocks.extend(islice(stream.blocks(cursor), count))
    return blocks


def _comparable(block: Block) -> tuple[object, ...]:
    return block.tokens.tolist(), block.cursor, block.counts.tolist(), block.spans


# Tokenizer and model


def with_fim(tokens: list[str] = FIM_TOKENS) -> PreTrainedTokenizerFast:
    tokenizer = small_bpe()
    add_fim_tokens(tokenizer, tokens)
    return tokenizer


LETTERS = with_fim()


def test_the_tokens_are_special_and_a_folder_names_them(tmp_path: Path) -> None:
    names = ["<PRE>", "<MID>", "<SUF>"]
    tokenizer = with_fim(names)
    for attempt in ("first", "second"):
        tokenizer.save_pretrained(tmp_path / attempt)
        tokenizer = load_tokenizer(tmp_path / attempt)
        assert fim_tokens(tokenizer) == names
        assert fim_ids(tokenizer) == (330, 331, 332)
        assert tokenizer.decode([331, 332, 330, 331], skip_special_tokens=True) == ""
        assert token_bytes(tokenizer, 333)[330:].tolist() == [0, 0, 0]
    assert add_fim_tokens(tokenizer, names) == {}


def test_a_tokenizer_with_starcoders_special_tokens_needs_no_names() -> None:
    tokenizer = small_bpe()
    with pytest.raises(ConfigError, match="no tokens for fill-in-the-middle"):
        fim_ids(tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": FIM_TOKENS})
    assert fim_ids(tokenizer) == (330, 331, 332)


def test_whitespace_tokens_stay_plain_beside_them() -> None:
    model, tokenizer = gpt_neo(vocab_size=330), small_bpe()
    extend_model(model, tokenizer, TokenizerConfig(), fim_tokens=FIM_TOKENS)
    assert [each.special for index, each in tokenizer.added_tokens_decoder.items() if index >= 330] == [
        *[False] * 4,
        *[True] * 3,
    ]
    ids = encoder(tokenizer)(CODE)
    assert [tokenizer.decode(each, skip_special_tokens=True) for each in ids] == CODE


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (["def", "<a>", "<b>"], "def is another token of this vocabulary"),
        (["<|endoftext|>", "<a>", "<b>"], r"<\|endoftext\|> is another token"),
    ],
)
def test_tokens_that_the_vocabulary_has_for_something_else_are_refused(tokens: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        with_fim(tokens)


def test_other_tokens_than_those_of_the_base_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"the tokenizer has \['<fim_prefix>'"):
        add_fim_tokens(with_fim(), ["<PRE>", "<MID>", "<SUF>"])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.fim_rate=1.1"], "data.fim_rate=1.1: must be at most 1.0"),
        (["data.fim_rate=-0.1"], "data.fim_rate=-0.1: must be at least 0.0"),
        (["data.fim_spm_rate=2"], "data.fim_spm_rate=2.0: must be at most 1.0"),
        (["data.fim_characters=0"], "data.fim_characters=0: must be at least 1"),
        (["data.fim_rate=.5", "data.eos_between_documents=false"], "set data.eos_between_documents=true"),
        (["data.fim_rate=.5", "data.prompt_column=prompt"], "set one of them only"),
        (["tokenizer.fim_tokens=[a,b,a]"], "tokenizer.fim_tokens=['a', 'b', 'a']: must be three different tokens"),
        (["tokenizer.fim_tokens=[a,b]"], "must be three different tokens"),
        (["tokenizer.fim_tokens=[a,b,' ']"], "without white space"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    train_config: Callable[..., TrainConfig], overrides: list[str], words: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        train_config(*overrides)
    assert words in str(refused.value)


@pytest.mark.parametrize("init", ["tab", "mean_of_pieces"])
def test_new_rows_are_initialised_like_those_of_whitespace_tokens(init: str) -> None:
    model, tokenizer = gpt_neo(vocab_size=330), small_bpe()
    before = embedding_weight(model).detach().clone()
    pieces = {token: tokenizer(token)["input_ids"] for token in FIM_TOKENS}
    extend_model(model, tokenizer, TokenizerConfig(whitespace_tokens=[], new_row_init=init), fim_tokens=FIM_TOKENS)
    after, (tab,) = embedding_weight(model), tokenizer("\t")["input_ids"]
    assert after.shape[0] == 333
    assert after[:330].equal(before)
    for row, token in enumerate(FIM_TOKENS, 330):
        assert after[row].equal(before[tab] if init == "tab" else before[pieces[token]].mean(dim=0))


@pytest.mark.slow
def test_clippy_extend_adds_them(tmp_path: Path) -> None:
    base = tmp_path / "base"
    gpt_neo(vocab_size=330).save_pretrained(base)
    small_bpe().save_pretrained(base)
    settings = [f"base={base}", "whitespace_tokens=[]"]
    names = "fim_tokens=['<fim_prefix>','<fim_middle>','<fim_suffix>']"
    done = extend_folder(compose(ExtendConfig, [*settings, f"out={tmp_path}/out", names]))
    assert "330 tokens plus 3 new ones" in done
    assert fim_ids(load_tokenizer(tmp_path / "out")) == (330, 331, 332)
    extend_folder(compose(ExtendConfig, [*settings, f"out={tmp_path}/without"]))
    assert fim_tokens(load_tokenizer(tmp_path / "without")) == []
    with pytest.raises(ConfigError, match=r"fim_tokens=.*must be three"):
        compose(ExtendConfig, [*settings, f"out={tmp_path}/third", "fim_tokens=[a]"])


def test_a_text_that_spells_a_control_token_is_nothing_but_text() -> None:
    tokenizer, spelled = with_fim(), "a<fim_middle>b<|endoftext|><fim_prefix><fim_suffix>"
    (ids,) = encoder(tokenizer)([spelled])
    assert not {tokenizer.eos_token_id, *fim_ids(tokenizer)} & {*ids}
    assert tokenizer.decode(ids, skip_special_tokens=True) == spelled
    assert token_bytes(tokenizer, 333)[ids].sum() == len(spelled)
    assert tokenizer.eos_token_id in tokenizer(spelled)["input_ids"]  # what others send to an exported model stays free


# Filling a gap


def test_a_gap_is_asked_for_with_the_prefix_first() -> None:
    tokenizer = with_fim()
    p, m, s = fim_ids(tokenizer)
    before, after = encoder(tokenizer)(["return x", "y = <fim_middle>1"])
    assert prompt_ids(tokenizer, Gap("return x", "y = <fim_middle>1")) == [p, *before, s, *after, m]
    assert prompt_ids(tokenizer, Gap("", "")) == [p, s, m]


@given(st.integers(0, 30), st.integers(0, 30), st.integers(3, 40))
def test_without_room_what_is_nearest_to_the_gap_is_kept(before: int, after: int, room: int) -> None:
    ids = prompt_ids(LETTERS, Gap("ab" * before, "ab" * after), room)
    p, m, s = fim_ids(LETTERS)
    kept = min(room, 2 * before + 2 * after + 3)
    assert (len(ids), ids[0], ids[-1]) == (kept, p, m)
    left, right = ids[1 : ids.index(s)], ids[ids.index(s) + 1 : -1]
    letters = LETTERS("ab" * 40)["input_ids"]
    assert left == letters[len(letters) - len(left) :]
    assert right == letters[: len(right)]
    assert len(left) == 2 * before or len(right) == 2 * after or abs(len(left) - len(right)) <= 1


@pytest.mark.slow
def test_generate_prints_what_stands_between_prompt_and_suffix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = gpt_neo(vocab_size=330, seed=3), small_bpe()
    save_model(model, tokenizer, tmp_path / "without")
    extend_model(model, tokenizer, TokenizerConfig(whitespace_tokens=[]), fim_tokens=FIM_TOKENS)
    save_model(model, tokenizer, tmp_path / "model")
    asked = ["prompt=def f(x):", "suffix=return x", "max_new_tokens=12"]
    assert main(["generate", f"model={tmp_path / 'model'}", *asked]) == 0
    ids = torch.tensor([prompt_ids(tokenizer, Gap("def f(x):", "return x"))])
    out = generate_tokens(model.eval(), ids, max_new_tokens=12, do_sample=False, eos_token_id=tokenizer.eos_token_id)
    expected = tokenizer.decode(out[0, ids.size(1) :], skip_special_tokens=True)
    assert capsys.readouterr().out.rstrip("\n") == str(expected).rstrip("\n")
    assert main(["generate", f"model={tmp_path / 'without'}", *asked]) == 2
    assert "no tokens for fill-in-the-middle" in capsys.readouterr().err
    assert main(["generate", f"model={tmp_path / 'model'}", *asked[:2], "max_new_tokens=61"]) == 2
    assert "this model has room for 60" in capsys.readouterr().err
    assert main(["generate", "--interactive", f"model={tmp_path / 'model'}", "suffix=x"]) == 2


# Batches and runs

FIM = ["data.fim_rate=0.7", "data.fim_characters=300"]


@pytest.mark.slow
def test_training_reads_as_set_and_validation_from_left_to_right(train_config: Callable[..., TrainConfig]) -> None:
    config, plain = (train_config("data.streams=4", "data.num_workers=0", *each) for each in (FIM, []))
    _, tokenizer = build_model(config)
    cursors = np.zeros((config.data.streams, len(Cursor._fields)), dtype=np.int64)
    batch = next(iter(train_batches(config, tokenizer, 0, cursors, 0)))["input_ids"]
    assert {*fim_ids(tokenizer)} <= {*batch.flatten().tolist()}
    validated, _ = validation_batches(config, tokenizer, 0)
    expected, _ = validation_batches(plain, build_model(plain)[1], 0)
    assert [each["input_ids"].tolist() for each in validated] == [each["input_ids"].tolist() for each in expected]


def test_without_it_no_token_is_added(train_config: Callable[..., TrainConfig], tiny_tokenizer: Path) -> None:
    _, tokenizer = build_model(train_config())
    assert tokenizer.get_vocab() == load_tokenizer(tiny_tokenizer).get_vocab()


SETTINGS = [
    *FIM,
    "trainer.audit=true",
    "data.seq_len=64",
    "data.streams=8",
    "trainer.global_batch_size=32",
    "trainer.micro_batch_size=8",
    "trainer.max_steps=48",
    "trainer.val_every_steps=48",
    "checkpoint.every_steps=7",
    "strategy=zero1",
]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, tiny_tokenizer: Path) -> Runs:
    """A run of two ranks that was killed at an arbitrary moment, then resumed and finished."""
    runs = Runs(tmp_path_factory.mktemp("fim"), tiny_corpus, tiny_tokenizer)
    runs.train_with_a_kill("killed", 10, *SETTINGS)
    return runs


def rearranged(content: str, encode: Callable[[str], list[int]], special: list[int], *place: int) -> list[int]:
    """The tokens of a document, restated: `place` is epoch, shard and line; the settings are those of `FIM`."""
    p, m, s, eos = special
    found: list[int] = []
    for begin in range(0, len(content), 300):
        part = content[begin : begin + 300]
        drawn = struct.unpack("<4Q", blake2b(struct.pack("<5q", 42, *place, begin), digest_size=32).digest())
        chosen = drawn[0] / 2**64 < 0.7
        low, high = sorted(int(each * (len(part) + 1)) >> 64 for each in drawn[2:])
        prefix, middle, suffix = (encode(each) for each in (part[:low], part[low:high], part[high:]))
        if chosen and found and found[-1] != eos:
            found.append(eos)
        if not chosen:
            found += encode(part)
        elif drawn[1] / 2**64 < 0.5:
            found += [p, s, *suffix, m, *prefix, *middle, eos]
        else:
            found += [p, *prefix, s, *suffix, m, *middle, eos]
    return found if chosen else [*found, eos]


@pytest.mark.processes
def test_after_a_kill_every_token_was_trained_once_as_the_settings_say(killed: Runs, tiny_corpus: Path) -> None:
    tokenizer = load_tokenizer(killed.folder("killed") / "hf")
    special = [*fim_ids(tokenizer), tokenizer.eos_token_id]
    texts = oracle.read_texts(tiny_corpus / "train")
    rows = list(read_rows(killed.folder("killed") / LEDGER))
    every = [span for row in rows for span in row["spans"]]
    epochs = oracle.completed_epochs(every)
    assert epochs >= 1
    of_epoch = [
        {
            place: rearranged(content, lambda each: tokenizer(each)["input_ids"], special, epoch, *place)
            for place, content in texts.items()
        }
        for epoch in range(max(span[1] for span in every) + 1)
    ]
    for epoch in range(epochs):
        assert oracle.lost_and_repeated(of_epoch[epoch], every, epoch) == (0, 0)
    for row, logged in zip(rows, killed.rows("killed"), strict=True):
        ids = [token for span in row["spans"] for token in oracle.tokens(of_epoch[span[1]], [span])]
        assert oracle.digest(ids, seq_len=64) == logged["data/digest"]


@pytest.mark.processes
def test_an_exported_model_carries_the_tokens_and_its_card_the_objective(killed: Runs, tmp_path: Path) -> None:
    out = tmp_path / "model"
    export_run(compose(ExportConfig, [f"run={killed.folder('killed')}", f"out={out}"]))
    assert fim_tokens(load_tokenizer(out)) == FIM_TOKENS
    assert "fill-in-the-middle" in (out / "README.md").read_text()
