"""Which base models a run accepts, and how long it needs them."""

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.distributed import run_distributed
from support.fits import SETTINGS, SINGLE
from support.models import base_folder, gpt_neo, small_bpe
from transformers import GPTNeoConfig

from clippy_train.config import SHAPE, ModelConfig, TrainConfig
from clippy_train.errors import ConfigError
from clippy_train.launch.start import prepare
from clippy_train.model.build import check_shape
from clippy_train.run.folder import METRICS
from clippy_train.run.rows import read_rows
from clippy_train.run.start import read_start
from clippy_train.train.callbacks.preemption import SignalFlag
from clippy_train.train.rank import train_rank


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"attention_types": [[["global"], 2]]}, "attention_layers=['global', 'global'], not ['global', 'local']"),
        ({"intermediate_size": 64}, "intermediate_size=64, not 128"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False, not True"),
        ({"activation_function": "relu"}, "activation_function=relu, not gelu_new"),
    ],
)
def test_a_base_that_no_key_describes_is_refused(changed: dict[str, Any], said: str) -> None:
    config = gpt_neo().config.to_dict()
    del config["attention_layers"]  # follows from attention_types
    described = ModelConfig(base="base", vocab_size=97, **{name: config[name] for name in SHAPE})
    check_shape(GPTNeoConfig(**config), described)
    with pytest.raises(ConfigError, match=re.escape(f"model.base=base cannot be trained: it has {said}")):
        check_shape(GPTNeoConfig(**{**config, **changed}), described)


@pytest.mark.processes
def test_a_run_whose_base_is_gone_resumes_from_its_checkpoint(
    train_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if it had a relative name, which might be one on the hub."""
    monkeypatch.chdir(tmp_path)
    base = base_folder(tmp_path / "base", small_bpe())
    shape = [f"model.{name}={getattr(gpt_neo().config, name)}" for name in SHAPE]
    config = train_config(
        *SETTINGS, *SINGLE, *shape, f"run.root={tmp_path}", "run.name=kept", "trainer.max_steps=1",
        "model.base=base", "tokenizer.base=null",
    )  # fmt: skip
    train(config)
    shutil.copytree(tmp_path / "kept", tmp_path / "gone")
    longer = replace(config, trainer=replace(config.trainer, max_steps=2))
    train(longer)
    shutil.rmtree(base)
    train(replace(longer, run=replace(longer.run, name="gone")))
    kept, gone = (list(read_rows(tmp_path / name / METRICS, "train/loss")) for name in ("kept", "gone"))
    assert [row["train/loss"] for row in gone] == [row["train/loss"] for row in kept]
    assert len(gone) == 2
    with pytest.raises(ConfigError, match=f"model.base={base}: no such folder"):
        prepare(replace(longer, run=replace(longer.run, name="new"), model=replace(longer.model, base=str(base))))


def train(config: TrainConfig) -> None:
    """Prepare a run and be its only rank, in a process of its own."""

    def run() -> None:
        assert prepare(config)
        train_rank(config, read_start(config.run_dir), SignalFlag())

    run_distributed(run, 1)
