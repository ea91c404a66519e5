"""`clippy export`: turn a run's checkpoint into a Hugging Face folder for plain transformers, and publish it.

Promises: the checkpoint is verified before it is read; weights are consolidated from any ZeRO stage's fp32 master copy;
the folder appears only after it was loaded back and gave the same logits and the same tokens; only such a folder is
published, privately unless `public=true`, with a token read only from the environment.
"""

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.constants import REPOCARD_NAME
from huggingface_hub.errors import EntryNotFoundError
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPTNeoConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from clippy_train.config import ExportConfig, from_values, load
from clippy_train.errors import CheckpointError, ConfigError
from clippy_train.evaluate.results import read_results, weights_hash
from clippy_train.files import new_folder
from clippy_train.hf.card import CURVES, Facts, keep_edits, model_card
from clippy_train.hf.sections import draw_curves
from clippy_train.model.flops import count_parameters
from clippy_train.model.load import generation_config, save_model
from clippy_train.run.checkpoint import (
    Checkpoint,
    find_best,
    find_checkpoint,
)
from clippy_train.run.consolidate import WEIGHTS, consolidated_tensors, set_weights
from clippy_train.run.folder import (
    CONFIG,
    CORPUS,
    ENVIRONMENT,
    HF_FOLDER,
    METRICS,
    checkpoint_step,
)
from clippy_train.run.history import phases
from clippy_train.run.rows import read_rows
from clippy_train.tokenizer import load_tokenizer

TOKEN = "HF_TOKEN"
# Characters of one to four bytes, and whitespace of every width.
PROBE = "".join(map(chr, range(1, 0x250))) + "".join("\n" + " " * n + "\t" * (n % 5) for n in range(20)) + "é漢🙂"


def export_run(config: ExportConfig) -> str:
    """Write a run's model to `out`, and publish it if `push_to` is set; return a one-line summary.

    Raises:
        ConfigError: no such run or step, `out` is not empty, an evaluation is of another model, or the hub does not
            allow publishing under that name.
        CheckpointError: the run has no intact checkpoint (of that step).
    """
    run_dir = Path(config.run)
    if not (run_dir / CONFIG).is_file():
        raise ConfigError(f"run={config.run}: not a run folder (it has no {CONFIG})")
    evaluations = [read_results(path) for path in config.evaluations]
    hub = open_hub(config) if config.push_to else None
    checkpoint = select_checkpoint(run_dir, config.step)
    with new_folder(Path(config.out), "out") as out:
        write_model(run_dir / HF_FOLDER, checkpoint, config.dtype, out)
        weights = str(weights_hash(out))
        card = write_card(config, run_dir, checkpoint, [match_weights(each, weights) for each in evaluations], out)
        theirs = published_card(hub, config) if hub else ""
        if theirs:
            card.write_text(keep_edits(card.read_text(), theirs, config.license))
    if hub:
        publish_folder(hub, config)
    done = f"{config.out}: step {checkpoint.manifest.step} of {config.run}, verified"
    return f"{done}, published as {config.push_to}" if hub else done


def select_checkpoint(run_dir: Path, step: str | None) -> Checkpoint:
    """The last checkpoint, the best one (`step="best"`), or that of a step.

    Raises:
        ConfigError: `step` is not a number, `best` or None.
        CheckpointError: the run has no such intact checkpoint.
    """
    if step == "best":
        best = find_best(run_dir)
        if best is None:
            raise CheckpointError(f"run={run_dir} has no validated checkpoint: set step to a number")
        step = str(checkpoint_step(best))
    if step is not None and not re.fullmatch("[0-9]+", step):
        raise ConfigError(f"step={step}: must be a number, best, or null")
    checkpoint = find_checkpoint(run_dir, None if step is None else int(step))
    if checkpoint is None:
        raise CheckpointError(f"run={run_dir} has no checkpoint yet")
    return checkpoint


def write_model(description: Path, checkpoint: Checkpoint, dtype: str, out: Path) -> None:
    """Write model, tokenizer and generation settings to `out`, load them back and compare."""
    model, tokenizer = load_checkpoint_model(description, checkpoint), load_tokenizer(description)
    if dtype == "bf16":
        model = model.bfloat16()
    generation_config(model).pad_token_id = tokenizer.eos_token_id  # the default, but without a warning each time
    tokenizer.pad_token = tokenizer.eos_token
    save_model(model, tokenizer, out)
    describe_tokenizer(out)
    verify_folder(out, model, tokenizer)


def describe_tokenizer(folder: Path) -> None:
    """Write what `save_pretrained` does not: the class as transformers 4 names it, and sides that suit generation.

    Prompts are padded and cut on the left, since a completion continues their end. Transformers 5 accepts the name too.
    """
    path = folder / "tokenizer_config.json"
    described = {**json.loads(path.read_text()), "padding_side": "left", "truncation_side": "left"}
    if described["tokenizer_class"] == "TokenizersBackend":
        described["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(described, indent=2) + "\n")


def write_card(
    config: ExportConfig, run_dir: Path, checkpoint: Checkpoint, evaluations: list[dict[str, Any]], out: Path
) -> Path:
    """Write the card and its image of the curves; return the card's path."""
    rows = [row for row in read_rows(run_dir / METRICS) if row["step"] <= checkpoint.manifest.step]
    draw_curves(rows, out / CURVES)
    found, corpus = phases(run_dir, checkpoint.manifest.step), run_dir / CORPUS
    last = from_values(found[-1].settings) if found else load(run_dir / CONFIG)
    facts = Facts(
        config=last,
        history=found,
        environment=json.loads((run_dir / ENVIRONMENT).read_text()),
        manifest=checkpoint.manifest,
        parameters=count_parameters(last, GPTNeoConfig.from_pretrained(run_dir / HF_FOLDER).vocab_size),
        rows=rows,
        corpus=json.loads(corpus.read_text()) if corpus.exists() else {},
        evaluations=evaluations,
        license=config.license,
        place=config.push_to or Path(config.out).name,
    )
    card = out / REPOCARD_NAME
    card.write_text(model_card(facts))
    return card


def load_checkpoint_model(description: Path, checkpoint: Checkpoint) -> PreTrainedModel:
    """Load a checkpoint's model in fp32, its head tied if the configuration says so.

    Args:
        description: folder with the model's Hugging Face configuration.

    Raises:
        CheckpointError: the checkpoint is of another model than `description`.
    """
    config = GPTNeoConfig.from_pretrained(description)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config = GenerationConfig.from_pretrained(description)
    set_weights(model, consolidated_tensors(checkpoint, description, (WEIGHTS,))[WEIGHTS])
    model.eval()
    return model


@torch.no_grad()
def verify_folder(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Load a folder with plain transformers and compare its logits and tokens with those of model and tokenizer.

    Raises:
        CheckpointError: they differ, or the tokenizer does not reproduce every text.
    """
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype)
    loaded.eval()
    length = min(64, model.config.max_position_embeddings)
    ids = torch.arange(length)[None] % model.config.vocab_size
    if not torch.equal(loaded(ids).logits, model(ids).logits):
        raise CheckpointError(f"{folder}: the exported model's logits differ from the checkpoint's")
    again = load_tokenizer(folder)
    encoded = again(PROBE)["input_ids"]
    if encoded != tokenizer(PROBE)["input_ids"] or again.decode(encoded, skip_special_tokens=True) != PROBE:
        raise CheckpointError(f"{folder}: the exported tokenizer's tokens differ from the run's, or it loses text")


def match_weights(results: dict[str, Any], weights: str) -> dict[str, Any]:
    """Return an evaluation with the name of the model that has these weights as `model` in its `about`.

    Raises:
        ConfigError: no model of the evaluation has these weights.
    """
    about = results["about"]
    names = [name for name, found in about["models"].items() if found == weights]
    if not names:
        raise ConfigError(
            f"evaluations: {about['command']} was not run on these weights; export first, evaluate the exported "
            "folder, then export again with the results"
        )
    return {**results, "about": {**about, "model": names[0]}}


def published_card(hub: HfApi, config: ExportConfig) -> str:
    """The card that the repository has; empty if it has none.

    Raises:
        ConfigError: the hub refuses.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            return Path(hub.hf_hub_download(str(config.push_to), REPOCARD_NAME, local_dir=folder)).read_text()
        except EntryNotFoundError:
            return ""
        except Exception as error:
            raise _refused(config, hub, error) from None


def publish_folder(hub: HfApi, config: ExportConfig) -> None:
    """Upload the exported folder.

    Raises:
        ConfigError: the hub rejects it; the folder stays.
    """
    try:
        hub.upload_folder(repo_id=str(config.push_to), folder_path=config.out, commit_message="Upload model")
    except Exception as error:  # errors of its HTTP client share no base class
        raise ConfigError(f"{config.out} is complete, but was not published: {_describe_error(error, hub)}") from None


def _describe_error(error: Exception, hub: HfApi) -> str:
    """An error of the hub in one line, without the token; what it finds wrong with a card, in full."""
    lines = str(error).strip().splitlines()
    return " ".join(lines if isinstance(error, ValueError) else lines[:1]).replace(str(hub.token), "***")


def _refused(config: ExportConfig, hub: HfApi, error: Exception) -> ConfigError:
    return ConfigError(f"push_to={config.push_to}: the hub refuses: {_describe_error(error, hub)}")


def open_hub(config: ExportConfig) -> HfApi:
    """Connect to the hub, create the repository if necessary, and check its visibility.

    Raises:
        ConfigError: there is no token, the hub refuses, or the repository is public without `public=true`.
    """
    token = os.environ.get(TOKEN)
    if not token:
        raise ConfigError(f"push_to={config.push_to} needs a token in the environment variable {TOKEN}")
    hub = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)
    try:
        hub.create_repo(str(config.push_to), private=not config.public, exist_ok=True)
        is_private = hub.model_info(str(config.push_to)).private
    except Exception as error:
        raise _refused(config, hub, error) from None
    if not config.public and not is_private:
        raise ConfigError(f"push_to={config.push_to} exists and is public: set public=true to publish there")
    return hub
