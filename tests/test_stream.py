"""Streams: every document of an epoch once and in full, and the same blocks after a restart at any cursor."""

import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import event, given, settings
from hypothesis import strategies as st

from clippy_train.data import stream as stream_module
from clippy_train.data.objectives import LeftToRight
from clippy_train.data.order import stream_parts
from clippy_train.data.stream import COUNTS, EMPTY_EPOCHS, START, Block, Cursor, Stream
from clippy_train.errors import DataError
from clippy_train.shards import format as shard_format
from clippy_train.shards.format import REASONS, Entry, Fields, Selection
from clippy_train.shards.sources import FileCorpus

BAD = -1  # a line that is not a document
EOS = 10**9
LONGEST = 100


@dataclass(frozen=True)
class Case:
    """A corpus (the number of tokens on each line of each shard, or BAD) and the settings to read it with."""

    lengths: list[list[int]]
    seq_len: int = 4
    streams: int = 1
    window: int = 1
    seed: int = 0
    eos: int | None = None
    shuffle: bool = True
    window_characters: int = 1 << 23

    @contextmanager
    def opened(self) -> Iterator[list[Stream]]:
        """The streams over real shards of this corpus."""
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            patch.setattr(stream_module, "WINDOW_CHARACTERS", self.window_characters)
            paths = [Path(folder, f"{i:05d}.jsonl.zst") for i in range(len(self.lengths))]
            for path, lines in zip(paths, self.lines(), strict=True):
                path.write_bytes(compressed(lines))
            corpus = FileCorpus("data.path", tuple(map(str, paths)), "", Fields())
            yield [
                Stream(
                    corpus,
                    LeftToRight(encode, self.eos),
                    self.seq_len,
                    index,
                    self.streams,
                    self.seed,
                    self.window,
                    shuffle=self.shuffle,
                )
                for index in range(self.streams)
            ]

    def lines(self) -> list[list[str]]:
        """The text of every line of every shard: its document's number and length."""
        numbers = iter(range(10**6))
        return [[f"{next(numbers)} {length}" for length in lengths] for lengths in self.lengths]

    def reading(self, index: int, epoch: int) -> list[str]:
        """The texts of a stream's epoch in reading order, before windows are permuted."""
        lines = self.lines()
        return [
            lines[part.shard][number]
            for part in stream_parts(len(lines), self.streams, index, self.seed, epoch)
            for number in range(part.residue, len(lines[part.shard]), part.stride)
            if self.lengths[part.shard][number] != BAD
        ]

    def flat(self) -> list[tuple[str, int]]:
        """(text, length) of every line in on-disk order; the index is the document's number."""
        lengths = [length for shard in self.lengths for length in shard]
        return list(zip([text for shard in self.lines() for text in shard], lengths, strict=True))

    def documents(self, tokens: list[int]) -> list[str]:
        """The documents that begin in `tokens`."""
        texts = self.flat()
        return [texts[token // LONGEST][0] for token in tokens if token != EOS and token % LONGEST == 0]

    def tokens(self, texts: list[str]) -> list[int]:
        end = [] if self.eos is None else [self.eos]
        return [token for ids in encode(texts) for token in [*ids, *end]]


def compressed(texts: list[str]) -> bytes:
    lines = ["{}" if text.endswith(f" {BAD}") else json.dumps({"text": text}) for text in texts]
    return zstandard.ZstdCompressor(write_checksum=True).compress("".join(f"{line}\n" for line in lines).encode())


def encode(texts: list[str]) -> list[list[int]]:
    """Ids that occur once in the corpus: token i of document d is `LONGEST * d + i`."""
    return [[LONGEST * number + i for i in range(length)] for number, length in (map(int, t.split()) for t in texts)]


def cases(shortest: int = 0) -> st.SearchStrategy[Case]:
    length = st.integers(shortest, 3) | st.integers(4, 40) | st.just(BAD)
    return st.builds(
        Case,
        lengths=st.lists(st.lists(length, max_size=10), min_size=1, max_size=9),
        seq_len=st.integers(1, 12),
        streams=st.integers(1, 5),
        window=st.integers(1, 6) | st.just(100),
        seed=st.integers(0, 2**40),
        eos=st.sampled_from([None, EOS]),
        window_characters=st.sampled_from([1, 12, 1 << 23]),
    )


def take(stream: Stream, count: int, cursor: Cursor = START) -> list[Block]:
    """The next blocks, or fewer if the stream finds no more documents."""
    blocks: list[Block] = []
    with suppress(DataError):
        blocks.extend(islice(stream.blocks(cursor), count))
    return blocks


def joined(blocks: list[Block]) -> list[int]:
    return [int(token) for block in blocks for token in block.tokens]


def comparable(blocks: list[Block]) -> list[tuple[object, ...]]:
    return [
        (block.tokens.tolist(), block.cursor, block.counts.tolist(), block.rejected, block.spans) for block in blocks
    ]


def total(blocks: list[Block]) -> dict[str, int]:
    """The counts that are not zero."""
    sums = np.sum([block.counts for block in blocks], axis=0)
    return {name: int(value) for name, value in zip(COUNTS, sums, strict=True) if value}


@pytest.mark.slow
@settings(max_examples=200)
@given(st.integers(0, 40), st.integers(1, 12), st.integers(0, 2**40), st.integers(0, 5))
def test_the_parts_of_all_streams_cover_every_line_once(num_shards: int, streams: int, seed: int, epoch: int) -> None:
    lines = 30
    read = Counter(
        (part.shard, line)
        for index in range(streams)
        for part in stream_parts(num_shards, streams, index, seed, epoch)
        for line in range(part.residue, lines, part.stride)
    )
    assert read == Counter((shard, line) for shard in range(num_shards) for line in range(lines))


@pytest.mark.slow
@settings(max_examples=100)
@given(st.integers(0, 40), st.integers(1, 12), st.integers(0, 2**40))
def test_streams_are_balanced_for_any_number_of_shards(num_shards: int, streams: int, seed: int) -> None:
    sizes = [
        sum(1 / part.stride for part in stream_parts(num_shards, streams, index, seed, 0)) for index in range(streams)
    ]
    assert sizes == pytest.approx([num_shards / streams] * streams)


def test_a_multiple_of_streams_shards_is_read_without_sharing() -> None:
    assert {part.stride for index in range(4) for part in stream_parts(12, 4, index, 0, 0)} == {1}


@pytest.mark.slow
@settings(max_examples=100)
@given(cases(shortest=1))
def test_an_epoch_holds_every_document_once_and_in_full(case: Case) -> None:
    with replace(case, seq_len=1).opened() as streams:
        seen: list[str] = []
        for stream in streams:
            epochs = [case.reading(stream.index, epoch) for epoch in range(2)]
            sizes = [len(case.tokens(texts)) for texts in epochs]
            tokens = joined(take(stream, sum(sizes)))
            shown = [case.documents(tokens[: sizes[0]]), case.documents(tokens[sizes[0] :])]
            assert tokens == case.tokens(shown[0] + shown[1])
            assert [sorted(texts) for texts in shown] == [sorted(texts) for texts in epochs]
            seen += shown[0]
        assert sorted(seen) == sorted(text for text, length in case.flat() if length != BAD)


@pytest.mark.slow
@settings(max_examples=60)
@given(cases(shortest=1), st.integers(0, 2))
def test_documents_are_permuted_within_their_window(case: Case, epoch: int) -> None:
    case = replace(case, seq_len=1, window_characters=1 << 23)
    with case.opened() as streams:
        for stream in streams:
            read = case.reading(stream.index, epoch)
            shown = case.documents(joined(take(stream, len(case.tokens(read)), Cursor(epoch))))
            for begin in range(0, len(read), case.window):
                window = slice(begin, begin + case.window)
                assert sorted(shown[window]) == sorted(read[window])


@pytest.mark.slow
@settings(max_examples=60)
@given(cases())
def test_blocks_are_the_tokens_cut_without_a_gap(case: Case) -> None:
    with case.opened() as streams:
        for stream in streams:
            size = sum(len(case.tokens(case.reading(stream.index, epoch))) for epoch in range(3))
            blocks = take(stream, size // case.seq_len)
            singles = take(replace(stream, seq_len=1), size // case.seq_len * case.seq_len)
            assert joined(blocks) == joined(singles)
            assert [block.cursor for block in blocks] == [
                single.cursor for single in singles[case.seq_len - 1 :: case.seq_len]
            ]
            assert len(blocks) == size // case.seq_len


@pytest.mark.slow
@settings(max_examples=60)
@given(cases())
def test_a_restart_at_any_cursor_gives_the_blocks_that_follow(case: Case) -> None:
    with case.opened() as streams:
        for stream in streams:
            blocks = take(stream, 25)
            if any(block.cursor.epoch for block in blocks[:20]):
                event("crosses an epoch")
            for number in range(min(len(blocks), 20)):
                following = take(stream, 5, blocks[number].cursor)
                assert comparable(following) == comparable(blocks[number + 1 : number + 6])


@pytest.mark.slow
@settings(max_examples=60)
@given(cases(shortest=1))
def test_a_document_is_counted_with_the_block_of_its_first_token(case: Case) -> None:
    with case.opened() as streams:
        for stream in streams:
            for block in take(stream, 20):
                begun = case.documents(block.tokens.tolist())
                counts = dict(zip(COUNTS, block.counts.tolist(), strict=True))
                assert (counts["documents"], counts["characters"]) == (len(begun), sum(map(len, begun)))
                rejected = [value for name, value in counts.items() if name.startswith("rejected/")]
                assert sum(block.rejected.values()) == sum(rejected)


@pytest.mark.slow
@settings(max_examples=60)
@given(cases())
def test_spans_name_the_sources_of_a_block(case: Case) -> None:
    with case.opened() as streams:
        lines = case.lines()
        for stream in streams:
            for block in take(stream, 20):
                cut = [case.tokens([lines[span.shard][span.line]])[span.first : span.end] for span in block.spans]
                assert [token for tokens in cut for token in tokens] == block.tokens.tolist()
                assert all(cut)


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("window", [1, 3, 100])
def test_a_rejected_line_is_counted_once_in_an_epoch(window: int, restarted: bool) -> None:
    case = Case([[4, BAD, BAD, 4, 8], [4], [4, BAD, 4]], window=window, shuffle=False)
    with case.opened() as (stream,):
        blocks = [next(stream.blocks())]
        while len(blocks) < 7:
            blocks = [*blocks, next(stream.blocks(blocks[-1].cursor))] if restarted else take(stream, 7)
    assert total(blocks) == {"documents": 6, "characters": 18, "rejected/no_text": 3}
    assert blocks[-1].cursor.epoch == 0


def test_rejected_lines_are_counted_by_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_format, "MAX_LINE_BYTES", 50)
    lines = [b'{"text":"0 4"}', b"not json", b'{"text":null}', b'{"text":"\xff"}', b"x" * 51, b'{"text":"1 4"}', b""]
    case = Case([[4]], shuffle=False)
    with case.opened() as (stream,):
        Path(stream.corpus.shards[0]).write_bytes(zstandard.compress(b"\n".join(lines)) + b"garbage")
        assert total(take(stream, 3)) == {"documents": 3, "characters": 9} | {f"rejected/{name}": 1 for name in REASONS}


def test_damage_in_a_shared_shard_is_counted_by_one_stream() -> None:
    case = Case([[4] * 7], streams=3)
    with case.opened() as streams:
        path = Path(streams[0].corpus.shards[0])
        path.write_bytes(path.read_bytes() + b"garbage")
        epochs = [take(stream, len(case.reading(stream.index, 0))) for stream in streams]
        ends = [take(stream, 1, Cursor(0, part=0, line=7)) for stream in streams]
    assert total([block for blocks in epochs for block in blocks])["documents"] == 7
    assert sorted(total(blocks).get("rejected/damaged_shard", 0) for blocks in ends) == [0, 0, 1]


def test_a_restart_opens_no_earlier_shard() -> None:
    with Case([[4] * 3] * 4, shuffle=False).opened() as (stream,):
        blocks = take(stream, 12)
        assert blocks[6].cursor.part > 0
        for path in stream.corpus.shards[: blocks[6].cursor.part]:
            Path(path).unlink()
        assert comparable(take(stream, 5, blocks[6].cursor)) == comparable(blocks[7:])


def test_without_shuffling_documents_keep_their_on_disk_order() -> None:
    case = Case([[3, BAD, 5], [], [1, 9, 2]], seq_len=1, window=4, eos=EOS, shuffle=False)
    with case.opened() as (stream,):
        size = len(case.tokens([text for text, length in case.flat() if length != BAD]))
        assert joined(take(stream, 2 * size)) == 2 * case.tokens([t for t, length in case.flat() if length != BAD])


def test_every_seed_and_epoch_has_its_own_order() -> None:
    orders = set()
    for seed in range(3):
        with Case([[1] * 10] * 4, seq_len=40, window=8, seed=seed).opened() as (stream,):
            orders |= {tuple(block.tokens.tolist()) for block in take(stream, 3)}
    assert len(orders) == 9


def test_documents_of_a_repository_are_spread_out() -> None:
    """The worst case: shards that are ordered by repository."""
    files, window = 8, 32
    case = Case([[1] * 128] * 8, seq_len=1, window=window, streams=2)
    with case.opened() as streams:
        places = [[(span.shard, span.line // files) for block in take(s, 512) for span in block.spans] for s in streams]
    neighbours = [first == second for place in places for first, second in pairwise(place)]
    assert len(neighbours) == 2 * 511
    assert np.mean(neighbours) < 1.25 * (files - 1) / (window - 1)  # in on-disk order: (files - 1) / files


def test_the_order_of_a_seed_never_changes() -> None:
    """A run may outlive a release: a change of these numbers breaks every run that is resumed after it."""
    with Case([[1] * 4] * 3, seq_len=6, window=3, streams=2, seed=42).opened() as streams:
        orders = [[[token // LONGEST for token in block.tokens] for block in take(stream, 2)] for stream in streams]
    assert orders == [[[8, 0, 10, 1, 3, 2], [8, 10, 9, 0, 2, 11]], [[9, 4, 11, 5, 6, 7], [4, 5, 6, 7, 1, 3]]]


@pytest.mark.parametrize(
    "lengths",
    [[[BAD, BAD]], [[], [BAD]], [[], []], [[0, 0]]],
    ids=["bad lines", "bad lines and an empty shard", "empty shards", "documents without tokens"],
)
def test_a_stream_without_documents_is_an_error(lengths: list[list[int]]) -> None:
    with Case(lengths).opened() as (stream,), pytest.raises(DataError, match=r"stream 0 .* found no usable document"):
        next(stream.blocks())


def test_too_few_documents_for_the_streams_is_an_error() -> None:
    with Case([[4, 4]], streams=3).opened() as streams:
        assert [len(take(stream, 2)) for stream in streams] == [2, 2, 0]


def test_an_epoch_without_documents_is_not_an_error() -> None:
    """Now and then every stream gets only shards without a usable document."""
    case = Case([[4, 4], [BAD], []], streams=3)
    with case.opened() as streams:
        assert any(not case.reading(0, epoch) and not case.reading(0, epoch + 1) for epoch in range(EMPTY_EPOCHS))
        assert len(take(streams[0], 10)) == 10


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_restarted_stream_gives_up_when_an_uninterrupted_one_does(seed: int) -> None:
    with Case([[4, 4], *[[BAD]] * 7], streams=8, seed=seed).opened() as streams:
        blocks = {stream.index: take(stream, 12) for stream in streams}
        assert any(blocks.values())
        for stream in streams:
            for number, block in enumerate(blocks[stream.index][:7]):
                following = blocks[stream.index][number + 1 : number + 6]
                assert comparable(take(stream, 5, block.cursor)) == comparable(following)


def test_a_shard_is_opened_once_in_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows are read in one pass: starting each at the shard's first line would be quadratic."""
    opened: list[int] = []
    entries = FileCorpus._entries

    def recorded(corpus: FileCorpus, shard: int, selection: Selection) -> Iterator[Entry]:
        opened.append(shard)
        return entries(corpus, shard, selection)

    monkeypatch.setattr(FileCorpus, "_entries", recorded)
    with Case([[4] * 20, [4] * 20], window=3).opened() as (stream,):
        list(islice(stream.blocks(), 40))
    assert sorted(opened) == sorted(set(opened))
    assert len(opened) == 2
