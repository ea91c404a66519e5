"""What the order of the training data depends on. Apart from the loaders: a launcher needs it without torch."""

from dataclasses import asdict
from typing import Any

from clippy_train.config import TrainConfig


def data_identity(config: TrainConfig, fingerprint: str) -> dict[str, Any]:
    """Everything that the order of the data depends on: a run can only be resumed while it stays the same."""
    data = config.data
    return {
        "corpus fingerprint": fingerprint,
        "seed": config.seed,
        "data.streams": data.streams,
        "data.seq_len": data.seq_len,
        "data.window": data.window,
        "data.text_column": data.text_column,
        "data.filter": asdict(data.filter),
        "data.eos_between_documents": data.eos_between_documents,
        "tokenizer.whitespace_tokens": config.tokenizer.whitespace_tokens,
        "tokenizer.matching": config.tokenizer.matching,
        "trainer.global_batch_size": config.trainer.global_batch_size,
    }
