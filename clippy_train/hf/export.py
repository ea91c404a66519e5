"""`clippy export`: a checkpoint of a run -> a Hugging Face folder that plain transformers loads, and its publication.

Promises: the checkpoint is verified before it is read; weights are consolidated from any ZeRO stage's fp32 master copy;
the folder appears only after it was loaded back and gave the same logits and the same tokens; only such a folder is
published, privately unless `public=true`, with a token from the environment alone.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from clippy_train.config import ExportConfig, load
from clippy_train.errors import CheckpointError, ConfigError
from clippy_train.evaluate.results import read_results, weights_hash
from clippy_train.files import new_folder
from clippy_train.hf.card import CURVES, draw_curves, model_card
from clippy_train.model.load import save_model
from clippy_train.run.checkpoint import (
    Checkpoint,
    find_best,
    find_checkpoint,
)
from clippy_train.run.consolidate import WEIGHTS, consolidated_tensors, set_weights
from clippy_train.run.folder import (
    CONFIG,
    ENVIRONMENT,
    HF_FOLDER,
    METRICS,
    checkpoint_step,
)
from clippy_train.run.rows import read_rows
from clippy_train.tokenizer import load_tokenizer

TOKEN = "HF_TOKEN"
# Every kind of byte, white space of every width, and what looks like a special token.
PROBE = "".join(map(chr, range(1, 0x250))) + "".join("\n" + " " * n + "\t" * (n % 5) for n in range(20)) + "é漢🙂"


def export(config: ExportConfig) -> str:
    """Write the model of a run to `out`, publish it if `push_to` says so; returns what was done in one line.

    Raises:
        ConfigError: no such run or step, `out` is not empty, an evaluation is of another model, or nothing can be
            published under that name.
        CheckpointError: the run has no intact checkpoint (of that step).
    """
    run_dir = Path(config.run)
    if not (run_dir / CONFIG).is_file():
        raise ConfigError(f"run={config.run}: not a run folder (it has no {CONFIG})")
    evaluations = [read_results(path) for path in config.evaluations]
    hub = open_hub(config) if config.push_to else None
    checkpoint = chosen_checkpoint(run_dir, config.step)
    with new_folder(Path(config.out), "out") as out:
        write_model(run_dir / HF_FOLDER, checkpoint, config.dtype, out)
        weights = str(weights_hash(out))
        write_card(config, run_dir, checkpoint, [belonging(each, weights) for each in evaluations], out)
    if hub:
        publish(hub, config)
    done = f"{config.out}: step {checkpoint.manifest.step} of {config.run}, verified"
    return f"{done}, published as {config.push_to}" if hub else done


def chosen_checkpoint(run_dir: Path, step: str | None) -> Checkpoint:
    """The last checkpoint, the best, or that of a step."""
    if step == "best":
        best = find_best(run_dir)
        if best is None:
            raise CheckpointError(f"run={run_dir} has no checkpoint with a validation: choose a step")
        step = str(checkpoint_step(best))
    if step is not None and not step.isdigit():
        raise ConfigError(f"step={step}: must be a number, best, or null")
    checkpoint = find_checkpoint(run_dir, None if step is None else int(step))
    if checkpoint is None:
        raise CheckpointError(f"run={run_dir} has no checkpoint yet")
    return checkpoint


def write_model(description: Path, checkpoint: Checkpoint, dtype: str, out: Path) -> None:
    """Model, tokenizer and generation settings, read back and compared."""
    model, tokenizer = load_checkpoint_model(description, checkpoint), load_tokenizer(description)
    if dtype == "bf16":
        model = model.to(torch.bfloat16)
    model.generation_config.pad_token_id = tokenizer.eos_token_id  # or each generation would warn that it takes it
    save_model(model, tokenizer, out)
    name_known_class(out)
    verify(out, model, tokenizer)


def name_known_class(folder: Path) -> None:
    """Call the general tokenizer class by the name that transformers 4 knows it by, and 5 still does."""
    path = folder / "tokenizer_config.json"
    described = json.loads(path.read_text())
    if described["tokenizer_class"] == "TokenizersBackend":
        path.write_text(json.dumps({**described, "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")


def write_card(
    config: ExportConfig, run_dir: Path, checkpoint: Checkpoint, evaluations: list[dict[str, Any]], out: Path
) -> None:
    """README.md and the curves that it shows."""
    rows = [row for row in read_rows(run_dir / METRICS) if row["step"] <= checkpoint.manifest.step]
    draw_curves(rows, out / CURVES)
    environment = json.loads((run_dir / ENVIRONMENT).read_text())
    card = model_card(
        load(run_dir / CONFIG), environment, checkpoint.manifest, rows, evaluations, config.push_to or config.out
    )
    (out / "README.md").write_text(card)


def load_checkpoint_model(description: Path, checkpoint: Checkpoint) -> Any:
    """The model of a checkpoint in fp32, tied as its configuration says.

    Raises:
        CheckpointError: the checkpoint is not of the model that `description` describes.
    """
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(description), dtype=torch.float32)
    model.generation_config = GenerationConfig.from_pretrained(description)
    set_weights(model, consolidated_tensors(checkpoint, description, (WEIGHTS,))[WEIGHTS])
    return model.eval()


@torch.no_grad()
def verify(folder: Path, model: Any, tokenizer: Any) -> None:
    """Load a folder with plain transformers and compare its logits and tokens with those of model and tokenizer.

    Raises:
        CheckpointError: they differ.
    """
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype).eval()
    length = min(64, model.config.max_position_embeddings)
    ids = torch.arange(length)[None] % model.config.vocab_size
    if not torch.equal(loaded(ids).logits, model(ids).logits):
        raise CheckpointError(f"{folder}: the exported model gives other logits than the checkpoint")
    again = load_tokenizer(folder)
    encoded = again(PROBE)["input_ids"]
    if encoded != tokenizer(PROBE)["input_ids"] or again.decode(encoded, skip_special_tokens=True) != PROBE:
        raise CheckpointError(f"{folder}: the exported tokenizer gives other tokens than the run's, or loses text")


def belonging(results: dict[str, Any], weights: str) -> dict[str, Any]:
    """An evaluation with the name of this model as `model` in its `about`.

    Raises:
        ConfigError: none of its models has these weights.
    """
    about = results["about"]
    names = [name for name, found in about["models"].items() if found == weights]
    if not names:
        raise ConfigError(
            f"evaluations: {about['command']} was not run on these weights; export first, evaluate that folder, and "
            "export again with the results"
        )
    return {**results, "about": {**about, "model": names[0]}}


def publish(hub: Any, config: ExportConfig) -> None:
    """Raises ConfigError if the hub does not take the folder, which stays as it is."""
    try:
        hub.upload_folder(repo_id=str(config.push_to), folder_path=config.out, commit_message="Upload model")
    except Exception as error:  # those of its HTTP client have no base class of its own
        raise ConfigError(f"{config.out} is complete, but was not published: {_refusal(error, hub)}") from None


def _refusal(error: Exception, hub: Any) -> str:
    """An error of the hub in one line, without the token."""
    return str(error).strip().splitlines()[0].replace(str(hub.token), "***")


def open_hub(config: ExportConfig) -> Any:
    """A connection to a repository of the hub that exists and is as private as it must be.

    Raises:
        ConfigError: there is no token, the hub refuses, or the repository is public and was not meant to be.
    """
    from huggingface_hub import HfApi

    token = os.environ.get(TOKEN)
    if not token:
        raise ConfigError(f"push_to={config.push_to} needs a token in the environment variable {TOKEN}")
    hub = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)
    try:
        hub.create_repo(str(config.push_to), private=not config.public, exist_ok=True)
        is_private = hub.model_info(str(config.push_to)).private
    except Exception as error:
        raise ConfigError(f"push_to={config.push_to}: the hub refuses: {_refusal(error, hub)}") from None
    if not config.public and not is_private:
        raise ConfigError(f"push_to={config.push_to} exists and is public: set public=true if you mean it")
    return hub
