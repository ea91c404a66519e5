"""`clippy export`: a checkpoint of a run -> a Hugging Face folder that plain transformers loads.

Promises: the checkpoint is verified before it is read; weights are consolidated from any ZeRO stage's fp32 master copy;
the folder appears only after it was loaded back and gave the same logits.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from clippy_train.card import model_card
from clippy_train.config import ExportConfig, load
from clippy_train.errors import CheckpointError, ConfigError
from clippy_train.shards import new_folder
from clippy_train.tokenizer import load_tokenizer
from clippy_train.train.checkpoint import STATE, Checkpoint, find
from clippy_train.train.launch import CONFIG, ENVIRONMENT, HF_FOLDER
from clippy_train.train.monitor import METRICS, read_rows

PREFIX = "model."  # the model's name inside `train.module.CodeLM`
# Tied to the embedding. DeepSpeed's converter, which finds no optimizer state of its own for it, fills it from the
# bf16 weights: loaded after the embedding, it would round every exported row.
HEAD = "lm_head.weight"


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
    parameters = dict(model.named_parameters())  # the tied head is not among them
    weights = consolidated(checkpoint)
    if weights.keys() != parameters.keys():
        raise CheckpointError(
            f"{checkpoint.path} is not of this model: it differs in {sorted(weights.keys() ^ parameters.keys())}"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name].view_as(parameter))
    return model.eval()


def consolidated(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The fp32 weights of a verified checkpoint by their Hugging Face names, without the tied head.

    Those of a ZeRO-3 checkpoint are flat, as DeepSpeed's converter leaves them.
    """
    state = checkpoint.path / STATE
    if not state.is_dir():
        return _named(torch.load(state, weights_only=True)["state_dict"])
    with tempfile.TemporaryDirectory() as aside:
        universal = convert_to_universal(state, Path(aside) / "universal")
        content = {file.parent.name: torch.load(file, weights_only=True) for file in universal.glob("zero/*/fp32.pt")}
    return _named({name: each["param"] if isinstance(each, dict) else each for name, each in content.items()})


def _named(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    named = {name.removeprefix(PREFIX): tensor.detach() for name, tensor in weights.items()}
    return {name: tensor for name, tensor in named.items() if name != HEAD}


def convert_to_universal(state: Path, out: Path) -> Path:
    """Convert DeepSpeed's per-rank files to its universal format, one folder for each parameter; returns `out`.

    Raises:
        CheckpointError: DeepSpeed's converter failed.
    """
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    command += ["--input_folder", str(state / "checkpoint"), "--output_folder", str(out)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise CheckpointError(f"{state} cannot be consolidated: {result.stderr.strip().splitlines()[-1:]}")
    return out


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
