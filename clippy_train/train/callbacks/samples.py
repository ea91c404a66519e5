"""Completions of fixed prompts by the model in training, at every validation: `samples.jsonl` and TensorBoard's text.

All ranks generate the same number of tokens together: under ZeRO-3 each holds a part of every weight, and one that
stopped earlier would leave the others waiting. Costs `logger.sample_tokens` forward passes of one sequence per prompt.
"""

import lightning.pytorch as pl
from transformers import GPTNeoForCausalLM, PreTrainedTokenizerFast

from clippy_train.config import TrainConfig
from clippy_train.model.sample import Sampling, complete_prompts
from clippy_train.run.folder import SAMPLES
from clippy_train.run.rows import RowFile
from clippy_train.train.loggers import EventLogger
from clippy_train.train.module import code_lm


class Samples(pl.Callback):
    """Greedy completions. On resume, drops those after `resumed_step`."""

    def __init__(self, config: TrainConfig, tokenizer: PreTrainedTokenizerFast, resumed_step: int, rank: int) -> None:
        self.config, self.tokenizer = config.logger, tokenizer
        self._rows = RowFile(config.run_dir / SAMPLES, resumed_step) if rank == 0 else None

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model = code_lm(pl_module).model
        texts = [self._complete(model, prompt) for prompt in self.config.sample_prompts]
        if not self._rows:
            return
        for number, (prompt, text) in enumerate(zip(self.config.sample_prompts, texts, strict=True)):
            self._rows.append({"step": trainer.global_step, "prompt": prompt, "completion": text})
            for logger in trainer.loggers:
                if isinstance(logger, EventLogger):
                    logger.log_text(f"samples/{number}", prompt + text, trainer.global_step)

    def _complete(self, model: GPTNeoForCausalLM, prompt: str) -> str:
        """What follows the prompt, up to the end of the text. A prompt that is too long is cut on the left."""
        positions = model.config.max_position_embeddings
        length = min(self.config.sample_tokens, positions // 2)
        ids = self.tokenizer(prompt)["input_ids"][length - positions :]
        text = str(self.tokenizer.decode(ids)).lstrip("\ufffd")  # the cut may leave a part of a character
        return complete_prompts(model, self.tokenizer, [text], Sampling(length, fixed_length=True))[0]
