"""Settings that change between two attempts of a run: applied from the next update on, or refused."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param
from lightning.pytorch.strategies import DeepSpeedStrategy
from support.distributed import run_distributed
from support.fits import SETTINGS, SINGLE, run_rank
from support.runs import Runs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata
from torch import nn

from clippy_train.config import ExportConfig, TrainConfig, as_yaml, keys, save
from clippy_train.errors import ConfigError
from clippy_train.hf.export import write_card
from clippy_train.model.build import build_model
from clippy_train.optim import lr_at, parameter_groups
from clippy_train.run.changes import APPLIED, MOVED, ORDER, REFUSED, STARTED, changes, refusal
from clippy_train.run.checkpoint import find_checkpoint, open_checkpoint
from clippy_train.run.consolidate import consolidate
from clippy_train.run.folder import CONFIG, HF_FOLDER, HISTORY, STATE, checkpoint_folder
from clippy_train.run.history import changed, phases, record
from clippy_train.run.identity import data_identity
from clippy_train.run.moments import MOMENTS
from clippy_train.run.start import Start
from clippy_train.train.module import code_lm


def test_every_key_has_one_class() -> None:
    refused = [name for name, _ in keys(TrainConfig) if refusal(name)]
    assert sorted([*refused, *MOVED, *STARTED, *APPLIED]) == sorted(name for name, _ in keys(TrainConfig))


@pytest.mark.slow
def test_what_the_order_of_the_data_depends_on_is_refused(train_config: Callable[..., TrainConfig]) -> None:
    known = {name for name, why in REFUSED.items() if why == ORDER}
    assert data_identity(train_config(), []).keys() - {"corpus fingerprint"} == known


def test_a_change_is_reported_with_what_becomes_of_it(train_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    config = train_config("optim.lr=1e-3", "logger.sample_prompts=['def f():']")
    (missing,) = changes(tmp_path, config, 7)
    assert missing.endswith("is missing: settings are not compared")
    save(config, tmp_path / CONFIG)
    assert changes(tmp_path, config, 7) == []
    moved = train_config("optim.lr=1e-4", "logger.sample_prompts=[]", "tokenizer.base=b")
    assert changes(tmp_path, moved, 7) == [
        f"tokenizer.base was {config.tokenizer.base}, is b: applied from step 8 on, where the content is the same",
        "optim.lr was 0.001, is 0.0001: applied from step 8 on",
        'logger.sample_prompts was ["def f():"], is []: applied from step 8 on',
    ]


@pytest.mark.slow
def test_every_refused_change_is_named_at_once(train_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    save(train_config(), tmp_path / CONFIG)
    with pytest.raises(ConfigError) as refused:
        changes(tmp_path, train_config("seed=7", "data.filter.min_stars=3", "model.base=other", "optim.lr=1"), 7)
    assert str(refused.value).splitlines() == [
        "model.base was null, is other: refused: it would be another model",
        "data.filter.min_stars was null, is 3: refused: it would be another order of the data",
        "seed was 42, is 7: refused: it would be another order of the data",
        f"restore what {tmp_path / CONFIG} has, or start a new run with another run.name",
    ]


OLD = {
    "lr": 1e-2, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "schedule": "cosine",
    "warmup_steps": 1, "stable_steps": None, "decay_steps": 8, "min_lr_ratio": 0.1, "grad_clip": 1.0,
}  # fmt: skip
NEW = {
    "lr": 3e-2, "betas": [0.5, 0.6], "eps": 1e-2, "weight_decay": 2.0, "schedule": "wsd",
    "warmup_steps": 0, "stable_steps": 1, "decay_steps": 4, "min_lr_ratio": 0.5, "grad_clip": 0.1,
}  # fmt: skip
Arrays = dict[str, np.ndarray]  # of each weight by its name; tensors do not outlive the process that sends them


class Look(pl.Callback):
    """Keeps a step's gradients before clipping, and the weights at the end."""

    def __init__(self) -> None:
        self.gradients: Arrays = {}
        self.weights: Arrays = {}

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        for name, each in code_lm(pl_module).model.named_parameters():
            if each.grad is not None:
                self.gradients[name] = each.grad.float().numpy().copy()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        whole = safe_get_full_fp32_param if isinstance(trainer.strategy, DeepSpeedStrategy) else torch.clone
        for name, each in code_lm(pl_module).model.named_parameters():
            self.weights[name] = whole(each).detach().numpy().copy()


def trained(config: TrainConfig, start: Start) -> tuple[Arrays, Arrays]:
    """The gradients of the last step and the weights after it, of a rank; runs in a process of its own."""
    look = Look()
    run_rank(config, start, look)
    return look.gradients, look.weights


class Update(NamedTuple):
    """The third update of a run on one rank, of each weight by its name."""

    run_dir: Path
    gradients: Arrays
    weights: Arrays  # before the update
    moments: dict[str, Arrays]  # before the update
    decayed: set[str]

    def closed_form(self, settings: dict[str, Any]) -> np.ndarray:
        """All weights after the update with these settings, in float64."""
        optim: Any = SimpleNamespace(**settings)
        gradients = {name: each.astype(np.float64) for name, each in self.gradients.items()}
        norm = np.linalg.norm(flat(gradients))
        lr, (beta1, beta2) = lr_at(2, optim), optim.betas
        found = {}
        for name, gradient in gradients.items():
            gradient = gradient * min(1.0, optim.grad_clip / norm)
            mean = beta1 * self.moments[name]["exp_avg"] + (1 - beta1) * gradient
            square = beta2 * self.moments[name]["exp_avg_sq"] + (1 - beta2) * gradient**2
            step = mean / (1 - beta1**3) / (np.sqrt(square / (1 - beta2**3)) + optim.eps)
            decay = optim.weight_decay if name in self.decayed else 0.0
            found[name] = self.weights[name] - lr * (step + decay * self.weights[name])
        return flat(found)


def flat(arrays: Arrays) -> np.ndarray:
    return np.concatenate([arrays[name].ravel() for name in sorted(arrays)])


@pytest.fixture(scope="module")
def config(
    train_config: Callable[..., TrainConfig], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., TrainConfig]:
    root = tmp_path_factory.mktemp("changes")

    def make(name: str, steps: int, optim: dict[str, Any], *overrides: str) -> TrainConfig:
        made = train_config(
            *SETTINGS, "trainer.audit=false", "trainer.val_every_steps=99", "checkpoint.every_steps=99",
            f"run.root={root}", f"run.name={name}", f"trainer.max_steps={steps}",
            *(f"optim.{key}={as_yaml(value)}" for key, value in optim.items()), *overrides,
        )  # fmt: skip
        made.run_dir.mkdir(exist_ok=True)
        return made

    return make


@pytest.fixture(scope="module")
def update(config: Callable[..., TrainConfig]) -> Update:
    first, then = (config(f"single-{steps}", steps, OLD, *SINGLE) for steps in (2, 3))
    checkpoint = checkpoint_folder(first.run_dir, 2)
    ((gradients, after),) = run_distributed(lambda: (trained(first, Start()), trained(then, Start(checkpoint)))[1], 1)
    state = torch.load(checkpoint / STATE, weights_only=True)
    model, _ = build_model(first)
    decayed = {name_of(model, each) for each in parameter_groups(model)[0]}
    order = [name_of(model, each) for group in parameter_groups(model) for each in group]
    weights = {name: state["state_dict"][f"model.{name}"].numpy() for name in order}
    moments = {
        name: {kind: state["optimizer_states"][0]["state"][index][kind].numpy() for kind in MOMENTS}
        for index, name in enumerate(order)
    }
    made = Update(first.run_dir, gradients, weights, moments, decayed)
    np.testing.assert_allclose(flat(after), made.closed_form(OLD), rtol=0, atol=1e-6)
    return made


def name_of(model: nn.Module, parameter: nn.Parameter) -> str:
    (found,) = (name for name, each in model.named_parameters() if each is parameter)
    return found


@pytest.mark.processes
@pytest.mark.parametrize("resharded", [False, True], ids=["native", "resharded"])
@pytest.mark.parametrize("strategy", ["single", "ddp", "zero1", "zero2", "zero3"])
def test_the_first_update_after_a_resume_has_the_settings_of_its_attempt(
    config: Callable[..., TrainConfig], update: Update, strategy: str, resharded: bool
) -> None:
    ranks = 1 if strategy == "single" else 2
    layout = [f"strategy={strategy}", f"trainer.devices={ranks}", f"trainer.micro_batch_size={2 // ranks}"]
    name = f"{strategy}-{resharded}"
    first, then = config(name, 2, OLD, *layout), config(f"{name}-resumed", 3, NEW, *layout)
    start = Start(checkpoint_folder(first.run_dir, 2))
    if resharded:
        source = find_checkpoint(update.run_dir)
        assert source
        start = Start(source.path, consolidate(source, update.run_dir / HF_FOLDER, then.run_dir))

    def both() -> tuple[Arrays, Arrays]:
        if not resharded:
            trained(first, Start())
        return trained(then, start)

    found = flat(run_distributed(both, ranks)[0][1])
    before = flat(update.weights)

    def error(settings: dict[str, Any]) -> float:
        """Of the update, as a share of it."""
        expected = update.closed_form(settings)
        return float(np.linalg.norm(found - expected) / np.linalg.norm(expected - before))

    assert error(NEW) < 1e-4
    for key, value in OLD.items():
        assert error({**NEW, key: value}) > 1e-2, f"the update would be the same with the old optim.{key}"


@pytest.mark.processes
def test_the_first_update_in_bf16_has_them_too(config: Callable[..., TrainConfig]) -> None:
    """DeepSpeed has another optimizer there. Settings with which no weight moves, whatever its gradients."""
    still = {**OLD, "betas": [0, 0], "eps": 1.0, "weight_decay": 0.0, "grad_clip": 1e-9}
    layout = ["trainer.precision=bf16", "strategy=zero1", "trainer.devices=2", "trainer.micro_batch_size=1"]
    first, then = config("bf16", 2, OLD, *layout), config("bf16-resumed", 3, still, *layout)
    start = Start(checkpoint_folder(first.run_dir, 2))
    before, after = run_distributed(lambda: [flat(trained(first, Start())[1]), flat(trained(then, start)[1])], 2)[0]
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-8)


def test_the_history_says_with_which_settings_each_step_was_made(
    train_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    run_dir, path = tmp_path, tmp_path / HISTORY
    low, high = train_config("optim.lr=1e-4"), train_config("optim.lr=1e-3")

    def rates(last_step: int) -> list[tuple[int, float]]:
        return [(each.step, each.settings["optim.lr"]) for each in phases(run_dir, last_step)]

    record(run_dir, 0, low, run_dir)
    once = path.read_bytes()
    record(run_dir, 4, low, run_dir)
    assert path.read_bytes() == once
    record(run_dir, 6, high, run_dir)
    assert rates(6) == [(0, 1e-4)]
    assert rates(7) == [(0, 1e-4), (6, 1e-3)]
    assert changed(phases(run_dir, 9)) == {"optim.lr": "0.0001 to step 6, then 0.001"}
    record(run_dir, 2, low, run_dir)  # from an older step: what was made after it does not count
    assert rates(9) == [(0, 1e-4)]
    assert changed(phases(run_dir, 9)) == {}
    assert path.read_bytes().startswith(once)
    assert len(path.read_text().splitlines()) == 3
    (tmp_path / "other").mkdir()
    record(tmp_path / "other", 5, high, run_dir)  # another run that starts from a checkpoint of this one
    assert [each.step for each in phases(tmp_path / "other", 9)] == [0, 5]
    assert changed(phases(tmp_path, 0)) == {}


@pytest.mark.processes
def test_a_resumed_run_says_what_it_applies_and_its_card_and_tensorboard_with_what_it_ran(
    tmp_path: Path, tiny_corpus: Path, tiny_tokenizer: Path
) -> None:
    runs = Runs(tmp_path, tiny_corpus, tiny_tokenizer)
    runs.settings += [*SINGLE, "trainer.precision=fp32", "trainer.val_every_steps=99", "optim.warmup_steps=0"]
    runs.train("run", "trainer.max_steps=2")
    said = runs.train("run", "trainer.max_steps=4", "optim.lr=1e-4", "optim.betas=[0.8,0.9]").stdout
    changes = [line[len("2026-12-01 00:00:00 ") :] for line in said.splitlines() if ": applied" in line]
    assert changes == [
        "optim.lr was 0.0015, is 0.0001: applied from step 3 on",
        "optim.betas was [0.9, 0.95], is [0.8, 0.9]: applied from step 3 on",
        "trainer.max_steps was 2, is 4: applied from step 3 on",
    ]
    for step, text in ((2, "No setting was changed"), (4, "| `optim.lr` | 0.0015 to step 2, then 0.0001 |")):
        checkpoint = open_checkpoint(checkpoint_folder(runs.folder("run"), step))
        write_card(ExportConfig(out=str(tmp_path)), runs.folder("run"), checkpoint, [], tmp_path)
        card = (tmp_path / "README.md").read_text()
        assert text in card
        assert ("learning rate | 0 to 0.0015 in" in card) == (step == 2)

    events = EventAccumulator(str(runs.folder("run")))
    events.Reload()
    content = events.PluginTagToContent(metadata.PLUGIN_NAME)[metadata.SESSION_START_INFO_TAG]
    shown = metadata.parse_session_start_info_plugin_data(content).hparams
    assert {name: value.string_value for name, value in shown.items() if " to step " in value.string_value} == {
        "optim.lr": "0.0015 to step 2, then 0.0001",
        "optim.betas": "[0.9, 0.95] to step 2, then [0.8, 0.9]",
        "trainer.max_steps": "2 to step 2, then 4",
    }
