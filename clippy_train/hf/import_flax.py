"""`clippy import`: a checkpoint folder of the original Flax training script -> a Hugging Face folder.

Promises: files are read with msgpack and numpy alone, so nothing in them is executed; every tensor is used exactly once
and has the shape that config.json asks for; the folder appears complete or not at all. Costs about twice the largest
file, and the model, in memory.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, GPTNeoConfig, GPTNeoForCausalLM

from clippy_train.config import ImportConfig
from clippy_train.errors import ConfigError, first_line
from clippy_train.files import new_folder
from clippy_train.model.load import share_tensors
from clippy_train.run.moments import save_base_state
from clippy_train.tokenizer import load_tokenizer

WEIGHTS, OPT_STATE, TRAINING_STATE = "flax_model.msgpack", "opt_state.msgpack", "training_state.json"
TOKENIZER = ("tokenizer.json", "vocab.json")  # either makes a folder one of a tokenizer
NDARRAY, COMPLEX, SCALAR = 1, 2, 3  # Flax's msgpack extension types
CHUNKED = "__msgpack_chunked_array__"  # marks an array that Flax cut into pieces
LISTED = 5  # tensors that an error names
# What a Flax leaf is called -> in PyTorch, and whether a Dense kernel [in, out] becomes a weight [out, in].
LEAVES = {
    "kernel": ("weight", True),
    "embedding": ("weight", False),
    "scale": ("weight", False),
    "bias": ("bias", False),
}


def import_flax(config: ImportConfig) -> str:
    """Write the model (and Adam's state and the tokenizer, where there are any) to `out`; what was done in one line.

    Raises:
        ConfigError: a file is missing or damaged, tensors are missing, left over or of another shape, or `out` is not
            empty.
    """
    source = Path(config.flax)
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
        share_tensors(out)
    return done


def load_flax_model(folder: Path) -> GPTNeoForCausalLM:
    """The model of a checkpoint folder in fp32.

    Raises:
        ConfigError: as `import_flax`.
    """
    model = described_model(folder)
    model.generation_config = load_generation_config(folder, model)
    parameters = dict(model.named_parameters())  # a tied head is not among them, nor in the file
    weights = torch_tensors(read_tree(folder / WEIGHTS), folder / WEIGHTS, parameters)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    return model.eval()


def described_model(folder: Path) -> GPTNeoForCausalLM:
    """The model that config.json describes, in fp32 with random weights.

    Raises:
        ConfigError: there is no such file, or it describes no GPT-Neo that can be built.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
        if not isinstance(config, GPTNeoConfig):
            raise ConfigError(f"flax={folder}: config.json is of a {config.model_type} model, not GPT-Neo")
        config.dtype = torch.float32
        return GPTNeoForCausalLM(config)
    except (OSError, ValueError, RuntimeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"flax={folder}: no model can be built from config.json: {reason}") from error


def load_generation_config(folder: Path, model: GPTNeoForCausalLM) -> GenerationConfig:
    """The folder's own; a checkpoint of 2021 has none, and generates by its model's configuration."""
    if not (folder / "generation_config.json").exists():
        return GenerationConfig.from_model_config(model.config)
    try:
        return GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"flax={folder}: unreadable generation_config.json: {first_line(error)}") from error


def load_adam(folder: Path, parameters: dict[str, Tensor]) -> tuple[int, dict[str, dict[str, Tensor]], int]:
    """Adam's state from the optimizer state of a checkpoint folder.

    Returns:
        Updates made so far; the first and second moment of each parameter, by torch's names; and the micro-steps that
        were made of the next update. Their gradients belong to no update yet; the original dropped them on resuming.

    Raises:
        ConfigError: as `import_flax`, or the optimizer is not Adam.
    """
    path = folder / OPT_STATE
    tree = read_tree(path)
    adam = [node for node in dictionaries(tree) if node.keys() == {"count", "mu", "nu"}]
    if len(adam) != 1:
        raise ConfigError(
            f"{path}: holds {len(adam)} states of Adam, not one (was another optimizer used?). "
            f"Without {OPT_STATE}, the weights can be imported alone"
        )
    step = _count(adam[0]["count"], path)
    require_later(folder / TRAINING_STATE, step)
    moments = {
        "exp_avg": torch_tensors(adam[0]["mu"], path, parameters),
        "exp_avg_sq": torch_tensors(adam[0]["nu"], path, parameters),
    }
    return step, moments, _count(tree.get("mini_step", 0), path)


def require_later(path: Path, step: int) -> None:
    """Raises ConfigError if `training_state.json` counts fewer micro-steps than there were updates."""
    if not path.exists():
        return
    try:
        micro_step = json.loads(path.read_bytes())["step"]
        belongs = micro_step >= step
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path}: has no readable step ({type(error).__name__})") from error
    if not belongs:
        raise ConfigError(
            f"{path}: micro-step {micro_step} is before update {step} of {OPT_STATE}: another checkpoint's"
        )


def torch_tensors(tree: Any, path: Path, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """A tree of Flax's parameters as fp32 tensors by PyTorch's names: exactly those of `parameters`, in their shapes.

    Raises:
        ConfigError: naming what is missing, left over or of another shape.
    """
    found: dict[str, Tensor] = {}
    wrong = []
    for flax_name, array in leaves(tree):
        *modules, leaf = flax_name
        if leaf not in LEAVES or not isinstance(array, np.ndarray) or array.dtype.kind != "f":
            wrong.append(f"{'/'.join(flax_name)} is no tensor of a GPT-Neo")
            continue
        kind, transposed = LEAVES[leaf]
        name = ".".join([*modules, kind])
        if name not in parameters or name in found:
            wrong.append(f"{'/'.join(flax_name)} is left over")
            continue
        array = array.T if transposed else array
        if array.shape != parameters[name].shape:
            wrong.append(f"{'/'.join(flax_name)} becomes {array.shape}, not {tuple(parameters[name].shape)}")
        found[name] = torch.tensor(np.ascontiguousarray(array), dtype=torch.float32)
    wrong += [f"{name} is missing" for name in parameters.keys() - found.keys()]
    if wrong:
        more = f" and {len(wrong) - LISTED} more" if len(wrong) > LISTED else ""
        raise ConfigError(f"{path} does not fit config.json: {'; '.join(sorted(wrong)[:LISTED])}{more}")
    return found


def read_tree(path: Path) -> dict[str, Any]:
    """What `flax.serialization.to_bytes` wrote: nested dictionaries with numpy arrays as leaves.

    Raises:
        ConfigError: no such file, or it is damaged.
    """
    try:
        tree = whole(msgpack.unpackb(path.read_bytes(), ext_hook=decoded))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, LookupError, RecursionError, msgpack.UnpackException) as error:
        raise ConfigError(f"{path} is damaged: {first_line(error)}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} is damaged: no dictionary")
    return tree


def decoded(code: int, content: bytes) -> Any:
    """A value of one of Flax's extension types; a numpy scalar comes as an array without dimensions."""
    if code == COMPLEX:
        return complex(*msgpack.unpackb(content))
    if code not in (NDARRAY, SCALAR):
        raise ValueError(f"extension type {code} is not Flax's")
    shape, name, values = msgpack.unpackb(content)
    if name == "bfloat16":  # the upper half of a float32; numpy does not know it
        bits = np.frombuffer(values, np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).reshape(shape)
    return np.frombuffer(values, np.dtype(name)).reshape(shape)


def whole(node: Any) -> Any:
    """A tree with chunked arrays put together, and named tuples as Flax before 0.3.5 wrote them made dictionaries."""
    if not isinstance(node, dict):
        return node
    if CHUNKED in node:
        chunks, shape = (_in_order(node[key]) for key in ("chunks", "shape"))
        return np.concatenate(chunks).reshape(shape)
    if node.keys() == {"name", "fields", "values"}:
        fields, values = (_in_order(node[key]) for key in ("fields", "values"))
        node = dict(zip(fields, values, strict=True))
    return {key: whole(value) for key, value in node.items()}


def leaves(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every leaf of a tree with the keys that lead to it."""
    if not isinstance(node, dict):
        yield path or ("",), node
        return
    for key, value in node.items():
        yield from leaves(value, (*path, str(key)))


def dictionaries(node: Any) -> Iterator[dict[str, Any]]:
    """Every dictionary in a tree, itself included."""
    if isinstance(node, dict):
        yield node
        for value in node.values():
            yield from dictionaries(value)


def _in_order(numbered: dict[str, Any]) -> list[Any]:
    """A sequence as Flax writes it: a dictionary with the keys "0", "1", ..."""
    return [numbered[str(index)] for index in range(len(numbered))]


def _count(value: Any, path: Path) -> int:
    try:
        return int(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path} is damaged: a counter is no number") from error
