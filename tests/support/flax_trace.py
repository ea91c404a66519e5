"""A recorded run of the original Flax training script: its settings, weights, batches and results."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from clippy_train.config import OptimConfig


class FlaxTrace:
    """One folder of a recording; `data/flax_micro/README.md` describes its files.

    Attributes:
        args: every setting of the recorded run, by the original's names.
        lr_table: learning rate of each update.
        losses: mean loss of each micro-batch.
        grad_norms: global norm of each update's mean gradient before clipping.
        evals: the loss of each validation batch, by the number of updates made before the validation.
        train_ids: `[micro_step, batch, seq]` int64.
        eval_ids: `[batch_index, eval_batch, seq]` int64; the batch size may differ from that of `train_ids`.
    """

    def __init__(self, folder: Path) -> None:
        trace = json.loads((folder / "trace_fp32.json").read_text())
        self.folder = folder
        self.args: dict[str, Any] = trace["args"]
        self.lr_table: list[float] = trace["lr_table"]
        self.lr_applied: list[float] = trace["update"]["lr_applied"]
        self.losses: list[float] = trace["micro"]["loss"]
        self.grad_norms: list[float] = trace["update"]["grad_norm_preclip"]
        self.accumulation: int = self.args["gradient_accumulation_steps"]
        self.evals: dict[int, list[float]] = {
            each["micro"] // self.accumulation: each["batch_losses"] for each in trace["eval"]
        }
        with np.load(folder / "batches.npz") as batches:
            self.train_ids = torch.from_numpy(batches["train_input_ids"].astype(np.int64))
            self.eval_ids = torch.from_numpy(batches["eval_input_ids"].astype(np.int64))

    def micro_batches(self, update: int) -> Tensor:
        """The micro-batches of an update, `[accumulation, batch, seq]`."""
        return self.train_ids[update * self.accumulation : (update + 1) * self.accumulation]

    def optim_config(self) -> OptimConfig:
        """The recorded settings under the project's names."""
        args = self.args
        return OptimConfig(
            lr=args["learning_rate"],
            betas=[args["adam_beta1"], args["adam_beta2"]],
            eps=args["adam_epsilon"],
            weight_decay=args["weight_decay"],
            warmup_steps=args["warmup_steps"],
            decay_steps=args["decay_steps"],
            min_lr_ratio=args["end_lr"] / args["learning_rate"],
            grad_clip=args["clip_global_norm"],
        )

    def initial_model(self) -> GPTNeoForCausalLM:
        """The model in fp32 with the recorded initial weights, which are stored as bf16 without loss."""
        model = GPTNeoForCausalLM(GPTNeoConfig.from_pretrained(self.folder))
        with np.load(self.folder / "init_bf16bits.npz") as stored:
            weights = {name: (stored[name].astype(np.uint32) << 16).view(np.float32) for name in stored}
        state = {name: torch.from_numpy(weight) for name, weight in weights.items()}
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert (missing, unexpected) == (["lm_head.weight"], [])  # tied to the embedding
        return model

    def final_weights(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The recorded rows of each parameter and their values after the last update, by name."""
        with np.load(self.folder / "final_fp32.npz") as stored:
            recorded = {name: torch.from_numpy(stored[name]) for name in stored}
        if "wte_rows" in recorded:  # a large embedding is recorded only in the rows of tokens that occur
            some = {"transformer.wte.weight": (recorded["wte_rows_index"].long(), recorded["wte_rows"])}
        else:
            some = {}
        return some | {
            name: (torch.arange(len(value)), value)
            for name, value in recorded.items()
            if name.startswith("transformer.")
        }
