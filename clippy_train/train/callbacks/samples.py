"""What the model in training writes: greedy completions of fixed prompts at every validation, in `samples.jsonl` and in
TensorBoard's text tab.

All ranks write the same tokens together, and always as many: under ZeRO-3 each holds a part of every weight, and one
that stopped earlier would leave the others waiting. Costs `logger.sample_tokens` forward passes of one row for each
prompt.
"""

from typing import Any

import lightning.pytorch as pl

from clippy_train.config import TrainConfig
from clippy_train.model.sample import Sampling, complete
from clippy_train.run.folder import SAMPLES
from clippy_train.run.rows import RowFile
from clippy_train.train.loggers import EventLogger


class Samples(pl.Callback):
    """Must come before the checkpointer: what a checkpoint's step has written is there when the checkpoint is.

    Args:
        resumed_step: rows behind it, of another life of the run, go.
    """

    def __init__(self, config: TrainConfig, tokenizer: Any, resumed_step: int, rank: int) -> None:
        self.config, self.tokenizer = config.logger, tokenizer
        self._rows = RowFile(config.run_dir / SAMPLES, resumed_step) if rank == 0 else None

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        texts = [self._complete(pl_module.model, prompt) for prompt in self.config.sample_prompts]
        if not self._rows:
            return
        for number, (prompt, text) in enumerate(zip(self.config.sample_prompts, texts, strict=True)):
            self._rows.append({"step": trainer.global_step, "prompt": prompt, "completion": text})
            for logger in trainer.loggers:
                if isinstance(logger, EventLogger):
                    logger.log_text(f"samples/{number}", prompt + text, trainer.global_step)

    def _complete(self, model: Any, prompt: str) -> str:
        """What follows the prompt, up to the end of the text. Of a prompt that is too long, the end is read."""
        positions = model.config.max_position_embeddings
        length = min(self.config.sample_tokens, positions // 2)
        ids = self.tokenizer(prompt)["input_ids"][length - positions :]
        text = self.tokenizer.decode(ids).lstrip("\ufffd")  # the cut may leave a part of a character
        return complete(model, self.tokenizer, [text], Sampling(length, fixed_length=True))[0]
