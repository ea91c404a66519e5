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
from itertools import chain, count, islice, repeat

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedTokenizerFast

from clippy_train.config import TrainConfig
from clippy_train.data.scored import Groups, ScoredSequence, collate_scored, first_blocks, language_label, scored_blocks
from clippy_train.data.stream import Block, Cursor, Stream
from clippy_train.errors import DataError
from clippy_train.shards.sources import Corpus, open_corpus
from clippy_train.signals import SIGNALS
from clippy_train.tokenizer import encoder

# Rounds that a loader process makes ahead, 8 kB per block. A stream tokenises several documents at a time, so a round
# costs between nothing and a second: processes that take turns must not wait for each other's expensive rounds.
PREFETCH_ROUNDS = 32

Batch = dict[str, Tensor]
StreamBlock = tuple[int, Block]  # stream, its block
Passed = Callable[[], Iterator[int]]


def train_batches(
    config: TrainConfig, tokenizer: PreTrainedTokenizerFast, rank: int, cursors: np.ndarray, step: int
) -> "TrainBatches":
    """The training batches of one rank after `step`; each stream continues from its row of `cursors` (`[streams, 5]`).

    A batch holds `input_ids` `[micro_batch, seq]`, `cursor` `[micro_batch, 1 + 5]` (stream, then `Cursor`), `counts`
    `[micro_batch, len(COUNTS)]`, `rejected` `[any number, 2]` (shard, lines), and `spans` and `skipped` `[spans of all
    blocks in turn, 1 + 5]` (stream, then `Span`), all int64.
    """
    share = config.data.streams // config.world_size
    corpus = open_corpus(config.data, "train")
    own = range(rank * share, (rank + 1) * share)
    streams = [_stream(config, corpus, tokenizer, index=index) for index in own]
    starts = [Cursor(*map(int, cursors[index])) for index in own]
    passed = partial(rounds_passed_over, config, step)
    return TrainBatches(streams, starts, passed, config.trainer.micro_batch_size, config.data.num_workers)


def rounds_passed_over(config: TrainConfig, step: int) -> Iterator[int]:
    """For each round after `step`, how many rounds are passed over before it (`data.skip_steps`)."""
    per_step = config.trainer.global_batch_size // config.data.streams
    for each in count(step + 1):
        batches = config.data.batch_of(each) - config.data.batch_of(each - 1) - 1
        yield batches * per_step
        yield from repeat(0, per_step - 1)


def validation_batches(
    config: TrainConfig, tokenizer: PreTrainedTokenizerFast, rank: int
) -> tuple[list[Batch], list[str]]:
    """The validation batches of one rank, equally many on each, and the languages of the split.

    A batch holds `input_ids` and `group`, both `[eval_micro_batch, seq]` int64. A token's group is 1 + the index of its
    language, or 0 in a sequence that only pads the last batch (see `model.score`).
    """
    trainer = config.trainer
    corpus = open_corpus(config.data, "validation", with_meta=True)
    stream = _stream(config, open_corpus(config.data, "validation"), tokenizer, shuffle=False)
    groups: Groups[str] = Groups()
    sequences = list(scored_blocks(first_blocks(stream, trainer.val_samples), corpus, language_label, groups))
    return split_scored(sequences, rank, config.world_size, trainer.eval_micro_batch_size), list(groups)


def _stream(
    config: TrainConfig, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, shuffle: bool = True, index: int = 0
) -> Stream:
    data = config.data
    return Stream(
        corpus=corpus,
        encode=encoder(tokenizer),
        seq_len=data.seq_len,
        index=index,
        streams=data.streams if shuffle else 1,
        seed=config.seed,
        window=data.window,
        eos=tokenizer.eos_token_id if data.eos_between_documents else None,
        shuffle=shuffle,
    )


class TrainBatches:
    """The endless sequence of one rank's training batches.

    A round is one block of each of the rank's streams, in the order of the streams. Loader process `w` of `W` makes
    the blocks of every `W`-th stream, so no stream is shared and `W` does not change the order.

    Args:
        passed: makes the numbers of rounds to pass over before each round.

    Attributes:
        wait_seconds: how long the training process has waited for data so far.
    """

    def __init__(
        self, streams: list[Stream], starts: list[Cursor], passed: Passed, batch_size: int, num_workers: int
    ) -> None:
        self.streams, self.starts, self.passed = streams, starts, passed
        self.batch_size, self.num_workers = batch_size, min(num_workers, len(streams))
        self.wait_seconds = 0.0

    def __iter__(self) -> Iterator[Batch]:
        blocks: list[StreamBlock] = []
        rounds = self._rounds()
        while True:
            started = time.perf_counter()
            blocks += next(rounds)
            self.wait_seconds += time.perf_counter() - started
            while len(blocks) >= self.batch_size:
                yield collate(blocks[: self.batch_size])
                del blocks[: self.batch_size]

    def _rounds(self) -> Iterator[list[StreamBlock]]:
        shares = max(1, self.num_workers)
        sources = [Rounds(self.streams[w::shares], self.starts[w::shares], self.passed) for w in range(shares)]
        if not self.num_workers:
            yield from sources[0]
            return
        loaders = [iter(_loader(source)) for source in sources]
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
            yield sorted(chain.from_iterable(shares_of_round), key=lambda block: block[0])


def _loader(source: "Rounds") -> "DataLoader[list[StreamBlock]]":
    """A process that makes rounds. `collate_fn`: torch would give each array of each block its own shared memory."""
    return DataLoader(
        source,
        batch_size=None,
        num_workers=1,
        prefetch_factor=PREFETCH_ROUNDS,
        collate_fn=list,
        worker_init_fn=_init_worker,
    )


class Rounds(IterableDataset[list[StreamBlock]]):
    """Endless rounds of some streams: what one loader process makes."""

    def __init__(self, streams: list[Stream], starts: list[Cursor], passed: Passed) -> None:
        self.streams, self.starts, self.passed = streams, starts, passed

    def __iter__(self) -> Iterator[list[StreamBlock]]:
        blocks = [stream.blocks(start) for stream, start in zip(self.streams, self.starts, strict=True)]
        for passed in self.passed():
            yield [(stream.index, _after(source, passed)) for stream, source in zip(self.streams, blocks, strict=True)]


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
    rejected = [each for _, block in blocks for each in block.rejected.items()]
    skipped = [[stream, *span] for stream, block in blocks for span in block.skipped]
    return {
        "input_ids": torch.from_numpy(np.stack([block.tokens for _, block in blocks]).astype(np.int64)),
        "cursor": torch.tensor([[stream, *block.cursor] for stream, block in blocks]),
        "counts": torch.from_numpy(np.stack([block.counts for _, block in blocks])),
        "rejected": torch.tensor(rejected).reshape(-1, 2).long(),
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
