"""Streams -> batches: what a rank trains and validates on, as a LightningDataModule.

Promises: the rows of an optimizer step are the same for any number of ranks and loader processes; a batch holds
integers only (DeepSpeed casts every float to bf16) and carries, for each row, the cursor behind it, so what was trained
is known from the batches that were trained, not from how far a loader has read ahead.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from clippy_train.config import TrainConfig
from clippy_train.data.scored import Groups, Row, block_rows, collate_rows, first_blocks, language
from clippy_train.data.stream import Block, Cursor, Stream
from clippy_train.errors import DataError
from clippy_train.shards.sources import Corpus, open_corpus

# Rounds that a loader process makes ahead, 8 kB a block. A stream tokenises several documents at a time, so rounds cost
# from nothing to a second: processes that take turns must not wait for each other's dear ones.
PREFETCH_ROUNDS = 32

Batch = dict[str, Tensor]


class DataModule(pl.LightningDataModule):
    """Batches of one rank.

    Training batches: `input_ids` `[micro_batch, seq]`, `cursor` `[micro_batch, 1 + 5]` (stream, then `Cursor`),
    `counts` `[micro_batch, len(COUNTS)]`, `rejected` `[any number, 2]` (shard, lines) and `spans` `[spans of all rows
    in turn, 1 + 5]` (stream, then `Span`), all int64. Validation batches: `input_ids` and `group`
    `[eval_micro_batch, seq]` (1 + its language, or 0 in a row that only fills up the last batch; `model.score`).

    Args:
        cursors: `[streams, 5]`, where each stream continues.

    Attributes:
        languages: those of the validation rows; known from the first `val_dataloader` on.
    """

    def __init__(self, config: TrainConfig, tokenizer: Any, rank: int, cursors: np.ndarray) -> None:
        super().__init__()
        self.config, self.tokenizer, self.rank, self.cursors = config, tokenizer, rank, cursors
        self.languages: list[str] = []
        self._val_batches: list[Batch] | None = None

    def train_dataloader(self) -> "TrainBatches":
        share = self.config.data.streams // self.config.world_size
        mine = range(self.rank * share, (self.rank + 1) * share)
        corpus = open_corpus(self.config.data, "train")
        streams = [self._stream(corpus, index=index, shuffle=True) for index in mine]
        starts = [Cursor(*map(int, self.cursors[index])) for index in mine]
        return TrainBatches(streams, starts, self.config.trainer.micro_batch_size, self.config.data.num_workers)

    def val_dataloader(self) -> DataLoader:
        if self._val_batches is None:
            trainer = self.config.trainer
            described = open_corpus(self.config.data, "validation", described=True)
            stream = self._stream(open_corpus(self.config.data, "validation"), shuffle=False)
            groups: Groups[str] = Groups()
            rows = list(block_rows(first_blocks(stream, trainer.val_samples), described, language, groups))
            self.languages = list(groups)
            self._val_batches = val_batches(rows, self.rank, self.config.world_size, trainer.eval_micro_batch_size)
        return DataLoader(self._val_batches, batch_size=None)  # type: ignore[arg-type]

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """What only callbacks read stays on the host."""
        stay = ("cursor", "counts", "rejected", "spans")
        return {name: each if name in stay else each.to(device, non_blocking=True) for name, each in batch.items()}

    def _stream(self, corpus: Corpus, shuffle: bool, index: int = 0) -> Stream:
        data = self.config.data
        return Stream(
            corpus=corpus,
            encode=encoder(self.tokenizer),
            seq_len=data.seq_len,
            index=index,
            streams=data.streams if shuffle else 1,
            seed=self.config.seed,
            window=data.window,
            eos=self.tokenizer.eos_token_id if data.eos_between_documents else None,
            shuffle=shuffle,
        )


class TrainBatches:
    """The endless sequence of one rank's training batches.

    A round is one block of each of the rank's streams, in the order of the streams. Loader process `w` of `W` makes
    the blocks of every `W`-th stream, so a process keeps its streams to itself and `W` does not change the order.

    Attributes:
        wait_seconds: how long the training process has waited for data so far.
    """

    def __init__(self, streams: list[Stream], starts: list[Cursor], batch_size: int, num_workers: int) -> None:
        self.streams, self.starts = streams, starts
        self.batch_size, self.num_workers = batch_size, min(num_workers, len(streams))
        self.wait_seconds = 0.0

    def __iter__(self) -> Iterator[Batch]:
        rows: list[StreamBlock] = []
        rounds = self._rounds()
        while True:
            started = time.perf_counter()
            rows += next(rounds)
            self.wait_seconds += time.perf_counter() - started
            while len(rows) >= self.batch_size:
                yield collate(rows[: self.batch_size])
                del rows[: self.batch_size]

    def _rounds(self) -> Iterator[list["StreamBlock"]]:
        shares = max(1, self.num_workers)
        sources = [Rounds(self.streams[w::shares], self.starts[w::shares]) for w in range(shares)]
        if not self.num_workers:
            yield from sources[0]
            return
        loaders = [iter(_loader(source)) for source in sources]
        while True:
            try:
                shares_of_round = [next(loader) for loader in loaders]
            except DataError as error:  # re-raised by the loader with the worker's traceback in its text
                message = str(error).rsplit("DataError: ", 1)[-1].strip()
                error.with_traceback(None)  # its frames keep the loaders in a cycle, and one freed by the collector
                loaders.clear()  # waits 10 s for its process
                raise DataError(message) from None
            yield sorted(chain.from_iterable(shares_of_round), key=lambda row: row[0])


def _loader(source: "Rounds") -> DataLoader:
    """A process that makes rounds. `collate_fn`: torch would give each array of each row its own shared memory."""
    return DataLoader(
        source,
        batch_size=None,
        num_workers=1,
        prefetch_factor=PREFETCH_ROUNDS,
        collate_fn=list,
        worker_init_fn=_init_worker,
    )


StreamBlock = tuple[int, Block]  # stream, its block


class Rounds(IterableDataset):
    """Rounds of some streams: what one loader process makes."""

    def __init__(self, streams: list[Stream], starts: list[Cursor]) -> None:
        self.streams, self.starts = streams, starts

    def __iter__(self) -> Iterator[list[StreamBlock]]:
        blocks = [stream.blocks(start) for stream, start in zip(self.streams, self.starts, strict=True)]
        while True:
            yield [(stream.index, next(source)) for stream, source in zip(self.streams, blocks, strict=True)]


def collate(rows: list[StreamBlock]) -> Batch:
    return {
        "input_ids": torch.from_numpy(np.stack([block.tokens for _, block in rows]).astype(np.int64)),
        "cursor": torch.tensor([[stream, *block.cursor] for stream, block in rows]),
        "counts": torch.from_numpy(np.stack([block.counts for _, block in rows])),
        "rejected": torch.tensor([each for _, block in rows for each in block.rejected.items()]).reshape(-1, 2).long(),
        "spans": torch.tensor([[stream, *span] for stream, block in rows for span in block.spans]),
    }


def val_batches(rows: list[Row], rank: int, world_size: int, batch_size: int) -> list[Batch]:
    """A rank's share of the validation rows, in as many full batches on every rank: the last are filled up."""
    mine = rows[rank::world_size]
    per_rank = -(-len(rows) // world_size)
    missing = -(-per_rank // batch_size) * batch_size - len(mine)
    filler = Row(rows[0].tokens, np.zeros_like(rows[0].group))
    mine = mine + [filler] * missing
    return [collate_rows(mine[begin : begin + batch_size]) for begin in range(0, len(mine), batch_size)]


def encoder(tokenizer: Any) -> Callable[[list[str]], list[list[int]]]:
    """Texts -> ids through the tokenizer's Rust core, without special tokens."""
    return partial(encode, tokenizer.backend_tokenizer)


def encode(core: Any, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in core.encode_batch_fast(texts, add_special_tokens=False)]


def _init_worker(_: int) -> None:
    """A loader process leaves signals to its rank: Slurm and terminals send them to every process of a job."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_die_with_rank, args=(os.getppid(),), daemon=True).start()


def _die_with_rank(rank_pid: int) -> None:
    """A loader process whose rank was killed may wait for ever for its blocks to be taken."""
    while os.getppid() == rank_pid:
        time.sleep(1)
    os._exit(1)
