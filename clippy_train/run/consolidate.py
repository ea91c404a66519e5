"""A checkpoint of any strategy and any number of ranks as whole fp32 tensors, by their Hugging Face names.

`clippy export` writes them, and a run starts from them when its layout (ranks, strategy, precision, micro-batch) is not
that of its checkpoint. Weights and moments are DeepSpeed's fp32 ones, bit for bit. Costs a copy of the state on disk,
twice while DeepSpeed's converter runs. Imports torch only when it is called.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clippy_train.errors import CheckpointError
from clippy_train.files import STAGING
from clippy_train.run import plain
from clippy_train.run.checkpoint import Checkpoint
from clippy_train.run.folder import DEEPSPEED_TAG, STATE, checkpoint_folder
from clippy_train.run.moments import MOMENTS, save_base_state

if TYPE_CHECKING:
    from torch import Tensor, nn

    Tensors = dict[str, Tensor]

WEIGHTS = "fp32"  # DeepSpeed's name for the weights; the moments have the same names there as in torch
WEIGHTS_FILE = "model.safetensors"
PREFIX = "model."  # the model's name inside `train.module.CodeLM`
# Tied to the embedding. DeepSpeed's converter finds no optimizer state for it and fills it from the bf16 weights:
# loaded after the embedding, it would round every row.
HEAD = "lm_head.weight"


def consolidate(checkpoint: Checkpoint, description: Path, run_dir: Path) -> Path:
    """Write a checkpoint's weights and Adam moments to a folder of the run, as `clippy import` does; returns it.

    It has the name of a staging folder, so the run's next checkpoint deletes it.

    Raises:
        CheckpointError: the checkpoint is not of the model that `description` describes, or the disk is full.
    """
    from safetensors.torch import save_file

    out = checkpoint_folder(run_dir, checkpoint.manifest.step).with_suffix(".consolidated" + STAGING)
    shutil.rmtree(out, ignore_errors=True)
    try:
        out.mkdir(parents=True)
        tensors = consolidated_tensors(checkpoint, description, (WEIGHTS, *MOMENTS), out)
        save_file(tensors.pop(WEIGHTS), out / WEIGHTS_FILE)
        save_base_state(out, checkpoint.manifest.step, tensors)
    except OSError as error:
        shutil.rmtree(out, ignore_errors=True)
        raise CheckpointError(f"{checkpoint.path} cannot be resharded in {out}: {error}") from error
    return out


def consolidated_tensors(
    checkpoint: Checkpoint, description: Path, kinds: Sequence[str], staging: Path | None = None
) -> "dict[str, Tensors]":
    """Each of `kinds` (of `WEIGHTS` and `MOMENTS`) as fp32 tensors by name, without the tied head.

    Args:
        description: folder with the model's Hugging Face configuration.
        staging: where DeepSpeed's converter may put a temporary copy of the state; the system's place by default.

    Raises:
        CheckpointError: the checkpoint is not of the model that `description` describes, or holds more than tensors
            and plain values.
    """
    import torch
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    with torch.device("meta"):
        model = GPTNeoForCausalLM(GPTNeoConfig.from_pretrained(description))
    state = checkpoint.path / STATE
    if state.is_dir():
        found = {kind: _unprefixed(tensors) for kind, tensors in _from_deepspeed(state, kinds, staging).items()}
    else:
        found = _from_torch(state, kinds, model)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}  # without the tied head
    for tensors in found.values():
        if tensors.keys() != shapes.keys():
            wrong = sorted(tensors.keys() ^ shapes.keys())
            raise CheckpointError(f"{checkpoint.path} is not of this model: it differs in {wrong}")
    # DeepSpeed's converter leaves the tensors of ZeRO-3 flat
    return {kind: {name: each.view(shapes[name]) for name, each in tensors.items()} for kind, tensors in found.items()}


def set_weights(model: "nn.Module", weights: "Tensors") -> None:
    """Give a model the weights that `consolidated_tensors` found, in place."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])


def _from_torch(state: Path, kinds: Sequence[str], model: "nn.Module") -> "dict[str, Tensors]":
    """From the file of a run without DeepSpeed, whose optimizer numbers parameters in the order of its groups."""
    from clippy_train.optim import parameter_groups

    content = plain.load_plain(state)
    found = {WEIGHTS: _unprefixed(content["state_dict"])}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    order = [names[id(parameter)] for group in parameter_groups(model) for parameter in group]
    for moment in set(kinds) & set(MOMENTS):
        moments = content["optimizer_states"][0]["state"]
        found[moment] = {name: moments[index][moment] for index, name in enumerate(order)}
    return {kind: found[kind] for kind in kinds}


def _from_deepspeed(state: Path, kinds: Sequence[str], staging: Path | None) -> "dict[str, Tensors]":
    with tempfile.TemporaryDirectory(dir=staging) as temporary:
        universal = _convert_to_universal(state, Path(temporary) / "universal")
        files = {kind: universal.glob(f"zero/*/{kind}.pt") for kind in kinds}
        return {kind: {file.parent.name: _tensor(file) for file in files[kind]} for kind in kinds}


def _tensor(file: Path) -> "Tensor":
    content = plain.load_plain(file)
    tensor: Tensor = content["param"] if isinstance(content, dict) else content
    return tensor


def _unprefixed(tensors: "Tensors") -> "Tensors":
    named = {name.removeprefix(PREFIX): tensor.detach() for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in named.items() if name != HEAD}


def _convert_to_universal(state: Path, out: Path) -> Path:
    """Convert DeepSpeed's per-rank files to its universal format, one folder per parameter; returns `out`.

    Raises:
        CheckpointError: DeepSpeed's converter failed, or a file holds more than tensors and plain values.
    """
    command = [sys.executable, "-m", plain.__name__, "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    command += ["--input_folder", str(state / DEEPSPEED_TAG), "--output_folder", str(out)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise CheckpointError(f"{state} cannot be consolidated: {''.join(result.stderr.strip().splitlines()[-1:])}")
    return out
