"""A run is exported, evaluated, described and published; only a verified folder of this run is published."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from support import hub_server
from support.runs import Runs
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from clippy_train.cli import main
from clippy_train.config import load
from clippy_train.run.checkpoint import (
    find_best,
    read_checkpoint,
)
from clippy_train.run.folder import checkpoint_folders

TOKEN = "hf_good"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, tiny_tokenizer: Path) -> Runs:
    """One finished run in fp32 in one process, whose first validation is its best."""
    runs = Runs(tmp_path_factory.mktemp("export"), tiny_corpus, tiny_tokenizer)
    settings = [
        "strategy=single",
        "trainer.devices=1",
        "trainer.precision=fp32",
        "trainer.max_steps=4",
        "model.max_position_embeddings=128",
    ]
    steps = [
        "trainer.val_every_steps=2",
        "checkpoint.keep_last=4",
        "optim.warmup_steps=1",
        "model.max_position_embeddings=128",
    ]
    runs.train("run", *settings, *steps)
    return runs


@pytest.fixture(scope="module")
def exported(runs: Runs) -> Path:
    out = runs.root / "exported"
    assert main(["export", f"run={runs.folder('run')}", f"out={out}"]) == 0
    return out


@pytest.fixture(scope="module")
def evaluation(runs: Runs, exported: Path) -> Path:
    """The results file of an evaluation on the run's validation blocks."""
    config, out = load(runs.folder("run") / "config.yaml"), runs.root / "results.json"
    assert main([
        "evaluate", "task=perplexity", f"model={exported}", f"data.path={config.data.path}", f"out={out}",
        f"seq_len={config.data.seq_len}", f"max_rows={config.trainer.val_samples}",
    ]) == 0  # fmt: skip
    return out


def card(folder: Path) -> tuple[dict[str, Any], str]:
    _, head, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), text


def test_an_evaluation_equals_the_validation_of_the_same_weights_on_the_same_blocks(
    runs: Runs, exported: Path, evaluation: Path
) -> None:
    last = runs.rows("run", "val/loss")[-1]
    found = json.loads(evaluation.read_text())["results"][str(exported)]
    for name in ("loss", "perplexity", "bits_per_byte"):
        assert found["total"][name] == pytest.approx(last[f"val/{name}"], rel=1e-6)
    assert found["languages"]["Python"]["loss"] == pytest.approx(last["val/loss/Python"], rel=1e-6)
    assert found["languages"]["Python"]["bits_per_byte"] == pytest.approx(last["val/bits_per_byte/Python"], rel=1e-6)


def test_the_files_can_be_read_by_transformers_4(exported: Path) -> None:
    described = json.loads((exported / "tokenizer_config.json").read_text())
    assert described["tokenizer_class"] in ("GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast")
    assert {path.suffix for path in exported.iterdir()} == {".md", ".json", ".safetensors", ".png"}
    generation, tokenizer = GenerationConfig.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    end = tokenizer.eos_token_id
    assert tokenizer.decode([end]) == "<|endoftext|>"
    assert (generation.eos_token_id, generation.bos_token_id, generation.pad_token_id) == (end, end, end)


def test_the_best_step_and_bf16_weights_are_exported(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = runs.folder("run")
    assert main(["export", f"run={folder}", f"out={tmp_path / 'best'}", "step=best", "dtype=bf16"]) == 0
    best = find_best(folder)
    assert best
    assert f"step {read_checkpoint(best).manifest.step} of" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "best", dtype="auto").dtype == torch.bfloat16
    steps = [read_checkpoint(path).manifest.step for path in checkpoint_folders(folder)]
    assert main(["export", f"run={folder}", f"out={tmp_path / 'x'}", f"step={max(steps) + 1}"]) == 4
    assert main(["export", f"run={folder}", f"out={tmp_path / 'x'}", "step=first"]) == 2
    assert "step=first" in capsys.readouterr().err


def test_the_card_states_the_facts_of_the_run_and_of_the_evaluation(
    runs: Runs, evaluation: Path, tmp_path: Path
) -> None:
    out, folder = tmp_path / "out", runs.folder("run")
    assert main(["export", f"run={folder}", f"out={out}", f"evaluations=[{evaluation}]"]) == 0
    head, text = card(out)
    results = json.loads(evaluation.read_text())
    (measured,) = results["results"].values()
    (index,) = head["model-index"]
    metrics = [(each["dataset"]["type"], each["metrics"][0]["value"]) for each in index["results"]]
    last = runs.rows("run", "val/loss")[-1]
    assert metrics == [
        ("validation", round(last["val/bits_per_byte"], 4)),
        ("perplexity", round(measured["total"]["bits_per_byte"], 4)),
    ]
    manifest = read_checkpoint(checkpoint_folders(folder)[0]).manifest
    settings = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])  # type: ignore[index]
    assert settings == yaml.safe_load((folder / "config.yaml").read_text())
    for fact in (
        f"{manifest.tokens:,}", manifest.data["corpus fingerprint"], results["about"]["command"], "Python",
        f"{measured['total']['bits_per_byte']:.4f}", torch.__version__, "![curves](curves.png)",
    ):  # fmt: skip
        assert str(fact) in text
    with Image.open(out / "curves.png") as image:
        assert image.format == "PNG"
        colours = image.convert("RGB").getcolors(1 << 24)
    assert colours
    assert len(colours) > 4  # something was drawn


def test_the_snippet_of_the_card_runs_unchanged(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, text = card(exported)
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], {})  # type: ignore[index]
    assert capsys.readouterr().out.startswith("def greet(name):\n")


def test_results_of_other_weights_are_refused(
    runs: Runs, evaluation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = runs.folder("run")
    for arguments in (["step=2"], ["dtype=bf16"]):
        assert main(["export", f"run={folder}", f"out={tmp_path / 'x'}", f"evaluations={evaluation}", *arguments]) == 2
        assert "was not run on these weights" in capsys.readouterr().err
    (tmp_path / "other.json").write_text("{}")
    assert main(["export", f"run={folder}", f"out={tmp_path / 'x'}", f"evaluations={tmp_path / 'other.json'}"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["other.json"]


# Publishing


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_server.Hub]:
    with hub_server.serve() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield hub


def test_a_verified_folder_is_published_privately(
    hub: hub_server.Hub, runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["export", f"run={runs.folder('run')}", f"out={out}", "push_to=me/model"]) == 0
    repository = hub.repositories["me/model"]
    assert repository["private"]
    assert repository["files"] == {path.name: path.read_bytes() for path in out.iterdir()}
    assert 'from_pretrained("me/model")' in (out / "README.md").read_text()
    assert TOKEN not in "".join(capsys.readouterr()) + "".join(path.read_text() for path in out.glob("*.*[nd]"))


def test_publishing_to_a_public_repository_requires_public_true(
    hub: hub_server.Hub, runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repositories["me/open"] = {"private": False, "files": {}}
    push = ["export", f"run={runs.folder('run')}", f"out={tmp_path / 'out'}", "push_to=me/open"]
    assert main(push) == 2
    assert "set public=true" in capsys.readouterr().err
    assert hub.repositories["me/open"]["files"] == {}
    assert main([*push, "public=true"]) == 0
    assert "model.safetensors" in hub.repositories["me/open"]["files"]


@pytest.mark.parametrize(
    ("token", "name", "expected"),
    [(None, "me/model", "HF_TOKEN"), ("hf_bad", "me/model", "refuses"), (TOKEN, "not a name", "refuses")],
)
def test_nothing_is_published_without_permission(
    token: str | None,
    name: str,
    expected: str,
    hub: hub_server.Hub,
    runs: Runs,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    assert main(["export", f"run={runs.folder('run')}", f"out={tmp_path / 'out'}", f"push_to={name}"]) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert "hf_bad" not in message
    assert not (tmp_path / "out").exists()
    assert hub.repositories == {}


def test_a_folder_that_fails_verification_is_not_published(
    hub: hub_server.Hub, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a text that decoding without special tokens never gives
    monkeypatch.setattr("clippy_train.hf.export.PROBE", "<|endoftext|>")
    assert main(["export", f"run={runs.folder('run')}", f"out={tmp_path / 'out'}", "push_to=me/model"]) == 4
    assert hub.repositories["me/model"]["files"] == {}
    assert not (tmp_path / "out").exists()
