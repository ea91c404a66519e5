"""Streams -> batches: what a rank trains and validates on.

Promises: the sequences of an optimizer step are the same for any number of ranks and loader processes; a batch holds
integers only (DeepSpeed casts every float to bf16) and the cursor after each of its sequences, so what was trained is
known from the trained batches, not from how far a loader has read ahead.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, count, islice, pairwise, repeat
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedTokenizerFast

from clippy_train.config import TrainConfig
from clippy_train.data.mixture import open_sources
from clippy_train.data.objectives import Completion, FillInTheMiddle, LeftToRight, Objective, token_ids
from clippy_train.data.order import deal
from clippy_train.data.scored import (
    Group,
    Groups,
    ScoredSequence,
    collate_scored,
    first_blocks,
    language_label,
    scored_blocks,
    scored_solutions,
)
from clippy_train.data.stream import Block, Cursor, Stream
from clippy_train.errors import DataError
from clippy_train.shards.problems import read_references
from clippy_train.shards.sources import Corpus
from clippy_train.signals import SIGNALS
from clippy_train.tokenizer import encoder, fim_ids

# Rounds that a loader process makes ahead, 8 kB per block. A stream tokenises several documents at a time, so a round
# costs between nothing and a second: processes that take turns must not wait for each other's expensive rounds.
PREFETCH_ROUNDS = 32

Batch = dict[str, Tensor]
StreamBlock = tuple[int, Block]  # number of a stream, its block
Passed = Callable[[], Iterator[int]]


def train_batches(
    config: TrainConfig, tokenizer: PreTrainedTokenizerFast, rank: int, cursors: np.ndarray, step: int
) -> "TrainBatches":
    """The training batches of one rank after `step`; each stream continues from its row of `cursors` (`[streams, 5]`).

    A batch holds `input_ids` `[micro_batch, seq]`, `cursor` `[micro_batch, 1 + 5]` (stream, then `Cursor`), `counts`
    `[micro_batch, len(COUNTS)]`, `rejected` `[any number, 3]` (stream, shard, lines), and `spans` and `skipped` `[spans
    of all blocks in turn, 1 + 5]` (stream, then `Span`), all int64. Streams have their numbers among all of the run,
    shards those that their source gives them. If some tokens are only read, it also holds `predicted` `[micro_batch,
    seq]`, 1 for those that are not, and `targets` `[]`, their number in the rank's share of the step.
    """
    share = config.data.streams // config.world_size
    readers = [
        Reader(
            number,
            _stream(config, source.corpus, tokenizer, streams=len(source.streams), index=index),
            Cursor(*map(int, cursors[number])),
        )
        for source in open_sources(config.data, "train")
        for index, number in enumerate(source.streams)
        if number // share == rank
    ]
    passed = partial(rounds_passed_over, config, step)
    together = config.micro_steps if config.data.masked else None
    return TrainBatches(sorted(readers), passed, config.trainer.micro_batch_size, config.data.num_workers, together)


def rounds_passed_over(config: TrainConfig, step: int) -> Iterator[int]:
    """For each round after `step`, how many rounds are passed over before it (`data.skip_steps`)."""
    per_step = config.trainer.global_batch_size // config.data.streams
    for each in count(step + 1):
        batches = config.data.batch_of(each) - config.data.batch_of(each - 1) - 1
        yield batches * per_step
        yield from repeat(0, per_step - 1)


def validation_batches(
    config: TrainConfig, tokenizer: PreTrainedTokenizerFast, rank: int
) -> tuple[list[Batch], list[Group]]:
    """The validation batches of one rank, equally many on each, and the groups that they score.

    A batch holds `input_ids` and `group`, both `[eval_micro_batch, seq]` int64. A token's group is 1 + the index of its
    `Group`, or 0 in a sequence that only pads the last batch (see `model.score`). After the batches of the split come
    those of the reference solutions of `data.val_problems`. The sources of a mixture share `trainer.val_samples` as
    they share the streams.
    """
    trainer = config.trainer
    groups: Groups[Group] = Groups()
    parts = [validation_sequences(config, tokenizer, groups), solution_sequences(config, tokenizer, groups)]
    split = [split_scored(part, rank, config.world_size, trainer.eval_micro_batch_size) for part in parts if part]
    return list(chain.from_iterable(split)), list(groups)


def validation_sequences(
    config: TrainConfig, tokenizer: PreTrainedTokenizerFast, groups: Groups[Group]
) -> list[ScoredSequence]:
    """The first blocks of each source's split, source after source."""
    sequences: list[ScoredSequence] = []
    bare, described = (open_sources(config.data, "validation", with_meta) for with_meta in (False, True))
    samples = deal(config.trainer.val_samples, [len(source.streams) for source in bare])
    for wanted, source, with_meta in zip(samples, bare, described, strict=True):
        if wanted:
            blocks = first_blocks(_stream(config, source.corpus, tokenizer, shuffle=False), wanted)
            label = partial(_group, source.name)
            sequences += scored_blocks(blocks, with_meta.corpus, label, groups)
    if not any(each.group.any() for each in sequences):
        raise DataError(
            f"nothing is left to score of {bare[0].corpus.place}: prompts fill the blocks of data.seq_len="
            f"{config.data.seq_len}; set data.truncate=start or a larger data.seq_len"
        )
    return sequences


def _group(source: str, meta: dict[str, Any]) -> Group:
    return Group(language_label(meta), source)


def solution_sequences(
    config: TrainConfig, tokenizer: PreTrainedTokenizerFast, groups: Groups[Group]
) -> list[ScoredSequence]:
    """The reference solutions of `data.val_problems`, in rows no longer than they need."""
    if config.data.val_problems is None:
        return []
    problems = read_references(config.data.val_problems, "data.val_problems")
    end: int = tokenizer.eos_token_id
    rows = scored_solutions(
        problems, encoder(tokenizer), end, config.data.seq_len, lambda each: Group(each.language, solution=True), groups
    )
    return list(rows)


def _stream(
    config: TrainConfig,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    streams: int = 1,
    index: int = 0,
    shuffle: bool = True,
) -> Stream:
    data = config.data
    return Stream(
        corpus=corpus,
        objective=_objective(config, tokenizer, shuffle),
        seq_len=data.seq_len,
        index=index,
        streams=streams,
        seed=config.seed,
        window=data.window,
        shuffle=shuffle,
        pad=None if data.packing else tokenizer.eos_token_id,
    )


def _objective(config: TrainConfig, tokenizer: PreTrainedTokenizerFast, shuffle: bool) -> Objective:
    """What a stream makes of documents; validation never fills gaps, so that runs with any rate compare."""
    data, encode, eos = config.data, encoder(tokenizer), tokenizer.eos_token_id
    end = eos if data.eos_between_documents else None
    if data.prompt_column is not None:
        return Completion(encode, end, data.seq_len, data.truncate)
    if not data.fim_rate or not shuffle:
        return LeftToRight(encode, end)
    ids = fim_ids(tokenizer)
    return FillInTheMiddle(encode, eos, ids, data.fim_rate, data.fim_spm_rate, config.seed, data.fim_characters)


class Reader(NamedTuple):
    """A stream, its number among all streams of the run, and where it continues."""

    number: int
    stream: Stream
    start: Cursor

    def blocks(self) -> Iterator[Block]:
        return self.stream.blocks(self.start)


class TrainBatches:
    """The endless sequence of one rank's training batches.

    A round is one block of each of the rank's streams, in the order of the streams. Each loader process makes the
    blocks of some neighbouring streams, so no stream is shared and their number does not change the order.

    Args:
        passed: makes the numbers of rounds to pass over before each round.
        together: micro-batches of an optimizer step, whose targets are counted together; None if every token is one.

    Attributes:
        wait_seconds: how long the training process has waited for data so far.
    """

    def __init__(
        self,
        readers: list[Reader],
        passed: Passed,
        batch_size: int,
        num_workers: int,
        together: int | None = None,
    ) -> None:
        self.readers, self.passed, self.together = readers, passed, together
        self.batch_size, self.num_workers = batch_size, min(num_workers, len(readers))
        self.wait_seconds = 0.0

    def __iter__(self) -> Iterator[Batch]:
        blocks: list[StreamBlock] = []
        rounds = self._rounds()
        while True:
            started = time.perf_counter()
            blocks += next(rounds)
            self.wait_seconds += time.perf_counter() - started
            taken = self.batch_size * (self.together or 1)
            while len(blocks) >= taken:
                yield from self._collated(blocks[:taken])
                del blocks[:taken]

    def _collated(self, blocks: list[StreamBlock]) -> Iterator[Batch]:
        """The batches of some blocks."""
        parts = [blocks[begin : begin + self.batch_size] for begin in range(0, len(blocks), self.batch_size)]
        if self.together is None:
            yield from map(collate, parts)
            return
        targets = torch.tensor(sum(int((block.tokens[1:] >= 0).sum()) for _, block in blocks))
        for part in parts:
            predicted = np.stack([block.tokens >= 0 for _, block in part])
            yield {**collate(part), "predicted": torch.from_numpy(predicted.astype(np.int64)), "targets": targets}

    def _rounds(self) -> Iterator[list[StreamBlock]]:
        if not self.num_workers:
            yield from Rounds(self.readers, self.passed)
            return
        ends = [len(self.readers) * part // self.num_workers for part in range(self.num_workers + 1)]
        shares = [self.readers[first:end] for first, end in pairwise(ends)]
        loaders = [iter(_loader(Rounds(share, self.passed))) for share in shares]
        while True:
            try:
                shares_of_round = [next(loader) for loader in loaders]
            except DataError as error:  # re-raised by the loader with the worker's traceback in its message
                message = str(error).rsplit("DataError: ", 1)[-1].strip()
                # The frames of `error` keep the loaders in a cycle; freed by the garbage collector, each would wait
                # 10 s for its process.
                error.with_traceback(None)
                loaders.clear()
                raise DataError(message) from None
            yield list(chain.from_iterable(shares_of_round))


def _loader(rounds: "Rounds") -> "DataLoader[list[StreamBlock]]":
    """A process that makes rounds. `collate_fn`: torch would give each array of each block its own shared memory."""
    return DataLoader(
        rounds,
        batch_size=None,
        num_workers=1,
        prefetch_factor=PREFETCH_ROUNDS,
        collate_fn=list,
        worker_init_fn=_init_worker,
    )


class Rounds(IterableDataset[list[StreamBlock]]):
    """Endless rounds of some streams: what one loader process makes."""

    def __init__(self, readers: list[Reader], passed: Passed) -> None:
        self.readers, self.passed = readers, passed

    def __iter__(self) -> Iterator[list[StreamBlock]]:
        blocks = [(reader.number, reader.blocks()) for reader in self.readers]
        for passed in self.passed():
            yield [(number, _after(source, passed)) for number, source in blocks]


def _after(source: Iterator[Block], passed: int) -> Block:
    """The block after `passed` others, with what was read for them."""
    *others, block = islice(source, passed + 1)
    for each in others:
        block = block._replace(
            counts=block.counts + each.counts,
            rejected=block.rejected + each.rejected,
            skipped=(*block.skipped, *each.spans),
        )
    return block


def collate(blocks: list[StreamBlock]) -> Batch:
    rejected = [[stream, *each] for stream, block in blocks for each in block.rejected.items()]
    skipped = [[stream, *span] for stream, block in blocks for span in block.skipped]
    return {
        "input_ids": torch.from_numpy(token_ids(np.stack([block.tokens for _, block in blocks])).astype(np.int64)),
        "cursor": torch.tensor([[stream, *block.cursor] for stream, block in blocks]),
        "counts": torch.from_numpy(np.stack([block.counts for _, block in blocks])),
        "rejected": torch.tensor(rejected).reshape(-1, 3).long(),
        "spans": torch.tensor([[stream, *span] for stream, block in blocks for span in block.spans]),
        "skipped": torch.tensor(skipped).reshape(-1, 6).long(),
    }


def split_scored(sequences: list[ScoredSequence], rank: int, world_size: int, batch_size: int) -> list[Batch]:
    """A rank's share of the sequences, in equally many full batches on every rank: the last ones are padded."""
    mine = sequences[rank::world_size]
    per_rank = -(-len(sequences) // world_size)
    missing = -(-per_rank // batch_size) * batch_size - len(mine)
    padding = ScoredSequence(sequences[0].tokens, np.zeros_like(sequences[0].group))
    mine = mine + [padding] * missing
    return [collate_scored(mine[begin : begin + batch_size]) for begin in range(0, len(mine), batch_size)]


def _init_worker(_: int) -> None:
    """Ignore signals, which Slurm and terminals send to every process of a job: the rank handles them."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_exit_with_rank, args=(os.getppid(),), daemon=True).start()


def _exit_with_rank(rank_pid: int) -> None:
    """End a loader process whose rank was killed: it might wait forever for its blocks to be taken."""
    while os.getppid() == rank_pid:
        time.sleep(1)
    os._exit(1)
