"""`trainer.audit`: which documents each step was trained on (`ledger.jsonl`), and a digest of its tokens."""

from hashlib import blake2b
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np

from clippy_train.data.batches import Batch
from clippy_train.run.rows import RowFile
from clippy_train.train import collective
from clippy_train.train.module import code_lm


class Ledger(pl.Callback):
    """Writes a row per step. `spans` is a list of [stream, epoch, shard, line, first, end] (`data.stream.Span`), block
    after block: the lengths of a block's spans add up to `data.seq_len`. About 30 bytes per span. `skipped`, where
    there are any, are those of the blocks that `data.skip_steps` passed over before."""

    def __init__(self, path: Path, resumed_step: int, rank: int) -> None:
        self._rows = RowFile(path, resumed_step) if rank == 0 else None
        self._reset()

    def _reset(self) -> None:
        self._spans: dict[str, list[list[int]]] = {"spans": [], "skipped": []}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        for kind, spans in self._spans.items():
            spans += batch[kind].tolist()
        if code_lm(pl_module).step.ended:
            ranks = collective.gather(self._spans)
            self._reset()
            row = {kind: [span for spans in ranks for span in spans[kind]] for kind in self._spans}
            if self._rows:
                self._rows.append({"step": trainer.global_step, **{kind: row[kind] for kind in row if row[kind]}})


def block_digest(tokens: np.ndarray) -> int:
    """64 bits that identify a block of token ids; their sum modulo 2^64 identifies a set of blocks in any order."""
    return int.from_bytes(blake2b(tokens.astype("<i4").tobytes(), digest_size=8).digest(), "little")
