"""How far a run has come: the cursor of every stream and what was read, committed micro-batch by micro-batch."""

import logging
from collections import Counter
from typing import Any

import lightning.pytorch as pl
import numpy as np

from clippy_train.config import TrainConfig
from clippy_train.data.batches import Batch
from clippy_train.data.mixture import Source, read_through, shard_names
from clippy_train.data.stream import COUNTS, Cursor
from clippy_train.errors import DataError
from clippy_train.train import collective
from clippy_train.train.module import code_lm

log = logging.getLogger(__name__)

MAX_SHARDS_NAMED = 5
MIN_LINES_TO_JUDGE = 1000  # lines read before data.max_bad_fraction applies


class Progress(pl.Callback):
    """Commits the cursors of each micro-batch after it was trained, and ends the run after its last step.

    Attributes:
        ended: whether the last step that was made is the last one of the run.
        cursors: `[streams, 5]` int64; a rank keeps the cursors of its own streams up to date.
        counts: `[len(COUNTS)]` int64, what this rank has read in this attempt.
        rejected: lines of those that could not be used, by the name of their shard.
    """

    def __init__(self, config: TrainConfig, cursors: np.ndarray, counts: np.ndarray, sources: list[Source]) -> None:
        self.config, self.cursors, self.sources = config, cursors.copy(), sources
        self.ended = False
        self._shards = shard_names(sources)
        self.rejected: Counter[str] = Counter()
        self._counts_before, self.counts = counts, np.zeros(len(COUNTS), dtype=np.int64)

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.ended = trainer.global_step == self.config.trainer.max_steps  # only a validation was missing

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        for stream, *cursor in batch["cursor"].tolist():
            self.cursors[stream] = cursor
        self.counts += batch["counts"].sum(dim=0).numpy()
        for stream, shard, lines in batch["rejected"].tolist():
            self.rejected[self._shards[stream][shard]] += lines
        self.ended = trainer.global_step == self.config.trainer.max_steps or self._data_ended(pl_module)
        if self.ended:
            trainer.should_stop = True  # Lightning then validates once more, even off the interval

    def _data_ended(self, module: pl.LightningModule) -> bool:
        """Whether `trainer.max_epochs` ends the run with this step. Collective then."""
        epochs = self.config.trainer.max_epochs
        if epochs is None or not code_lm(module).step.ended:
            return False
        found = read_through(self.sources, self.all_epochs(), epochs)
        if found and collective.rank() == 0:
            places = ", ".join(source.corpus.place for source in found)
            log.info("%s: the run ends (trainer.max_epochs=%d)", places, epochs)
        return bool(found)

    def all_epochs(self) -> np.ndarray:
        """The epoch that each stream is in, `[streams]`. Collective."""
        share = len(self.cursors) // self.config.world_size
        epochs = np.zeros(len(self.cursors), dtype=np.int64)
        own = slice(collective.rank() * share, (collective.rank() + 1) * share)
        epochs[own] = self.cursors[own, 0]
        return collective.total(epochs)

    def all_cursors(self) -> np.ndarray:
        """The cursors of all streams, from the ranks that own them. Collective."""
        share = len(self.cursors) // self.config.world_size
        own = self.cursors[collective.rank() * share :][:share]
        return np.concatenate(collective.gather(own))

    def all_counts(self) -> dict[str, int]:
        """What all ranks have read since the run started. Collective.

        Raises:
            DataError: more than `data.max_bad_fraction` of the lines could not be used.
        """
        values = self._counts_before + collective.total(self.counts)
        counts = dict(zip(COUNTS, values.tolist(), strict=True))
        bad = sum(value for name, value in counts.items() if name.startswith("rejected/"))
        lines = bad + counts["documents"]
        limit = self.config.data.max_bad_fraction
        if lines >= MIN_LINES_TO_JUDGE and bad > limit * lines:
            reasons = {name: value for name, value in counts.items() if name.startswith("rejected/") and value}
            rejected = sum(collective.gather(self.rejected), Counter[str]())
            worst = ", ".join(f"{shard} ({lines})" for shard, lines in rejected.most_common(MAX_SHARDS_NAMED))
            raise DataError(
                f"{bad} of {lines} lines of the corpus cannot be used ({reasons}): more than "
                f"data.max_bad_fraction={limit}. Most of them are in {worst}. Repair the corpus, or raise the limit"
            )
        return counts


def fresh_cursors(streams: int) -> np.ndarray:
    """The cursors of a run that has read nothing."""
    return np.zeros((streams, len(Cursor._fields)), dtype=np.int64)


def validation_due(config: TrainConfig, step: int) -> bool:
    """Whether the run validates after `step`."""
    return step % config.trainer.val_every_steps == 0 or step == config.trainer.max_steps
