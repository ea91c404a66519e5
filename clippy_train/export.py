"""`clippy export`: a checkpoint of a run -> a Hugging Face folder that plain transformers loads.

Promises: the checkpoint is verified before it is read; weights are consolidated from any ZeRO stage's fp32 master copy;
the folder appears only after it was loaded back and gave the same logits.
"""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from clippy_train.card import model_card
from clippy_train.config import ExportConfig, load
from clippy_train.errors import CheckpointError, ConfigError
from clippy_train.shards import new_folder
from clippy_train.tokenizer import load_tokenizer
from clippy_train.train.checkpoint import Checkpoint, find
from clippy_train.train.consolidate import WEIGHTS, set_weights, whole_tensors
from clippy_train.train.launch import CONFIG, ENVIRONMENT, HF_FOLDER
from clippy_train.train.record import METRICS, read_rows


def export(config: ExportConfig) -> str:
    """Write the model of a run to `out`; returns what was done in one line.

    Raises:
        ConfigError: no such run, or `out` is not empty.
        CheckpointError: the run has no intact checkpoint (of that step).
    """
    run_dir = Path(config.run)
    if not (run_dir / CONFIG).is_file():
        raise ConfigError(f"run={config.run}: not a run folder (it has no {CONFIG})")
    checkpoint = find(run_dir, config.step)
    if checkpoint is None:
        raise CheckpointError(f"run={config.run} has no checkpoint yet")
    with new_folder(Path(config.out), "out") as out:
        model = load_checkpoint_model(run_dir / HF_FOLDER, checkpoint)
        if config.dtype == "bf16":
            model = model.to(torch.bfloat16)
        model.save_pretrained(out)
        load_tokenizer(run_dir / HF_FOLDER).save_pretrained(out)
        card = model_card(
            load(run_dir / CONFIG),
            json.loads((run_dir / ENVIRONMENT).read_text()),
            checkpoint.manifest,
            list(read_rows(run_dir / METRICS)),
        )
        (out / "README.md").write_text(card)
        verify(out, model)
    return f"{config.out}: step {checkpoint.manifest.step} of {config.run}, verified"


def load_checkpoint_model(description: Path, checkpoint: Checkpoint) -> Any:
    """The model of a checkpoint in fp32, tied as its configuration says.

    Raises:
        CheckpointError: the checkpoint is not of the model that `description` describes.
    """
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(description), dtype=torch.float32)
    model.generation_config = GenerationConfig.from_pretrained(description)
    set_weights(model, whole_tensors(checkpoint, description, (WEIGHTS,))[WEIGHTS])
    return model.eval()


@torch.no_grad()
def verify(folder: Path, model: Any) -> None:
    """Load a folder with plain transformers and compare its logits with the model's.

    Raises:
        CheckpointError: they differ.
    """
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype).eval()
    length = min(64, model.config.max_position_embeddings)
    ids = torch.arange(length)[None] % model.config.vocab_size
    if not torch.equal(loaded(ids).logits, model(ids).logits):
        raise CheckpointError(f"{folder}: the exported model gives other logits than the checkpoint")
