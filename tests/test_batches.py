"""Batches of ranks: the sequences of a step do not depend on ranks, loader processes or restarts, and no token of an
epoch is lost or repeated by kills and resumes."""

import json
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from support import oracle, processes
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from clippy_train.config import TrainConfig
from clippy_train.data.batches import split_scored
from clippy_train.data.mixture import open_sources
from clippy_train.data.objectives import LeftToRight
from clippy_train.data.scored import ScoredSequence, first_blocks
from clippy_train.data.stream import COUNTS, Cursor, Stream
from clippy_train.errors import DataError
from clippy_train.model.build import build_model
from clippy_train.shards.sources import open_corpus
from clippy_train.tokenizer import encoder, load_tokenizer
from clippy_train.train.callbacks.progress import Progress
from clippy_train.train.data import DataModule

SETTINGS = ["data.seq_len=32", "data.streams=4", "data.window=8", "data.num_workers=0", "trainer.global_batch_size=8"]
START = np.zeros((4, len(Cursor._fields)), dtype=np.int64)

TrainedSequence = tuple[int, ...]  # stream, cursor, counts and token ids
ConfigBuilder = Callable[..., TrainConfig]


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Path) -> PreTrainedTokenizerFast:
    loaded: PreTrainedTokenizerFast = load_tokenizer(tiny_tokenizer)
    return loaded


@pytest.fixture(scope="module")
def config(train_config: ConfigBuilder) -> ConfigBuilder:
    def build(world_size: int = 1, micro_batch: int = 2, workers: int = 0, *overrides: str) -> TrainConfig:
        shape = [f"trainer.devices={world_size}", f"trainer.micro_batch_size={micro_batch}"]
        return train_config(*SETTINGS, *shape, f"data.num_workers={workers}", *overrides)

    return build


def steps(
    config: TrainConfig, tokenizer: PreTrainedTokenizerFast, count: int, cursors: np.ndarray = START
) -> list[list[TrainedSequence]]:
    """The sequences of the next optimizer steps, rank by rank, in training order."""
    trained: list[list[TrainedSequence]] = [[] for _ in range(count)]
    for rank in range(config.world_size):
        batches = iter(DataModule(config, tokenizer, rank, cursors).train_dataloader())
        for step in trained:
            for batch in islice(batches, config.micro_steps):
                assert len(batch["input_ids"]) == config.trainer.micro_batch_size
                step += map(tuple, torch.cat([batch["cursor"], batch["counts"], batch["input_ids"]], dim=1).tolist())
    return trained


def committed(trained: list[list[TrainedSequence]]) -> np.ndarray:
    """Where each stream continues after the trained sequences."""
    cursors = START.copy()
    for step in trained:
        for stream, *rest in step:
            cursors[stream] = rest[: len(Cursor._fields)]
    return cursors


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_a_step_has_the_same_sequences_for_any_number_of_ranks(
    config: ConfigBuilder, tokenizer: PreTrainedTokenizerFast, world_size: int
) -> None:
    single, many = (steps(config(size), tokenizer, 4) for size in (1, world_size))
    assert [sorted(step) for step in many] == [sorted(step) for step in single]
    assert {len(step) for step in single} == {8}


@pytest.mark.slow
def test_ranks_share_no_stream(config: ConfigBuilder, tokenizer: PreTrainedTokenizerFast) -> None:
    ranks = [iter(DataModule(config(4), tokenizer, rank, START).train_dataloader()) for rank in range(4)]
    assert [{stream for stream, *_ in next(rank)["cursor"].tolist()} for rank in ranks] == [{0}, {1}, {2}, {3}]


@pytest.mark.processes
@pytest.mark.parametrize("workers", [1, 3, 9])
def test_loader_processes_do_not_change_the_order(
    config: ConfigBuilder, tokenizer: PreTrainedTokenizerFast, workers: int
) -> None:
    assert steps(config(1, 2, workers), tokenizer, 3) == steps(config(1, 2, 0), tokenizer, 3)


@pytest.mark.processes
@pytest.mark.parametrize("layout", [(2, 4, 0), (4, 2, 1), (1, 8, 3)], ids=str)
def test_the_order_stays_the_same_over_epochs(
    config: ConfigBuilder, tokenizer: PreTrainedTokenizerFast, layout: tuple[int, int, int]
) -> None:
    expected = steps(config(1, 2, 0, "data.seq_len=256"), tokenizer, 40)
    assert min(epoch for _, epoch, *_ in expected[-1]) >= 2
    assert [sorted(step) for step in steps(config(*layout, "data.seq_len=256"), tokenizer, 40)] == [
        sorted(step) for step in expected
    ]


@pytest.mark.processes
@pytest.mark.parametrize("layout", [(2, 2, 2), (4, 2, 0), (1, 4, 2)], ids=str)
def test_fill_in_the_middle_changes_what_is_read_but_not_with_the_layout(
    config: ConfigBuilder, layout: tuple[int, int, int]
) -> None:
    fim = ["data.fim_rate=0.8", "data.fim_characters=200"]
    _, extended = build_model(config(1, 2, 0, *fim))
    expected = [sorted(step) for step in steps(config(1, 2, 0, *fim), extended, 6)]
    assert [sorted(step) for step in steps(config(*layout, *fim), extended, 6)] == expected
    assert [sorted(step) for step in steps(config(1, 2, 0), extended, 6)] != expected


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [1, 4, 8])
def test_the_micro_batch_does_not_change_the_order(
    config: ConfigBuilder, tokenizer: PreTrainedTokenizerFast, micro_batch: int
) -> None:
    assert steps(config(1, micro_batch), tokenizer, 3) == steps(config(1, 2), tokenizer, 3)


def test_a_step_takes_as_many_blocks_from_every_stream(
    config: ConfigBuilder, tokenizer: PreTrainedTokenizerFast
) -> None:
    for step in steps(config(2), tokenizer, 3):
        assert sorted(stream for stream, *_ in step) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_training_batch_holds_integers_only(config: ConfigBuilder, tokenizer: PreTrainedTokenizerFast) -> None:
    batch = next(iter(DataModule(config(1, 2), tokenizer, 0, START).train_dataloader()))
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in batch.items()}
    num_spans = len(batch["spans"])
    assert num_spans >= 2
    assert shapes == {
        "input_ids": (torch.int64, (2, 32)),
        "cursor": (torch.int64, (2, 6)),
        "counts": (torch.int64, (2, len(COUNTS))),
        "rejected": (torch.int64, (0, 3)),
        "spans": (torch.int64, (num_spans, 6)),
        "skipped": (torch.int64, (0, 6)),
    }


@pytest.mark.processes
@pytest.mark.parametrize("resumed", [(1, 2, 0), (2, 1, 0), (4, 2, 0), (1, 2, 3)], ids=str)
def test_committed_cursors_resume_with_the_sequences_that_follow(
    config: ConfigBuilder, tokenizer: PreTrainedTokenizerFast, resumed: tuple[int, int, int]
) -> None:
    expected = steps(config(), tokenizer, 6)
    following = steps(config(*resumed), tokenizer, 4, committed(expected[:2]))
    assert [sorted(step) for step in following] == [sorted(step) for step in expected[2:]]


WORDS = 50  # in the vocabulary of the histories below; the next id is the end-of-text


@dataclass(frozen=True)
class History:
    """A small corpus and the attempts of a run on it.

    Attributes:
        lengths: for each shard, the number of tokens of each document.
        attempts: (ranks, micro-batch, steps trained, how many of them were lost to a kill).
    """

    lengths: list[list[int]]
    seq_len: int
    streams: int
    window: int
    eos: bool
    seed: int
    attempts: list[tuple[int, int, int, int]]

    def write(self, folder: Path) -> None:
        folder.mkdir()
        for shard, lengths in enumerate(self.lengths):
            texts = [words(shard + 7 * line, length) for line, length in enumerate(lengths)]
            lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
            (folder / f"{shard:05d}.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))

    def config(self, config: TrainConfig, path: Path, ranks: int, micro_batch: int) -> TrainConfig:
        data = replace(
            config.data,
            path=str(path),
            seq_len=self.seq_len,
            streams=self.streams,
            window=self.window,
            eos_between_documents=self.eos,
            num_workers=0,
        )
        trainer = replace(
            config.trainer, devices=ranks, micro_batch_size=micro_batch, global_batch_size=2 * self.streams
        )
        return replace(config, data=data, trainer=trainer, seed=self.seed)

    def encode(self, text: str) -> list[int]:
        return [int(word[1:]) for word in text.split()] + [WORDS] * self.eos


def words(start: int, length: int) -> str:
    return " ".join(f"w{(start + i) % WORDS}" for i in range(length)) or " "


def word_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {f"w{i}": i for i in range(WORDS)} | {"<eos>": WORDS}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


@st.composite
def histories(draw: st.DrawFn) -> History:
    length = st.integers(0, 2) | st.integers(3, 20) | st.integers(60, 90)
    streams = draw(st.sampled_from([1, 2, 3, 4, 6]))
    ranks = st.sampled_from([size for size in range(1, streams + 1) if streams % size == 0])
    attempt = ranks.flatmap(
        lambda size: st.tuples(
            st.just(size),
            st.sampled_from([n for n in range(1, 13) if 2 * streams // size % n == 0]),
            st.integers(1, 12),
            st.integers(0, 4),
        )
    )
    return History(
        lengths=draw(st.lists(st.lists(length, max_size=8), min_size=1, max_size=8)),
        seq_len=draw(st.integers(1, 12)),
        streams=streams,
        window=draw(st.integers(1, 5) | st.just(100)),
        eos=draw(st.booleans()),
        seed=draw(st.integers(0, 2**40)),
        attempts=draw(st.lists(attempt, min_size=1, max_size=6)),
    )


class TrainedStep(NamedTuple):
    ids: list[int]
    spans: list[oracle.Span]
    cursors: np.ndarray  # after the step


def train_attempt(
    config: TrainConfig, tokenizer: PreTrainedTokenizerFast, cursors: np.ndarray, count: int
) -> list[TrainedStep]:
    """The next `count` steps."""
    ranks = [iter(DataModule(config, tokenizer, rank, cursors).train_dataloader()) for rank in range(config.world_size)]
    done = []
    for _ in range(count):
        ids: list[int] = []
        spans: list[oracle.Span] = []
        cursors = cursors.copy()
        for batches in ranks:
            for batch in islice(batches, config.micro_steps):
                ids += batch["input_ids"].flatten().tolist()
                spans += batch["spans"].tolist()
                for stream, *cursor in batch["cursor"].tolist():
                    cursors[stream] = cursor
        done.append(TrainedStep(ids, spans, cursors))
    return done


@pytest.mark.processes
@settings(max_examples=60)
@given(histories())
def test_no_token_is_lost_or_repeated_across_attempts(train_config: ConfigBuilder, history: History) -> None:
    tokenizer = word_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        history.write(Path(folder, "train"))
        documents = oracle.read_documents(Path(folder, "train"), history.encode)
        assume(any(documents.values()))
        base = train_config()
        steps_of_two_epochs = (
            sum(map(len, documents.values())) // history.seq_len + 1
        )  # if one stream had every document
        trained: list[TrainedStep] = []  # and not lost to a kill
        attempts = iter(history.attempts)
        while not trained or oracle.completed_epochs([span for step in trained for span in step.spans]) < 2:
            assert len(trained) <= steps_of_two_epochs + 20
            ranks, micro_batch, count, lost = next(attempts, (1, 1, 20, 0))
            cursors = (
                trained[-1].cursors if trained else np.zeros((history.streams, len(Cursor._fields)), dtype=np.int64)
            )
            config = history.config(base, Path(folder), ranks, micro_batch)
            try:
                trained += train_attempt(config, tokenizer, cursors, count)
            except DataError:
                event("a stream without documents")
                break
            del trained[max(0, len(trained) - lost) :]
    assume(trained)
    event(f"{len(history.attempts)} attempts")
    all_spans = [span for step in trained for span in step.spans]
    for step in trained:
        assert oracle.tokens(documents, step.spans) == step.ids
    for epoch in range(max(span[1] for span in all_spans) + 1):
        lost_tokens, repeated = oracle.lost_and_repeated(documents, all_spans, epoch)
        assert repeated == 0
        assert lost_tokens == 0 or epoch >= oracle.completed_epochs(all_spans)


def test_sequences_hold_the_text_of_the_corpus(config: ConfigBuilder, tokenizer: PreTrainedTokenizerFast) -> None:
    settings = config(1, 2, 0, "data.streams=1", "data.window=1")
    batches = DataModule(settings, tokenizer, 0, START[:1]).train_dataloader()
    ids = torch.cat([batch["input_ids"].flatten() for batch in islice(batches, 40)])
    text = tokenizer.decode(ids.tolist())
    assert isinstance(text, str)
    shown = text.split(tokenizer.eos_token)[:-1]
    assert len(shown) > 2
    assert set(shown) <= set(open_corpus(settings.data, "train").texts())


def test_the_end_of_text_can_be_turned_off(config: ConfigBuilder, tokenizer: PreTrainedTokenizerFast) -> None:
    for override, found in (("true", True), ("false", False)):
        trained = steps(config(1, 2, 0, f"data.eos_between_documents={override}"), tokenizer, 10)
        assert any(tokenizer.eos_token_id in each[-32:] for step in trained for each in step) == found


@pytest.mark.processes
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_stream_without_documents_is_a_one_line_error(
    config: ConfigBuilder, tokenizer: PreTrainedTokenizerFast, workers: int
) -> None:
    settings = config(1, 2, workers, "data.streams=256", "trainer.global_batch_size=256")
    cursors = np.zeros((256, len(Cursor._fields)), dtype=np.int64)
    with pytest.raises(DataError) as caught:
        next(iter(DataModule(settings, tokenizer, 0, cursors).train_dataloader()))
    assert str(caught.value).startswith("stream ")
    assert len(str(caught.value).splitlines()) == 1


def progress_of_an_epoch(settings: TrainConfig, tokenizer: PreTrainedTokenizerFast) -> Progress:
    """The callback after every stream has read an epoch."""
    sources = open_sources(settings.data, "train")
    progress = Progress(settings, START, np.zeros(len(COUNTS), dtype=np.int64), sources)
    trainer: Any = SimpleNamespace(global_step=0)
    unused: Any = None  # the callback does not read the module
    for batch in DataModule(settings, tokenizer, 0, START).train_dataloader():
        progress.on_train_batch_end(trainer, unused, None, batch, 0)
        if progress.cursors[:, 0].min() == 1:
            break
    return progress


def test_too_many_bad_lines_stop_the_run_and_name_their_shards(
    config: ConfigBuilder, tokenizer: PreTrainedTokenizerFast, tiny_corpus: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_corpus, tmp_path / "corpus")
    good, bad, worse, *_ = sorted((tmp_path / "corpus/train").iterdir())
    for path, lines in ((bad, 400), (worse, 800)):
        path.write_bytes(zstandard.compress(b'{"text": 1}\n' * lines) + path.read_bytes())
    settings = config(1, 2, 0, f"data.path={tmp_path}/corpus", "data.max_bad_fraction=0.5")
    progress = progress_of_an_epoch(settings, tokenizer)
    assert progress.rejected[str(worse)] % 800 == progress.rejected[str(bad)] % 400 == 0
    with pytest.raises(DataError, match=rf"Most of them are in {worse} \(\d+\), {bad} \(\d+\)\.") as caught:
        progress.all_counts()
    assert str(good) not in str(caught.value)
    settings.data.max_bad_fraction = 1.0
    assert progress.all_counts()["rejected/no_text"] == sum(progress.rejected.values())


def test_unreadable_shards_stop_the_run_with_their_documents(
    config: ConfigBuilder, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "train").mkdir()
    lines = [json.dumps({"text": f"def f{number}(x): return {number} + x  # a comment"}) for number in range(300)]
    for number in range(8):
        data = zstandard.compress("\n".join(lines).encode())
        (tmp_path / f"train/{number}.jsonl.zst").write_bytes(bytes(len(data)) if number % 2 else data)
    settings = config(1, 2, 0, f"data.path={tmp_path}", "data.max_bad_fraction=0.4")
    progress = progress_of_an_epoch(settings, tokenizer)
    with pytest.raises(DataError, match=r"1200 of \d+ lines|2400 of \d+ lines"):
        progress.all_counts()


@pytest.mark.processes
def test_no_loader_process_outlives_a_rank_that_was_killed(
    config: ConfigBuilder, tokenizer: PreTrainedTokenizerFast
) -> None:
    """The blocks exceed the pipe's capacity: a process that checks on its rank only between blocks would hang."""
    settings = config(1, 2, 2, "data.seq_len=16384", "model.max_position_embeddings=16384")
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def be_a_rank() -> None:
        processes.die_with_parent()
        batches = iter(DataModule(settings, tokenizer, 0, START).train_dataloader())
        next(batches)
        time.sleep(2)  # until the loaders have read ahead
        sender.send([each.pid for each in multiprocessing.active_children()])
        time.sleep(100)

    rank = context.Process(target=be_a_rank)
    rank.start()
    sender.close()
    try:
        loaders = receiver.recv() if receiver.poll(60) else []
    finally:
        rank.kill()
        rank.join()
    assert len(loaders) == 2
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}/exe").exists() for pid in loaders):  # a zombie has none
        assert time.monotonic() < deadline, "loader processes still run"
        time.sleep(0.1)


def test_waiting_for_data_is_measured(config: ConfigBuilder, tokenizer: PreTrainedTokenizerFast) -> None:
    batches = DataModule(config(), tokenizer, 0, START).train_dataloader()
    next(iter(batches))
    assert batches.wait_seconds > 0


@settings(max_examples=100)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 7))
def test_validation_sequences_are_split_evenly_and_each_counts_once(
    num_sequences: int, world_size: int, batch_size: int
) -> None:
    sequences = [
        ScoredSequence(np.full(3, n, dtype=np.int32), np.full(3, n + 1, dtype=np.int64)) for n in range(num_sequences)
    ]
    ranks = [split_scored(sequences, rank, world_size, batch_size) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    batches = [batch for rank in ranks for batch in rank]
    assert {tuple(batch["input_ids"].shape) for batch in batches} == {(batch_size, 3)}
    assert {tensor.dtype for batch in batches for tensor in batch.values()} == {torch.int64}
    ids, group = (torch.cat([batch[name] for batch in batches]) for name in ("input_ids", "group"))
    assert group[:, 0].bool().sum() == num_sequences
    assert torch.equal(group, group[:, :1].expand(-1, 3))
    assert sorted(ids[group[:, 0] > 0].tolist()) == [sequence.tokens.tolist() for sequence in sequences]
    assert torch.equal(ids[group[:, 0] > 0] + 1, group[group[:, 0] > 0])
    assert len(ranks[0]) == -(-num_sequences // (world_size * batch_size))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_validation_is_the_start_of_the_split_in_on_disk_order(
    config: ConfigBuilder, tokenizer: PreTrainedTokenizerFast, world_size: int
) -> None:
    settings = config(world_size, 1, 0, "trainer.val_samples=5", "trainer.eval_micro_batch_size=2")
    texts = open_corpus(settings.data, "validation").texts()
    ids = [i for text in texts for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    modules = [DataModule(settings, tokenizer, rank, START) for rank in range(world_size)]
    batches = [batch for module in modules for batch in module.val_dataloader()]
    shown = [sequence.tolist() for batch in batches for sequence in batch["input_ids"][batch["group"][:, 0] > 0]]
    assert sorted(shown) == sorted(ids[start : start + 32] for start in range(0, 5 * 32, 32))


def test_every_validation_has_the_same_batches(config: ConfigBuilder, tokenizer: PreTrainedTokenizerFast) -> None:
    module = DataModule(config(), tokenizer, 0, START)
    first, second = (torch.cat([batch["input_ids"] for batch in module.val_dataloader()]) for _ in range(2))
    assert torch.equal(first, second)


def test_a_small_split_is_validated_once_and_not_again(
    config: ConfigBuilder, tokenizer: PreTrainedTokenizerFast
) -> None:
    stream = Stream(
        open_corpus(config().data, "validation"), LeftToRight(encoder(tokenizer)), seq_len=32, shuffle=False
    )
    blocks = first_blocks(stream, 10**6)
    ids = [token for text in stream.corpus.texts() for token in tokenizer(text)["input_ids"]]
    assert [block.tokens.tolist() for block in blocks] == [ids[i : i + 32] for i in range(0, len(ids) - 31, 32)]


@pytest.mark.slow
def test_a_split_smaller_than_a_block_is_an_error(config: ConfigBuilder, tokenizer: PreTrainedTokenizerFast) -> None:
    stream = Stream(
        open_corpus(config().data, "validation"), LeftToRight(encoder(tokenizer)), seq_len=10**6, shuffle=False
    )
    with pytest.raises(DataError, match=r"data\.path=.*validation has less than one block"):
        list(first_blocks(stream, 1))
