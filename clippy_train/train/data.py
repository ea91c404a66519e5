"""The batches of a rank (`data.batches`) as a LightningDataModule."""

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from clippy_train.config import TrainConfig
from clippy_train.data.batches import Batch, TrainBatches, train_batches, validation_batches
from clippy_train.data.scored import Group

ON_HOST = ("cursor", "counts", "rejected", "spans", "skipped")  # only callbacks read these


class DataModule(pl.LightningDataModule):
    """Batches of one rank.

    Args:
        cursors: `[streams, 5]`, where each stream continues.
        step: the last one that was made.

    Attributes:
        groups: what validations score separately; known from the first `val_dataloader` on.
    """

    def __init__(
        self,
        config: TrainConfig,
        tokenizer: PreTrainedTokenizerFast,
        rank: int,
        cursors: np.ndarray,
        step: int = 0,
    ) -> None:
        super().__init__()
        self.config, self.tokenizer, self.rank, self.cursors, self.step = config, tokenizer, rank, cursors, step
        self.groups: list[Group] = []
        self._val_batches: list[Batch] = []

    def train_dataloader(self) -> TrainBatches:
        return train_batches(self.config, self.tokenizer, self.rank, self.cursors, self.step)

    def val_dataloader(self) -> DataLoader[Batch]:
        if not self._val_batches:
            self._val_batches, self.groups = validation_batches(self.config, self.tokenizer, self.rank)
        return DataLoader(self._val_batches, batch_size=None)  # type: ignore[arg-type]

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return {name: each if name in ON_HOST else _moved(each, device) for name, each in batch.items()}


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device. The copy runs beside the host only from pinned memory."""
    pinned = tensor.pin_memory() if device.type == "cuda" else tensor
    return pinned.to(device, non_blocking=True)
