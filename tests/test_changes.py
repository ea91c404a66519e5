"""Settings that change between two attempts of a run: applied from the next update on, or refused."""

from collections.abc import Callable
from pathlib import Path

import pytest

from clippy_train.config import TrainConfig, keys, save
from clippy_train.errors import ConfigError
from clippy_train.run.changes import APPLIED, MOVED, ORDER, REFUSED, changes, outcome
from clippy_train.run.folder import CONFIG
from clippy_train.run.identity import data_identity


def test_every_key_has_one_class() -> None:
    refused = [name for name, _ in keys(TrainConfig) if any(f"{name}.".startswith(f"{each}.") for each in REFUSED)]
    assert sorted([*refused, *MOVED, *APPLIED]) == sorted(name for name, _ in keys(TrainConfig))


def test_what_the_order_of_the_data_depends_on_is_refused(train_config: Callable[..., TrainConfig]) -> None:
    known = {name for name, why in REFUSED.items() if why == ORDER}
    assert data_identity(train_config(), "").keys() - {"corpus fingerprint"} == known


def test_a_change_is_reported_with_what_becomes_of_it(train_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    config = train_config("optim.lr=1e-3", "logger.sample_prompts=['def f():']")
    assert changes(tmp_path, config) == []
    save(config, tmp_path / CONFIG)
    assert changes(tmp_path, config) == []
    moved = train_config("optim.lr=1e-4", "logger.sample_prompts=[]", "tokenizer.base=b")
    assert [outcome(each, 7) for each in changes(tmp_path, moved)] == [
        f"tokenizer.base was {config.tokenizer.base}, is b: applied from step 8 on, where the content is the same",
        "optim.lr was 0.001, is 0.0001: applied from step 8 on",
        'logger.sample_prompts was ["def f():"], is []: applied from step 8 on',
    ]


def test_every_refused_change_is_named_at_once(train_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    save(train_config(), tmp_path / CONFIG)
    with pytest.raises(ConfigError) as refused:
        changes(tmp_path, train_config("seed=7", "data.filter.min_stars=3", "model.base=other", "optim.lr=1"))
    assert str(refused.value).splitlines() == [
        "model.base was null, is other: refused, it means another model",
        "data.filter.min_stars was null, is 3: refused, it means another order of the data",
        "seed was 42, is 7: refused, it means another order of the data",
        f"restore what {tmp_path / CONFIG} has, or start a new run with another run.name",
    ]
