"""The command line: what a person types, what they are told, and the exit code."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from clippy_train import config
from clippy_train.cli import VERBS, main
from clippy_train.compose import CONF, compose, experiments
from clippy_train.errors import ConfigError

DEMO = ["train", "experiment=demo"]


def fails(capsys: pytest.CaptureFixture[str], code: int, *arguments: str) -> str:
    """Run a command that must fail with `code`; the message, which is never a traceback."""
    assert main(list(arguments)) == code
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_every_key_with_its_meaning(verb: str, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    assert main([verb, "--help"]) == 0
    shown = capsys.readouterr().out
    for name, field in config.keys(VERBS[verb].schema):
        assert name in shown
        assert field.metadata["meaning"] in shown


def test_help_of_train_shows_the_values_of_the_experiment(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    assert main(["train", "experiment=code_clippy_125m", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("trainer.global_batch_size" in line and "1024" in line for line in lines)


@pytest.mark.parametrize("experiment", experiments())
def test_every_experiment_composes_validates_and_prints_its_plan(experiment: str, capsys) -> None:
    assert main(["train", f"experiment={experiment}", "--dry-run"]) == 0
    assert "parameters" in capsys.readouterr().out


@pytest.mark.parametrize("strategy", sorted(path.stem for path in (CONF / "strategy").iterdir()))
def test_every_strategy_composes(strategy: str) -> None:
    composed = compose(config.TrainConfig, ["experiment=demo", f"strategy={strategy}", "trainer.devices=1"])
    assert composed.strategy.name in strategy


def test_the_recipe_is_planned_without_a_gpu_or_a_network(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["plan", "experiment=code_clippy_125m", "trainer.devices=8"]) == 0
    plan = capsys.readouterr().out
    for expected in (
        "EleutherAI/gpt-neo-125m",
        "125.2 M parameters",
        "1024 sequences of 2048 = 2,097,152 tokens: 8 ranks x 8 x 16 accumulated",
        "100,000 steps = 209.7 B tokens",
        "1.75 GB each; at most 11 kept and one being written: 21 GB",
    ):
        assert expected in plan


def test_one_gpu_runs_the_recipe_with_more_accumulation() -> None:
    composed = compose(config.TrainConfig, ["experiment=code_clippy_125m", "trainer.devices=1"])
    assert composed.micro_steps == 128


@pytest.mark.parametrize(
    ("typed", "nearest"),
    [
        ("optim.betta=1", "optim.betas"),
        ("trainer.max_step=5", "trainer.max_steps"),
        ("max_steps=5", "trainer.max_steps"),
        ("experimnt=demo", "experiment"),
        ("strategi=zero1", "strategy"),
    ],
)
def test_an_unknown_key_names_the_nearest(typed: str, nearest: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = fails(capsys, 2, *DEMO, typed)
    assert f"unknown key {typed.split('=')[0]}" in message
    assert nearest in message


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["optim.lr=fast"], "optim.lr"),
        (["trainer.devices=two"], "trainer.devices"),
        (["optim.lr=-1"], "optim.lr=-1.0: must be at least 0"),
        (["model.attention=flash"], "choose one of auto, eager, sdpa, flex, varlen"),
        (["data.seq_len=512"], "model.max_position_embeddings=256"),
        (["trainer.micro_batch_size=3"], "trainer.global_batch_size=16 is not a multiple of trainer.micro_batch_size"),
        (["data.streams=5"], "data.streams=5"),
        (["trainer.devices=3", "trainer.global_batch_size=48", "data.streams=16"], "not a multiple of the 3 ranks"),
        (["strategy=single"], "strategy=single runs one rank"),
        (["experiment=nothing"], "code_clippy_125m"),
        (["strategy=zero9"], "zero1"),
        (["run.name=a/b"], "run.name='a/b'"),
        (["trainer.max_steps"], "is not KEY=VALUE"),
        (["optim.betas=[0.9]"], "must be two numbers"),
        (["logger.sample_prompts=[a,'']"], "logger.sample_prompts: a prompt is empty"),
        (["optim.lr=nan"], "optim.lr=nan: must be a finite number"),
        (["checkpoint.every_minutes=inf"], "checkpoint.every_minutes=inf: must be a finite number"),
        (["seed=99999999999"], "seed=99999999999: must be at most"),
        (["run.name=${nope}"], "nope"),
    ],
)
def test_a_wrong_setting_names_its_key_and_the_fix(overrides: list[str], expected: str, capsys) -> None:
    assert expected in fails(capsys, 2, *DEMO, *overrides)


def test_a_name_is_what_was_typed() -> None:
    assert compose(config.TrainConfig, ["experiment=demo", "run.name=1.10"]).run.name == "1.10"


@pytest.mark.parametrize(
    ("arguments", "owner"),
    [
        (["export", "run=x", "out={}/new", "--dry-run"], "train"),
        (["corpus", "out={}/new", "-m"], "train"),
        (["train", "--report"], "corpus"),
        (["evaluate", "--interactive"], "generate"),
    ],
)
def test_a_flag_of_another_verb_is_refused(arguments: list[str], owner: str, tmp_path: Path, capsys) -> None:
    assert f"is for clippy {owner}" in fails(capsys, 2, *(each.format(tmp_path) for each in arguments))
    assert not list(tmp_path.iterdir())


def test_a_plan_of_many_trials_trains_none(tmp_path: Path) -> None:
    arguments = ["plan", "-m", "experiment=code_clippy_125m", f"run.root={tmp_path}/runs", "seed=1,2"]
    command = [sys.executable, "-m", "clippy_train.cli", *arguments]  # Hydra would set up this process's logging anew
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.count("2,097,152 tokens") == 2
    assert not list(tmp_path.rglob("config.yaml"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["corpus", "{folder}", "out={file}/x"],
        ["evaluate", "task=perplexity", "model={folder}", "data.path={folder}", "out={file}/x.json"],
        ["evaluate", "task=perplexity", "model={folder}", "data.path={folder}", "out={folder}"],
    ],
)
def test_a_place_that_cannot_be_written_is_named(
    arguments: list[str], tmp_path: Path, source_tree: Path, capsys
) -> None:
    file = tmp_path / "file"
    file.touch()
    said = fails(capsys, 2, *(each.format(folder=source_tree, file=file) for each in arguments))
    assert arguments[-1].partition("=")[2].format(folder=source_tree, file=file).removesuffix("/x") in said


def test_all_problems_are_reported_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    message = fails(capsys, 2, *DEMO, "data.seq_len=512", "trainer.micro_batch_size=3", "model.attention=x")
    message += fails(capsys, 2, *DEMO, "data.seq_len=512", "trainer.micro_batch_size=3")
    for key in ("data.seq_len", "trainer.micro_batch_size", "model.attention"):
        assert key in message


def test_train_without_an_experiment_says_what_to_add(capsys: pytest.CaptureFixture[str]) -> None:
    message = fails(capsys, 2, "train")
    assert "data.seq_len" in message
    assert "experiment=NAME" in message


def test_a_missing_corpus_names_the_key_and_how_to_make_one(capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = fails(capsys, 3, *DEMO, f"data.path={tmp_path / 'none'}", "model.base=null", "tokenizer.base=org/name")
    assert "data.path=" in message
    assert "clippy corpus" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [[], [("train", b"")], [("train", zstandard.compress(b'{"text": "x"}'))]],
    ids=["no split", "empty", "no validation"],
)
def test_an_empty_corpus_is_refused_before_anything_starts(content: list, capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for split, data in content:
        (corpus / split).mkdir()
        (corpus / split / "0.jsonl.zst").write_bytes(data)
    message = fails(capsys, 3, *DEMO, f"data.path={corpus}", "tokenizer.base=org/name")
    assert "no shard with content" in message
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("line", "column", "expected"),
    [(b'{"text": "x"}', "code", "no_text"), (b"no json", "text", "not_json"), (None, "text", "damaged_shard")],
)
def test_a_corpus_of_another_format_is_refused_before_anything_starts(
    line: bytes | None, column: str, expected: str, capsys, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for split in ("train", "validation"):
        (tmp_path / "corpus" / split).mkdir(parents=True)
        content = b"junk" if line is None else zstandard.compress(line)
        (tmp_path / "corpus" / split / "0.jsonl.zst").write_bytes(content)
    message = fails(capsys, 3, *DEMO, "data.path=corpus", "tokenizer.base=org/name", f"data.text_column={column}")
    assert expected in message
    assert f"data.text_column={column}" in message
    assert not (tmp_path / "runs").exists()


def test_a_cuda_run_without_cuda_is_refused(capsys, tiny_corpus: Path, tmp_path: Path, monkeypatch) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    monkeypatch.chdir(tmp_path)
    settings = ["experiment=code_clippy_125m", "trainer.accelerator=cuda", f"data.path={tiny_corpus}"]
    message = fails(capsys, 2, "train", *settings)
    assert "trainer.accelerator=cuda" in message
    assert "trainer.accelerator=cpu" in message


def test_several_nodes_are_planned_but_not_started(capsys, tiny_corpus: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = ["experiment=demo", f"data.path={tiny_corpus}", "trainer.num_nodes=2", "tokenizer.base=org/name"]
    assert "trainer.num_nodes=2" in fails(capsys, 2, "train", *settings)
    assert main(["train", *settings, "--dry-run"]) == 0


def test_a_corpus_is_a_path_or_a_dataset_and_not_both(capsys) -> None:
    both = fails(capsys, 2, *DEMO, "data.path=somewhere", "data.hub=org/name")
    assert "data.path=somewhere and data.hub=org/name: set one of them, and the other to null" in both
    assert "data.path=None and data.hub=None" in fails(capsys, 2, *DEMO, "data.path=null")


def test_a_dataset_without_a_validation_split_is_told_at_the_start(capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dataset").mkdir()
    for split in ("train", "test"):
        (tmp_path / "dataset" / f"{split}-0.jsonl").write_text('{"text": "x"}\n')
    settings = [*DEMO, "data.path=null", "data.hub=./dataset", "tokenizer.base=org/name"]
    assert "data.validation_split" in fails(capsys, 3, *settings)
    assert main([*settings, "data.validation_split=test", "--dry-run"]) == 0
    assert "before it can run here" not in capsys.readouterr().out


def test_a_pattern_is_taken_as_it_is_typed() -> None:
    for path in ("/data/{split}/*.parquet", "https://host:80/{split}/a.jsonl.gz", "hf://datasets/o/n@main/{split}"):
        assert compose(config.TrainConfig, ["experiment=demo", f"data.path={path}"]).data.path == path


def test_a_tokenizer_folder_that_is_not_there_is_named(capsys, tiny_corpus: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = fails(capsys, 2, *DEMO, f"data.path={tiny_corpus}", "tokenizer.base=./none")
    assert "tokenizer.base=./none: no such folder" in message


@pytest.mark.parametrize(
    "arguments",
    [
        ["corpus", "out={full}"],
        ["extend", "base=none/none/none", "out={full}"],
        ["export", "run={run}", "out={full}"],
    ],
)
def test_nothing_is_written_over(arguments: list[str], capsys, tmp_path: Path) -> None:
    full, run = tmp_path / "full", tmp_path / "run"
    for folder, name in ((full, "precious"), (run, "config.yaml")):
        folder.mkdir()
        (folder / name).write_text("keep")
    message = main([argument.format(full=full, run=run) for argument in arguments]), capsys.readouterr().err
    assert message[0] in (2, 4)
    assert (full / "precious").read_text() == "keep"
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("full", "run")] == []


def test_corpus_and_export_name_the_folder_that_is_in_the_way(capsys, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("keep")
    assert "is not empty" in fails(capsys, 2, "corpus", f"out={tmp_path}")


def test_export_of_a_folder_that_is_no_run_is_refused(capsys, tmp_path: Path) -> None:
    assert "not a run folder" in fails(capsys, 2, "export", f"run={tmp_path}", f"out={tmp_path / 'x'}")


def test_corpus_of_a_missing_folder_is_refused(capsys, tmp_path: Path) -> None:
    assert "no such folder" in fails(capsys, 3, "corpus", str(tmp_path / "none"), f"out={tmp_path / 'x'}")


def test_a_model_that_cannot_be_loaded_is_refused(capsys, tmp_path: Path) -> None:
    assert "no model could be loaded" in fails(capsys, 2, "generate", f"model={tmp_path}", "prompt=x")


@settings(max_examples=60)
@given(st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\x00"), min_size=1))
def test_a_prompt_is_taken_as_it_is_typed(prompt: str) -> None:
    if prompt == "null":
        return
    assert compose(config.GenerateConfig, ["model=m", f"prompt={prompt}"]).prompt == prompt


@pytest.mark.parametrize(
    "prompt",
    [
        "def greet(name):",
        "a=b",
        "${x}",
        "`${name}`",
        '"quoted"',
        "'",
        "\\",
        'a\\"b',
        "[1, 2",
        "{a: b}",
        "a,b",
        " x ",
        "\n",
    ],
)
def test_code_in_a_prompt_needs_no_quoting(prompt: str) -> None:
    assert compose(config.GenerateConfig, ["model=m", f"prompt={prompt}"]).prompt == prompt


def test_sources_of_a_corpus_are_positional(tmp_path: Path) -> None:
    from clippy_train.cli import VERBS, _keyed

    overrides = _keyed(VERBS["corpus"], ["a b", "out=x", "c,d"])
    assert compose(config.CorpusConfig, overrides).src == ["a b", "c,d"]


def test_a_saved_configuration_reads_back_equal(tmp_path: Path) -> None:
    composed = compose(config.TrainConfig, ["experiment=demo"])
    config.save(composed, tmp_path / "config.yaml")
    assert config.load(tmp_path / "config.yaml") == composed


def test_a_value_has_one_home() -> None:
    """No file under conf/ repeats a default of the schema."""
    from omegaconf import OmegaConf

    defaults = {
        name: field.default
        for name, field in config.keys(config.TrainConfig)
        if field.default is not dataclasses.MISSING and field.default != config.MISSING
    }
    for path in CONF.rglob("*.yaml"):
        content = OmegaConf.load(path)
        prefix = "" if path.parent.name in ("experiment", "recipe", CONF.name) else f"{path.parent.name}."
        for name, default in defaults.items():
            if name.startswith(prefix):
                value = OmegaConf.select(content, name.removeprefix(prefix))
                assert value is None or value != default, f"{path} repeats {name}={default}"


def test_no_verb_prints_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "corpus" in capsys.readouterr().out


def test_a_sweep_refuses_a_bad_value_before_its_first_trial(capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "optim.lr" in fails(capsys, 2, "train", "-m", "experiment=demo", "optim.lr=1e-3,fast")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["optim.lr=interval(1e-5,1e-3)"], "an interval needs sweep.trials=N"),
        (["sweep.trials=3"], "no key has several values"),
        (["sweep.trials=3", "seed=1,2", "launcher=slurm"], "set launcher.parallel"),
        (["seed=1,2", "trainer.micro_batch_size=3"], "trainer.global_batch_size=16 is not a multiple"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(overrides: list[str], expected: str, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert expected in fails(capsys, 2, "train", "-m", "experiment=demo", *overrides)
    assert list(tmp_path.iterdir()) == []


def test_wrong_types_are_config_errors() -> None:
    with pytest.raises(ConfigError, match="max_new_tokens"):
        compose(config.GenerateConfig, ["model=m", "prompt=p", "max_new_tokens=many"])


def test_a_launcher_needs_no_torch() -> None:
    """It starts ranks, which take seconds to import it; before them come its checks, which a user waits for."""
    code = (
        "import sys, clippy_train.launch.start; sys.exit(any(name in sys.modules for name in ('torch', 'lightning')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
