"""`clippy import`: turn a checkpoint folder of the original Flax training script into a Hugging Face folder.

Promises: files are read with msgpack and numpy alone, so nothing in them is executed; every tensor is used exactly once
and has the shape that config.json requires; the folder appears complete or not at all. Costs the memory of the model
and about twice the largest file.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, GPTNeoConfig, GPTNeoForCausalLM

from clippy_train.config import ImportConfig
from clippy_train.errors import CheckpointError, ConfigError, first_line
from clippy_train.files import new_folder
from clippy_train.model.load import copy_file_modes
from clippy_train.run.moments import save_base_state
from clippy_train.tokenizer import load_tokenizer

WEIGHTS, OPT_STATE, TRAINING_STATE = "flax_model.msgpack", "opt_state.msgpack", "training_state.json"
TOKENIZER = ("tokenizer.json", "vocab.json")  # either file means that the folder has a tokenizer
NDARRAY, COMPLEX, SCALAR = 1, 2, 3  # Flax's msgpack extension types
CHUNKED = "__msgpack_chunked_array__"  # marks an array that Flax split into chunks
LISTED = 5  # tensors that an error names
# A Flax leaf's name -> its name in PyTorch, and whether to transpose it (a Dense kernel [in, out], a weight [out, in]).
LEAVES = {
    "kernel": ("weight", True),
    "embedding": ("weight", False),
    "scale": ("weight", False),
    "bias": ("bias", False),
}


def import_flax(config: ImportConfig) -> str:
    """Write the model to `out`, with Adam's state and the tokenizer if present; return a one-line summary.

    Raises:
        ConfigError: a file is missing, config.json describes no GPT-Neo, or `out` is not empty.
        CheckpointError: a file is damaged, or tensors are missing, unused or of another shape.
    """
    source = Path(config.flax)
    if not source.is_dir():  # a library would look for it on the hub
        raise ConfigError(f"flax={source}: no such folder")
    with new_folder(Path(config.out), "out") as out:
        model = load_flax_model(source)
        model.save_pretrained(out)
        done = f"{config.out}: {model.num_parameters():,} weights"
        if (source / OPT_STATE).exists():
            step, moments, dropped = load_adam(source, dict(model.named_parameters()))
            save_base_state(out, step, moments)
            done += f", Adam's state of step {step}"
            done += f" (the gradients of {dropped} further micro-steps are dropped)" if dropped else ""
        if any((source / name).exists() for name in TOKENIZER):
            load_tokenizer(source).save_pretrained(out)
            done += ", tokenizer"
        copy_file_modes(out)
    return done


def load_flax_model(folder: Path) -> GPTNeoForCausalLM:
    """Load the model of a checkpoint folder in fp32.

    Raises:
        ConfigError, CheckpointError: as in `import_flax`.
    """
    model = build_from_config(folder)
    model.generation_config = load_generation_config(folder, model)
    parameters = dict(model.named_parameters())  # without a tied head, which the file does not have either
    weights = torch_tensors(read_tree(folder / WEIGHTS), folder / WEIGHTS, parameters)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    model.eval()
    return model


def build_from_config(folder: Path) -> GPTNeoForCausalLM:
    """Build the model that config.json describes, in fp32 with random weights.

    Raises:
        ConfigError: there is no such file, or no GPT-Neo can be built from it.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if not isinstance(config, GPTNeoConfig):
            raise ConfigError(f"flax={folder}: config.json describes a {config.model_type} model, not GPT-Neo")
        config.dtype = torch.float32
        return GPTNeoForCausalLM(config)
    except (OSError, ValueError, RuntimeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"flax={folder}: no model can be built from config.json: {reason}") from error


def load_generation_config(folder: Path, model: GPTNeoForCausalLM) -> GenerationConfig:
    """The folder's generation settings; a checkpoint of 2021 has none, so they come from its model's configuration."""
    if not (folder / "generation_config.json").exists():
        return GenerationConfig.from_model_config(model.config)
    try:
        return GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"flax={folder}: unreadable generation_config.json: {first_line(error)}") from error


def load_adam(folder: Path, parameters: dict[str, Tensor]) -> tuple[int, dict[str, dict[str, Tensor]], int]:
    """Load Adam's state from a checkpoint folder.

    Returns:
        The updates made so far; each parameter's first and second moment, by torch's names; and the micro-steps already
        made towards the next update. The original dropped their accumulated gradients on resume.

    Raises:
        CheckpointError: as in `import_flax`, or the optimizer is not Adam.
    """
    path = folder / OPT_STATE
    tree = read_tree(path)
    adam = [node for node in tree_dictionaries(tree) if node.keys() == {"count", "mu", "nu"}]
    if len(adam) != 1:
        raise CheckpointError(
            f"{path} has {len(adam)} Adam states instead of one (another optimizer?). "
            f"Remove {OPT_STATE} to import the weights alone"
        )
    step = _count(adam[0]["count"], path)
    require_enough_micro_steps(folder / TRAINING_STATE, step)
    moments = {
        "exp_avg": torch_tensors(adam[0]["mu"], path, parameters),
        "exp_avg_sq": torch_tensors(adam[0]["nu"], path, parameters),
    }
    return step, moments, _count(tree.get("mini_step", 0), path)


def require_enough_micro_steps(path: Path, step: int) -> None:
    """Require that `training_state.json`, if present, counts at least as many micro-steps as there were updates.

    Raises:
        CheckpointError: it counts fewer, or has no step.
    """
    if not path.exists():
        return
    try:
        micro_step = json.loads(path.read_bytes())["step"]
        enough = micro_step >= step
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: has no readable step ({type(error).__name__})") from error
    if not enough:
        raise CheckpointError(
            f"{path}: micro-step {micro_step} is before update {step} of {OPT_STATE}; it is from another checkpoint"
        )


def torch_tensors(tree: Any, path: Path, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn a tree of Flax parameters into fp32 tensors with the names and shapes of `parameters`.

    Raises:
        CheckpointError: it names tensors that are missing, unused or of another shape.
    """
    found: dict[str, Tensor] = {}
    wrong = []
    for flax_name, array in tree_leaves(tree):
        *modules, leaf = flax_name
        if leaf not in LEAVES or not isinstance(array, np.ndarray) or array.dtype.kind != "f":
            wrong.append(f"{'/'.join(flax_name)} is not a tensor of GPT-Neo")
            continue
        kind, transposed = LEAVES[leaf]
        name = ".".join([*modules, kind])
        if name not in parameters or name in found:
            wrong.append(f"{'/'.join(flax_name)} is unused")
            continue
        array = array.T if transposed else array
        if array.shape != parameters[name].shape:
            wrong.append(f"{'/'.join(flax_name)} has shape {array.shape}, not {tuple(parameters[name].shape)}")
        found[name] = torch.tensor(np.ascontiguousarray(array), dtype=torch.float32)
    wrong += [f"{name} is missing" for name in parameters.keys() - found.keys()]
    if wrong:
        more = f" and {len(wrong) - LISTED} more" if len(wrong) > LISTED else ""
        raise CheckpointError(f"{path} does not fit config.json: {'; '.join(sorted(wrong)[:LISTED])}{more}")
    return found


def read_tree(path: Path) -> dict[str, Any]:
    """Read a file of `flax.serialization.to_bytes`: nested dictionaries with numpy arrays as leaves.

    Raises:
        ConfigError: it cannot be read.
        CheckpointError: it is damaged.
    """
    try:
        tree = restore_tree(msgpack.unpackb(path.read_bytes(), ext_hook=decode_extension))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, LookupError, RecursionError, msgpack.UnpackException) as error:
        raise CheckpointError(f"{path} is damaged: {first_line(error)}") from error
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path} is damaged: not a dictionary")
    return tree


def decode_extension(code: int, content: bytes) -> Any:
    """Decode a value of one of Flax's extension types; a numpy scalar becomes an array without dimensions."""
    if code == COMPLEX:
        return complex(*msgpack.unpackb(content))
    if code not in (NDARRAY, SCALAR):
        raise ValueError(f"extension type {code} is not one of Flax's")
    shape, name, values = msgpack.unpackb(content)
    if name == "bfloat16":  # the upper half of a float32; numpy does not know it
        bits = np.frombuffer(values, np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).reshape(shape)
    return np.frombuffer(values, np.dtype(name)).reshape(shape)


def restore_tree(node: Any) -> Any:
    """Join chunked arrays, and turn named tuples, as Flax before 0.3.5 wrote them, into dictionaries."""
    if not isinstance(node, dict):
        return node
    if CHUNKED in node:
        chunks, shape = (_in_order(node[key]) for key in ("chunks", "shape"))
        return np.concatenate(chunks).reshape(shape)
    if node.keys() == {"name", "fields", "values"}:
        fields, values = (_in_order(node[key]) for key in ("fields", "values"))
        node = dict(zip(fields, values, strict=True))
    return {key: restore_tree(value) for key, value in node.items()}


def tree_leaves(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every leaf of a tree with the keys that lead to it."""
    if not isinstance(node, dict):
        yield path or ("",), node
        return
    for key, value in node.items():
        yield from tree_leaves(value, (*path, str(key)))


def tree_dictionaries(node: Any) -> Iterator[dict[str, Any]]:
    """Yield every dictionary in a tree, including the root."""
    if isinstance(node, dict):
        yield node
        for value in node.values():
            yield from tree_dictionaries(value)


def _in_order(numbered: dict[str, Any]) -> list[Any]:
    """A sequence, which Flax writes as a dictionary with the keys "0", "1", ..."""
    return [numbered[str(index)] for index in range(len(numbered))]


def _count(value: Any, path: Path) -> int:
    try:
        return int(value)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: a counter is not a number") from error
