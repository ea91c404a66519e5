"""The recipe is the model card's, its deviations are switches, and `docs/recipe.md` describes both correctly."""

import json
import re
import shlex
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from support.flax_trace import FlaxTrace
from support.models import gpt_neo, token_ids
from support.runs import Runs

from clippy_train.compose import CONF, compose
from clippy_train.config import DataConfig, TrainConfig, keys
from clippy_train.data.objectives import LeftToRight
from clippy_train.data.stream import Stream
from clippy_train.errors import ConfigError
from clippy_train.model.attention import attention_masks
from clippy_train.model.loss import mean_loss, token_losses
from clippy_train.optim import Schedule, build_optimizer, clip_grad_norm
from clippy_train.shards.sources import open_corpus
from clippy_train.train.clock import Clock, seconds
from clippy_train.train.module import CodeLM

HERE = Path(__file__).parent
COMMAND = HERE / "data" / "card_command.txt"  # the flags of the model card's command line
DOCUMENT = HERE.parent / "docs" / "recipe.md"
DEVICES = "trainer.devices=8"  # the card's, whatever this machine has
CARD = ["experiment=code_clippy_125m", DEVICES]

# The value in our configuration that a flag of the card sets. Flags without such a value are missing here.
CARD_SAYS: dict[str, Callable[[TrainConfig], Any]] = {
    "text_column_name": lambda c: c.data.text_column,
    "block_size": lambda c: c.data.seq_len,
    "per_device_train_batch_size": lambda c: c.trainer.micro_batch_size,
    "per_device_eval_batch_size": lambda c: c.trainer.eval_micro_batch_size,
    "preprocessing_num_workers": lambda c: c.data.num_workers * (c.trainer.devices or 0),
    "learning_rate": lambda c: c.optim.lr,
    "max_steps": lambda c: c.trainer.max_steps,
    "warmup_steps": lambda c: c.optim.warmup_steps,
    "decay_steps": lambda c: c.optim.decay_steps,
    "adam_beta1": lambda c: c.optim.betas and c.optim.betas[0],
    "adam_beta2": lambda c: c.optim.betas and c.optim.betas[1],
    "weight_decay": lambda c: c.optim.weight_decay,
    "logging_steps": lambda c: c.trainer.log_every_steps,
    "eval_steps": lambda c: c.trainer.val_every_steps,
    "dtype": lambda c: {"bf16": "bfloat16"}[c.trainer.precision],
    "save_steps": lambda c: c.checkpoint.every_steps,
    "save_total_limit": lambda c: c.checkpoint.keep_last,
    "gradient_accumulation_steps": lambda c: c.micro_steps,
    "run_name": lambda c: f"125m_{round(c.optim.lr * 1e4)}e-4lr_{c.trainer.global_batch_size}bs",
    "max_eval_samples": lambda c: c.trainer.val_samples,
}


def card_flags() -> list[tuple[str, str]]:
    """The flags of the card's command with their values; '' for a flag without a value."""
    words = shlex.split(COMMAND.read_text())
    found: list[tuple[str, str]] = []
    for word in words:
        if word.startswith("--"):
            flag, _, value = word.removeprefix("--").partition("=")
            found.append((flag, value))
        else:
            found[-1] = (found[-1][0], word)
    return found


def number_or_text(value: Any) -> Any:
    try:
        return float(value)
    except ValueError:
        return value


def table(heading: str) -> list[list[str]]:
    """The rows of the first table under a heading of the document, without backquotes."""
    section = DOCUMENT.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip().replace("`", "") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def values(overrides: list[str]) -> dict[str, Any]:
    """Every key of a composed configuration with its value; do not write to it."""
    return _values(tuple(overrides))


@cache
def _values(overrides: tuple[str, ...]) -> dict[str, Any]:
    composed = OmegaConf.structured(compose(TrainConfig, list(overrides)))
    return {name: OmegaConf.select(composed, name) for name, _ in keys(TrainConfig)}


@cache
def card() -> TrainConfig:
    """The recipe of the card; do not write to it."""
    return compose(TrainConfig, CARD)


def differences(left: list[str], right: list[str]) -> dict[str, Any]:
    """The keys whose values differ, with the values on the right."""
    before = values(left)
    return {name: value for name, value in values(right).items() if value != before[name]}


def keys_in_file(path: Path) -> dict[str, Any]:
    """The keys that a configuration file sets itself, with their values."""
    content = OmegaConf.load(path)
    found = {name: OmegaConf.select(content, name) for name, _ in keys(TrainConfig)}
    return {name: value for name, value in found.items() if value is not None}


# The card


@pytest.mark.parametrize(("flag", "value"), [each for each in card_flags() if each[0] in CARD_SAYS], ids=str)
def test_the_experiment_has_the_value_of_the_card(flag: str, value: str) -> None:
    assert number_or_text(CARD_SAYS[flag](card())) == number_or_text(value)


def test_only_these_flags_have_no_value_of_ours() -> None:
    assert {flag for flag, _ in card_flags()} - CARD_SAYS.keys() == {
        "output_dir",
        "model_name_or_path",
        "dataset_name",
        "data_dir",
        "do_train",
        "do_eval",
        "overwrite_output_dir",
        "push_to_hub",
        "report_to",
        "skip_memory_metrics",
        "save_optimizer",
    }


def test_every_flag_of_the_card_has_its_row_in_the_order_of_the_command() -> None:
    assert [(row[0], row[1]) for row in table("The card's command")] == card_flags()


@pytest.mark.parametrize(
    "row", [*table("The card's command"), *table("What the script fixes without a flag")], ids=lambda row: row[0]
)
def test_a_row_that_names_a_key_gives_its_value(row: list[str]) -> None:
    composed = values(CARD)
    for pair in filter(None, row[2].split(", ")):
        name, _, written = pair.partition("=")
        assert OmegaConf.create({"value": composed[name]}) == OmegaConf.from_dotlist([f"value={written}"]), pair
    assert row[3] in ("same", "different", "none")
    assert row[3] == "same" or row[4], "a difference needs a reason"


def test_a_row_says_same_only_if_the_card_and_our_key_agree() -> None:
    for flag, value, _, verdict, _ in table("The card's command"):
        if verdict == "same" and flag in CARD_SAYS:
            assert number_or_text(CARD_SAYS[flag](card())) == number_or_text(value)


def test_values_that_the_original_hard_codes_are_ours() -> None:
    optim = card().optim
    assert (optim.min_lr_ratio, optim.grad_clip, optim.eps, optim.name) == (0.1, 1.0, 1e-8, "adamw")


# The other recipes


@pytest.mark.parametrize(
    ("experiment", "expected"),
    [
        (
            "code_clippy_dedup_125m",
            {
                "run.name": "code_clippy_dedup_125m",
                "data.path": "data/code_clippy_dedup",
                "optim.warmup_steps": 2000,
                "optim.decay_steps": 30000,
                "trainer.global_batch_size": 2048,
                "trainer.log_every_steps": 25,
            },
        ),
        (
            "code_clippy_readme_125m",
            {
                "run.name": "code_clippy_readme_125m",
                "optim.lr": 5e-5,
                "optim.warmup_steps": 4000,
                "optim.decay_steps": 50000,
            },
        ),
        (
            "code_clippy_1_3b",
            {
                "run.name": "code_clippy_1_3b",
                "model.base": "EleutherAI/gpt-neo-1.3B",
                "model.num_layers": 24,
                "model.hidden_size": 2048,
                "model.num_heads": 16,
                "trainer.micro_batch_size": 2,
                "trainer.eval_micro_batch_size": 4,
            },
        ),
    ],
)
def test_another_published_recipe_is_derived_from_the_cards(experiment: str, expected: dict[str, Any]) -> None:
    assert differences(CARD, [f"experiment={experiment}", DEVICES]) == expected
    composed = compose(TrainConfig, [f"experiment={experiment}", DEVICES])
    accumulated = {"code_clippy_dedup_125m": 32, "code_clippy_readme_125m": 16, "code_clippy_1_3b": 64}
    assert composed.micro_steps == accumulated[experiment]


def test_the_recipes_for_apps_are_those_of_the_originals_readme() -> None:
    """Its only models that improved on GPT-Neo."""
    small, large = (compose(TrainConfig, [f"experiment=apps_{size}", DEVICES]) for size in ("125m", "1_3b"))
    assert (small.optim.betas, small.optim.weight_decay, small.optim.warmup_steps) == ([0.9, 0.98], 0.1, 800)
    assert (large.optim.name, large.optim.warmup_steps, large.optim.lr) == ("adafactor", 5000, 2e-5)
    assert 1e-5 <= small.optim.lr <= 1e-4
    assert [each.trainer.global_batch_size for each in (small, large)] == [256, 24]
    for each in (small, large):
        assert (each.data.seq_len, each.data.packing, each.data.truncate) == (1024, False, "end")
        assert (each.optim.schedule, each.optim.min_lr_ratio) == ("linear", 0.0)
        assert each.trainer.max_steps == each.optim.warmup_steps + each.optim.decay_steps
        assert each.trainer.max_epochs == 5


def test_a_derived_recipe_repeats_no_value_of_its_base() -> None:
    for path in (CONF / "experiment").glob("*.yaml"):
        defaults = OmegaConf.select(OmegaConf.load(path), "defaults") or []
        if "code_clippy_125m" in defaults:
            assert keys_in_file(path).items() <= differences(CARD, [f"experiment={path.stem}", DEVICES]).items(), path


def test_the_document_names_every_recipe() -> None:
    named = {row[0] for row in table("Recipes")}
    assert named == {path.stem for path in (CONF / "experiment").glob("*.yaml")} - {"demo", "demo_fim", "demo_mixture"}


# recipe=original


def test_one_override_restores_the_original() -> None:
    changed = differences(CARD, [*CARD, "recipe=original"])
    assert changed == {
        "model.loss_dtype": "bf16",
        "tokenizer.matching": "first_listed",
        "data.eos_between_documents": False,
        "trainer.val_samples": 2000 * 16 * 8,
    }
    assert changed == keys_in_file(CONF / "recipe" / "original.yaml")


def test_every_key_of_the_original_has_a_row_with_both_values() -> None:
    ours, original = values(CARD), keys_in_file(CONF / "recipe" / "original.yaml")
    rows = {row[0]: (row[1], row[2]) for row in table("Deviations that are switches") if row[2]}
    assert rows == {name: (shown(ours[name]), shown(value)) for name, value in original.items()}


def shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def test_the_command_line_overrides_recipe() -> None:
    assert compose(TrainConfig, ["recipe=original", *CARD, "model.loss_dtype=fp32"]).model.loss_dtype == "fp32"


def test_a_bf16_loss_in_an_fp32_run_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.loss_dtype=bf16.*set model\.loss_dtype=fp32"):
        compose(TrainConfig, [*CARD, "recipe=original", "trainer.precision=fp32"])


def test_the_plan_shows_the_rules_of_the_recipe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from clippy_train.cli import main

    monkeypatch.setenv("COLUMNS", "200")
    assert main(["train", *CARD, "recipe=original", "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "first_listed whitespace, nothing between documents, loss in bf16" in plan
    assert "256,000 sequences = 524.3 M tokens" in plan


@pytest.mark.parametrize("loss_dtype", ["fp32", "bf16"])
def test_loss_dtype_reaches_training_and_validation(train_config: Callable[..., TrainConfig], loss_dtype: str) -> None:
    model, ids = gpt_neo(), token_ids(3, 57)
    module = CodeLM(train_config(f"model.loss_dtype={loss_dtype}"), model, np.ones(97, dtype=np.int32))
    expected = token_losses(model, ids, "sdpa", loss_dtype)
    assert module.training_step({"input_ids": ids}, 0).item() == expected.mean().item()
    with torch.no_grad():
        module.validation_step({"input_ids": ids, "group": torch.ones_like(ids)}, 0)
    assert module.val_sums[1, 0].item() == pytest.approx(expected.double().sum().item(), rel=1e-12)


def test_the_document_mask_reaches_training(train_config: Callable[..., TrainConfig]) -> None:
    model, ids = gpt_neo(), token_ids(3, 57, vocab_size=8)
    model.config.eos_token_id = 3
    module = CodeLM(train_config("data.document_mask=true"), model, np.ones(97, dtype=np.int32))
    loss = module.training_step({"input_ids": ids}, 0)
    assert (
        loss.item()
        == mean_loss(model, ids, "sdpa", masks=attention_masks(ids, "sdpa", 16, eos=3)).item()
        != mean_loss(model, ids, "sdpa").item()
    )


@pytest.mark.slow
def test_a_bf16_loss_follows_the_recorded_bf16_run_closer_than_an_fp32_loss() -> None:
    """The original's bf16 losses differ from ours mainly because of their log-softmax."""
    recorded = json.loads((HERE / "data" / "flax_micro" / "losses_bf16.json").read_text())
    rounded, exact = (bf16_losses(loss_dtype, updates=15) for loss_dtype in ("bf16", "fp32"))
    assert distance(rounded, recorded) < 1.5e-3
    assert distance(exact, recorded) > 2.5e-3


def bf16_losses(loss_dtype: str, updates: int) -> list[float]:
    """Losses of the recording's micro-batches, trained in bf16."""
    trace = FlaxTrace(HERE / "data" / "flax_micro")
    model, settings = trace.initial_model(), trace.optim_config()
    losses: list[float] = []
    optimizer = build_optimizer(model, settings)
    schedule = Schedule(optimizer, settings)
    for update in range(updates):
        for ids in trace.micro_batches(update):
            with torch.autocast("cpu", torch.bfloat16):
                loss = mean_loss(model, ids, "sdpa", loss_dtype)
            (loss / trace.accumulation).backward()
            losses.append(loss.item())
        clip_grad_norm(model.parameters(), settings.grad_clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return losses


def distance(losses: list[float], recorded: list[float]) -> float:
    return max(abs(ours - theirs) for ours, theirs in zip(losses, recorded, strict=False))


# Bugs of the original


def test_a_run_without_a_length_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"not set: trainer\.max_steps"):
        compose(TrainConfig, [*CARD, "trainer.max_steps=???"])
    with pytest.raises(ConfigError, match="must be at least 1"):
        compose(TrainConfig, [*CARD, "trainer.max_steps=0"])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, tiny_tokenizer: Path) -> Runs:
    return Runs(tmp_path_factory.mktemp("recipe"), tiny_corpus, tiny_tokenizer)


SINGLE = ["strategy=single", "trainer.devices=1"]


def test_a_run_without_warm_up_learns(runs: Runs) -> None:
    runs.train("no-warm-up", "optim.warmup_steps=0", "trainer.audit=true", *SINGLE)
    rows = runs.rows("no-warm-up")
    assert rows[0]["train/lr"] == 1.5e-3
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]


def test_a_run_that_diverges_fails_and_saves_nothing_of_that_step(runs: Runs) -> None:
    result = runs.train("diverged", "optim.lr=1e30", "optim.warmup_steps=0", "trainer.audit=true", *SINGLE, code=1)
    assert "Nothing of this step is saved" in result.stderr
    assert all(row["step"] < 6 for row in runs.rows("diverged"))


def test_a_run_of_the_original_recipe_trains_and_resumes(runs: Runs) -> None:
    runs.train("original", "recipe=original", "trainer.audit=true", *SINGLE)
    assert runs.rows("original", "val/loss")[-1]["step"] == 6
    resumed = runs.train("original", "recipe=original", "trainer.audit=true", "trainer.max_steps=8", *SINGLE)
    assert "from step 6" in resumed.stdout
    assert [row["step"] for row in runs.rows("original")] == list(range(1, 9))
    changed = runs.train("original", "trainer.max_steps=9", *SINGLE, code=2).stderr
    assert "data.eos_between_documents was false, is true: refused" in changed


def test_reported_time_excludes_only_validation_and_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    now, cpu = 0.0, torch.device("cpu")
    monkeypatch.setattr("time.perf_counter", lambda: now)
    clock = Clock()
    clock.run(cpu)
    now = 5.0  # training
    clock.pause(cpu)
    now = 100.0  # validation
    clock.run(cpu)
    now = 107.0  # training
    clock.pause(cpu)
    assert seconds(clock.take()) == 12.0
    assert seconds(clock.take()) == 0.0


def test_documents_are_tokenised_in_batches(tiny_corpus: Path) -> None:
    sizes = []

    def encode(texts: list[str]) -> list[list[int]]:
        sizes.append(len(texts))
        return [[0] * len(text) for text in texts]

    blocks = Stream(
        open_corpus(DataConfig(path=str(tiny_corpus)), "train"), LeftToRight(encode), seq_len=8, window=64
    ).blocks()
    while sum(sizes) < 30:
        next(blocks)
    assert max(sizes) == 16


def test_every_test_that_the_document_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", DOCUMENT.read_text()))
    tests = "".join(path.read_text() for path in HERE.glob("test_*.py"))
    defined = set(re.findall(r"^def (test_\w+)", tests, re.MULTILINE))
    assert named
    assert named <= defined, named - defined


def test_a_loaded_model_trains_with_its_dropout() -> None:
    model = gpt_neo(dropout=0.1).eval()  # as from_pretrained leaves it
    CodeLM(compose(TrainConfig, ["experiment=demo", "data.path=unused"]), model, np.ones(97))
    assert model.training
