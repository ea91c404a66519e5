"""A run resumes with another world size, strategy or micro-batch: same data, weights and moments."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from support.runs import Runs, weights
from transformers import AutoConfig, AutoModelForCausalLM

from clippy_train.files import STAGING
from clippy_train.optim import parameter_groups
from clippy_train.run.checkpoint import open_checkpoint
from clippy_train.run.consolidate import WEIGHTS, consolidated_tensors
from clippy_train.run.folder import (
    STATE,
    checkpoint_folder,
    checkpoint_folders,
)
from clippy_train.run.moments import MOMENTS

STEPS = int(os.environ.get("CLIPPY_ELASTIC_STEPS", "2"))  # between two changes of layout; `make elastic` sets 50
LAYOUTS = [("zero3", 4, 2), ("zero2", 2, 4)]  # strategy, ranks, micro-batch; the run starts with `single`, 1 and 2
if STEPS > 2:
    LAYOUTS += [("zero1", 4, 1), ("zero3", 1, 8), ("zero1", 2, 2), ("zero3", 2, 2), ("zero1", 1, 2), ("zero2", 4, 2)]
    LAYOUTS += [("ddp", 2, 2), ("zero2", 1, 4), ("single", 1, 2)]
END = STEPS * (1 + len(LAYOUTS))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, tiny_tokenizer: Path) -> Runs:
    made = Runs(tmp_path_factory.mktemp("elastic"), tiny_corpus, tiny_tokenizer)
    made.settings += [
        "trainer.precision=fp32", "trainer.audit=true", f"checkpoint.every_steps={STEPS}", "checkpoint.keep_last=100",
        f"trainer.val_every_steps={2 * STEPS}", f"optim.decay_steps={END}",
    ]  # fmt: skip
    return made


@pytest.fixture(scope="module")
def reference(runs: Runs) -> str:
    """A run on one rank from the first step to the last."""
    runs.train("reference", "strategy=single", "trainer.devices=1", f"trainer.max_steps={END}")
    return "reference"


@pytest.fixture(scope="module")
def resharded(runs: Runs, reference: str) -> str:
    """The same run, resharded to one layout after another."""
    shutil.copytree(runs.folder(reference), runs.folder("resharded"))
    for path in checkpoint_folders(runs.folder("resharded"))[:-1]:
        shutil.rmtree(path)
    for number, (strategy, ranks, micro_batch) in enumerate(LAYOUTS, 2):
        said = runs.train(
            "resharded", f"strategy={strategy}", f"trainer.devices={ranks}", f"trainer.micro_batch_size={micro_batch}",
            f"trainer.max_steps={number * STEPS}",
        ).stdout  # fmt: skip
        assert f"from step {(number - 1) * STEPS}" in said
        assert "resharding: " in said
    return "resharded"


def test_resharding_changes_neither_data_nor_losses_nor_validation(runs: Runs, reference: str, resharded: str) -> None:
    expected, found = runs.rows(reference), runs.rows(resharded)
    assert [row["step"] for row in found] == list(range(1, END + 1))
    for key in ("data/digest", "data/documents", "tokens"):
        assert [row[key] for row in found] == [row[key] for row in expected]
    for key in ("train/loss", "train/lr", "train/grad_norm"):
        assert [row[key] for row in found] == pytest.approx([row[key] for row in expected], rel=1e-3)
    validations = {row["step"]: row["val/loss"] for row in runs.rows(reference, "val/loss")}
    validated = {row["step"]: row["val/loss"] for row in runs.rows(resharded, "val/loss")}
    assert {step: validated[step] for step in validations} == pytest.approx(validations, rel=1e-3)


def test_resharding_changes_neither_weights_nor_moments(runs: Runs, reference: str, resharded: str) -> None:
    """The reference is torch's own file of one rank, whose optimizer state holds whole tensors in group order."""
    description = runs.folder(reference) / "hf"
    kept = torch.load(checkpoint_folder(runs.folder(reference), END) / STATE, weights_only=True)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(description))
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    order = [name_of[id(parameter)] for group in parameter_groups(model) for parameter in group]
    state = kept["optimizer_states"][0]["state"]
    assert {float(each["step"]) for each in state.values()} == {END}

    found = consolidated_tensors(
        open_checkpoint(checkpoint_folder(runs.folder(resharded), END)), description, (WEIGHTS, *MOMENTS)
    )
    for kind, tensors in found.items():
        assert tensors.keys() == set(order)
        for index, name in enumerate(order):
            expected = kept["state_dict"][f"model.{name}"] if kind == WEIGHTS else state[index][kind]
            scale = expected.abs().max().item()
            torch.testing.assert_close(tensors[name], expected, rtol=1e-3, atol=1e-3 * scale, msg=f"{kind} of {name}")


def test_fp32_weights_survive_a_change_to_bf16_bit_for_bit(runs: Runs, resharded: str) -> None:
    """With learning rate 0 they do not change; DeepSpeed alone would round them to bf16."""
    before = weights(runs.folder(resharded))
    runs.train(
        resharded, "trainer.precision=bf16", "strategy=zero1", "trainer.devices=1", "trainer.micro_batch_size=2",
        "optim.lr=0", f"trainer.max_steps={END + 1}",
    )  # fmt: skip
    after = weights(runs.folder(resharded))
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in before.values())
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    left = [path.name for path in (runs.folder(resharded) / "checkpoints").iterdir() if path.name.endswith(STAGING)]
    assert not left  # the consolidated copy that the run started from
