"""The command line: what a person types, what they are told, and the exit code."""

import contextlib
import dataclasses
import gzip
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import MISSING
from support import forks
from support.runs import environment
from tools import make_configuration_docs, make_plan_docs

from clippy_train import config
from clippy_train.cli import VERBS, main
from clippy_train.compose import ADDED, CONF, compose, composed_values, groups, parse_overrides
from clippy_train.errors import ConfigError
from clippy_train.help import limits
from clippy_train.launch.start import choose_checkpoint
from clippy_train.shards.sources import open_corpus

DEMO = ["train", "experiment=demo"]
Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


def packed(text: str) -> str:
    """Text without any whitespace: what a page of any width must contain."""
    return "".join(text.split())


def fails(capsys: Capture, code: int, *arguments: str) -> str:
    """Run a command that must fail with `code`; the message, which is never a traceback."""
    assert main(list(arguments)) == code
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("columns", [80, 50])
def test_help_shows_every_key_with_its_meaning(verb: str, columns: int, capsys: Capture, monkeypatch: Patch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main([verb, "--help"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert shown.startswith(f"usage: clippy {verb}")
    page, values = packed(shown), composed_values(VERBS[verb].schema, [])
    for name, field in config.keys(VERBS[verb].schema):
        value = config.as_yaml(values[name]) if name in values else "(required)"
        assert f"\n  {name}:" in shown  # on one line
        assert packed(f"{name}: {value} {field.metadata['meaning']} {limits(field)}") in page


def test_help_shows_values_as_a_configuration_file_writes_them(capsys: Capture, monkeypatch: Patch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["train", "experiment=code_clippy_125m", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line in (
        "trainer.global_batch_size: 1024", "optim.lr: 0.0001", "optim.betas: [0.9, 0.95]", "model.compile: false",
        "data.hub: null", "launcher.sbatch: ''", r'tokenizer.whitespace_tokens: ["\t\t", "  ", "    ", "        "]',
    ):  # fmt: skip
        assert f"  {line}" in lines


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_a_value_in_the_help_reads_back_equal(verb: str) -> None:
    for value in composed_values(VERBS[verb].schema, []).values():
        assert yaml.safe_load(config.as_yaml(value)) == value


def test_a_terminal_that_knows_ascii_only_gets_escapes(monkeypatch: Patch) -> None:
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stderr", shown)
    assert main([*DEMO, "data.é=1"]) == 2
    shown.seek(0)
    assert r"unknown key 'data.\xe9'" in shown.read()


@pytest.mark.slow
@settings(max_examples=10)
@given(text=st.text(min_size=1))
@example(text="echo ${HOME}")
@example(text="a\\${x} \\\\${y}${")
@example(text="next\x85line")
def test_ranks_read_the_text_that_was_typed(
    train_config: Callable[..., config.TrainConfig], tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    written, path = train_config(), tmp_path_factory.mktemp("written") / "config.yaml"
    written.data.text_column, written.logger.sample_prompts = text, [text]
    config.save(written, path)
    assert config.load(path) == written


def test_help_names_every_group_and_its_options(capsys: Capture) -> None:
    assert main(["train", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert {path.name for path in CONF.iterdir() if path.is_dir()} == set(groups())
    for group, options in groups().items():
        assert f"{group} {', '.join(options)}" in shown


def test_the_overview_shows_every_verb_on_its_own_line(capsys: Capture, monkeypatch: Patch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    for verb in VERBS.values():
        assert f"  {verb.usage}" in lines


def test_an_option_that_does_not_exist_is_refused_with_the_usage_of_the_verb(capsys: Capture) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["train", "experiment=demo", "--dry-runs"])
    assert capsys.readouterr().err.splitlines() == [
        "usage: clippy train experiment=NAME data.path=DIR [KEY=VALUE ...]",
        "clippy train: error: unrecognized arguments: --dry-runs",
    ]


def test_errors_wrap_at_words_on_a_terminal(capsys: Capture, monkeypatch: Patch) -> None:
    arguments = ["train", "experiment=demo", "data.seq_len=512", "trainer.micro_batch_size=3"]
    assert main(arguments) == 2
    whole = capsys.readouterr().err
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(arguments) == 2
    wrapped = capsys.readouterr().err
    assert max(map(len, wrapped.splitlines())) <= 80 < max(map(len, whole.splitlines()))
    assert wrapped.split() == whole.split()


@pytest.mark.slow
def test_the_configuration_page_is_current() -> None:
    assert make_configuration_docs.PAGE.read_text() == make_configuration_docs.page(), "run make docs"


@pytest.mark.slow
def test_the_table_of_the_plan_is_current() -> None:
    assert make_plan_docs.PAGE.read_text() == make_plan_docs.page(), "run make docs"


def complete(line: str, folder: Path) -> list[str]:
    """What a shell is offered after `line`."""
    answer = folder / "completions"
    answer.touch()
    environment = {
        **os.environ, "_ARGCOMPLETE": "1", "_ARGCOMPLETE_SHELL": "bash", "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_COMP_WORDBREAKS": " =:",
        "COMP_LINE": line, "COMP_POINT": str(len(line)),
    }  # fmt: skip
    subprocess.run([sys.executable, "-m", "clippy_train.cli"], env=environment, check=True)
    return answer.read_text().split()


@pytest.mark.processes
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("clippy tr", ["train"]),
        ("clippy train trainer.max_", ["trainer.max_steps=", "trainer.max_epochs="]),
        ("clippy train experiment=demo -m --dry-run strategy=ze", ["zero1", "zero2", "zero3"]),
        ("clippy evaluate task=", ["perplexity", "completion", "humaneval"]),
        ("clippy generate --inter", ["--interactive"]),
    ],
)
def test_a_shell_completes_keys_options_and_choices(line: str, expected: list[str], tmp_path: Path) -> None:
    assert complete(line, tmp_path) == expected


@pytest.mark.parametrize("experiment", groups()["experiment"][1:])
def test_every_experiment_composes_validates_and_prints_its_plan(experiment: str, capsys: Capture) -> None:
    assert main(["train", f"experiment={experiment}", "--dry-run"]) == 0
    assert "parameters" in capsys.readouterr().out


@pytest.mark.parametrize("data", groups()["data"][1:])
def test_a_data_set_is_read_by_its_columns_and_splits(data: str, tmp_path: Path) -> None:
    """In a copy of the data set's folders, since the hub is out of reach."""
    source = compose(config.TrainConfig, ["experiment=code_clippy_125m", f"data={data}"]).data
    pattern = str(source.path).removeprefix("hf://datasets/")
    for split, text in (("train", "a"), (source.validation_split, "b")):
        name = pattern.format(split=split) if "{split}" in pattern else f"{pattern}/{split}/*.jsonl"
        file = tmp_path / name.replace("*", "0")
        file.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({source.text_column: text}).encode()
        file.write_bytes(gzip.compress(line) if file.suffix == ".gz" else line)
    source.path = str(tmp_path / pattern)
    assert [list(open_corpus(source, split).texts()) for split in ("train", "validation")] == [["a"], ["b"]]


@pytest.mark.parametrize("hardware", groups()["hardware"][1:])
def test_every_hardware_is_planned_with_the_recipe(hardware: str, capsys: Capture) -> None:
    assert main(["plan", "experiment=code_clippy_125m", f"hardware={hardware}"]) == 0
    assert "parameters" in capsys.readouterr().out


MINE = """\
# @package _global_
defaults: [demo, _self_]
optim:
  lr: 2.5e-4
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: Patch) -> Iterator[Path]:
    """A user's folder with an experiment of their own, `mine`, in conf/."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "conf" / "experiment"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(MINE)
    yield folder
    ADDED.clear()


@pytest.mark.slow
def test_an_experiment_in_the_current_folder_is_found(own: Path, capsys: Capture) -> None:
    assert main(["train", "experiment=mine", "--cfg", "job"]) == 0
    composed = yaml.safe_load(capsys.readouterr().out)
    assert (composed["optim"]["lr"], composed["trainer"]["max_steps"], composed["run"]["name"]) == (2.5e-4, 700, "demo")
    assert main(["train", "--help"]) == 0
    assert "demo_mixture, mine" in " ".join(capsys.readouterr().out.split())
    assert main(["plan", "-m", "experiment=mine", "seed=1,2"]) == 0
    assert capsys.readouterr().out.count("parameters") == 2


@pytest.mark.slow
def test_a_folder_of_configurations_can_be_named(own: Path, capsys: Capture) -> None:
    elsewhere = own.parent.rename(own.parents[1] / "my settings")
    assert "choose one of" in fails(capsys, 2, "plan", "experiment=mine")
    named = ["--config-dir", str(elsewhere), "experiment=mine"]
    assert main(["plan", *named]) == 0
    assert main(["plan", "-m", *named, "seed=1,2"]) == 0
    assert "no such folder" in fails(capsys, 2, "plan", "--config-dir", "nowhere", "experiment=demo")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (MINE + "  lrr: 1\n", "lrr"),
        (MINE.replace("# @package _global_\n", ""), "does that file begin with `# @package _global_`?"),
        (MINE + " a: [", "mine.yaml"),
        (MINE.replace("2.5e-4", "fast"), "optim.lr"),
        (MINE.replace("demo", "nothing"), "experiment/nothing"),
    ],
)
def test_a_wrong_file_is_refused_in_one_message(own: Path, text: str, expected: str, capsys: Capture) -> None:
    (own / "mine.yaml").write_text(text)
    assert expected in fails(capsys, 2, "plan", "experiment=mine")


def test_a_file_that_would_be_hidden_by_one_of_ours_is_refused(own: Path, capsys: Capture) -> None:
    (own / "demo.yaml").write_text(MINE)
    assert "rename yours" in fails(capsys, 2, "plan", "experiment=demo")


def test_only_the_job_can_be_printed(capsys: Capture) -> None:
    assert "--cfg job" in fails(capsys, 2, "plan", "--cfg", "hydra", "experiment=demo")


@pytest.mark.parametrize("strategy", sorted(path.stem for path in (CONF / "strategy").iterdir()))
def test_every_strategy_composes(strategy: str) -> None:
    composed = compose(config.TrainConfig, ["experiment=demo", f"strategy={strategy}", "trainer.devices=1"])
    assert composed.strategy.name in strategy


def test_the_recipe_is_planned_without_a_gpu_or_a_network(capsys: Capture, monkeypatch: Patch) -> None:
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
def test_an_unknown_key_names_the_nearest(typed: str, nearest: str, capsys: Capture) -> None:
    message = fails(capsys, 2, *DEMO, typed)
    assert f"unknown key '{typed.split('=')[0]}'" in message
    assert nearest in message


SYNTAX = [  # what Hydra's grammar allows, and what it does not: an override, and what clippy says; None: it works
    ("seed=7", None),
    ("seed= 7", None),
    ("+seed=7", None),
    ("++seed=7", None),
    ("+experiment=demo", None),
    ("seed=int(7.9)", None),
    ("seed=sort([7])", "must be a whole number"),
    ("seed=float(7)", "must be a whole number"),
    ("seed=", "must be a whole number"),
    ("seed=null", "must be a whole number"),
    ("seed={a:1}", "must be a whole number"),
    ("seed=[1,2]", "must be a whole number"),
    ("seed=7 8", "must be a whole number"),
    ("seed=é", "not a valid value"),
    ("seed=#", "not a valid value"),
    ("seed=(7)", "not a valid value"),
    ("seed='7", "not a valid value"),
    ('seed="7', "not a valid value"),
    ("seed==7", "not a valid value"),
    ("seed=7,", "not a valid value"),
    ("seed=7,,8", "not a valid value"),
    ("seed=" + "[" * 2000, "not a valid value"),
    ("seed=${nope}", "seed: Interpolation key 'nope' not found"),
    ("seed=${optim.lr}", "could not be converted to Integer"),
    ("seed=???", "not set: seed"),
    ("seed=glob(*)", "glob() matches the options of a group"),
    ("seed=choice()", "empty choice"),
    ("seed=sort(1,a)", "seed=sort(1,a): "),
    ("seed=nothing(1)", "Unknown function 'nothing'"),
    ("seed=interval(a,b)", "seed=interval(a,b): "),
    ("trainer.devices=", "must be a whole number or null"),
    ("model.compile=maybe", "must be true or false"),
    ("optim.betas=0.9", "must be a list of numbers or null"),
    ("optim.betas={a:1}", "must be a list of numbers or null"),
    ("optim.betas=[a,b]", "must be a list of numbers or null"),
    ("optim.betas=[0.9", "not a valid value"),
    ("optim.betas=${seed}", "betas: Invalid value assigned: int is not a list"),
    ("logger.sample_prompts=", "must be a list of texts"),
    ("run.name=", "run.name=: must not be empty"),
    ("run.name=[a]", "must be text"),
    ("run.name={a:1}", "must be text"),
    ("run.name='a", None),
    ("run.name=${oc.env:NOWHERE}", "'NOWHERE' not found"),
    ("run.name=${run.name}", "run.name: "),
    ("run={name:a}", "run is a section: set its keys one by one, as in run.name=VALUE"),
    ("data.filter={}", "data.filter is a section"),
    ("optim={lr:1}", "choose one of adamw, adafactor"),
    ("optim=[adamw]", "choose one of adamw, adafactor"),
    ("optim=null", "choose one of adamw, adafactor"),
    ("optim=", "choose one of adamw, adafactor"),
    ("recipe=null", None),
    ("recipe='null'", None),
    ("recipe=null,original", "null cannot be part of a sweep"),
    ("strategy=1", "choose one of zero1"),
    ("strategy='zero2'", None),
    ("strategy='glob(*)'", "choose one of zero1"),
    ("strategy=glob(nothing*)", "choose one of zero1"),
    ("strategy=${seed}", "choose one of zero1"),
    ("experiment=../demo", "choose one of null, apps_125m, apps_1_3b"),
    ("experiment=demo.yaml", "choose one of null, apps_125m, apps_1_3b"),
    ("model@foo=tiny", "unknown key 'model@foo'"),
    ("optim@a:b=adamw", "unknown key 'optim@a:b'"),
    ("~seed", "keys cannot be removed"),
    ("~seed=7", "keys cannot be removed"),
    ("~experiment", "keys cannot be removed"),
    ("+new=1", "unknown key 'new'"),
    ("++a.b=1", "unknown key 'a.b'"),
    ("hydra.run.dir=x", "unknown key 'hydra.run.dir'"),
    ("hydra/launcher=basic", "unknown key 'hydra/launcher'"),
    ("hydra.verbose=true", "unknown key 'hydra.verbose'"),
    ("seed", "is not KEY=VALUE"),
    ("=7", "is not KEY=VALUE"),
    ("==", "is not KEY=VALUE"),
    ("seed =7", "unknown key 'seed '; did you mean seed?"),
]
SWEEPS = [  # several values: refused without -m; with it, what clippy says, or None: it works
    ("experiment=glob(*)", "a sweep over experiment needs run.name=NAME"),
    ("experiment=demo,demo", "a sweep over experiment needs run.name=NAME"),
    ("experiment=glob([demo])", "a sweep over experiment needs run.name=NAME"),
    ("strategy=glob(*)", "strategy=single runs one rank"),
    ("strategy=glob([zero*],exclude=zero3)", None),
    ("seed=choice(1)", None),
    ("seed=choice(1,a)", "seed=a: must be a whole number"),
    ("seed=range(1,3)", None),
    ("seed=range(3,1)", "seed=range(3,1): no value"),
    ("seed=range(1,3,0)", "range() arg 3 must not be zero"),
    ("seed=range(1.5,3,0)", "seed=range(1.5,3,0): "),
    ("seed=range(1,inf)", "too many values"),
    ("seed=sort(2,1)", None),
    ("seed=shuffle(1,2)", None),
    ("seed=tag(a,choice(1,2))", None),
    ("seed=1,a", "seed=a: must be a whole number"),
    ("optim.lr=interval(1e-5,1e-3)", "an interval needs sweep.trials=N"),
    ("run.name=a,b", "a sweep has one folder"),
    ("run.root=a,b", "a sweep has one folder"),
    ("sweep.trials=${seed},a", "sweep.trials"),
    ("optim.betas=[0.9,0.9],[0.8,0.8]", None),
    ("optim.betas=[0.9,0.9],[0.8]", "must be two numbers"),
    ("seed='1,2',3", "must be a whole number"),
]


def experiment_for(override: str) -> list[str]:
    return [] if override.lstrip("+~").startswith("experiment") else ["experiment=demo"]


@pytest.mark.slow
@pytest.mark.parametrize(("override", "expected"), SYNTAX)
def test_any_override_works_or_is_refused_in_one_message(override: str, expected: str | None, capsys: Capture) -> None:
    arguments = ["plan", *experiment_for(override), override]
    if expected is None:
        assert main(arguments) == 0
    else:
        assert expected in fails(capsys, 2, *arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "expected"), [*SWEEPS, *((override, expected) for override, expected in SYNTAX if expected)]
)
def test_any_override_of_a_sweep_works_or_is_refused_in_one_message(
    override: str, expected: str | None, capsys: Capture, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["plan", "-m", *experiment_for(override), override]
    if expected is None:
        assert main(arguments) == 0
        assert list(tmp_path.iterdir()) == []
    else:
        assert expected in fails(capsys, 2, *arguments)


@pytest.mark.parametrize(
    ("typed", "hint"), [("trian", "did you mean train?"), ("chekpoint", "did you mean checkpoint?"), ("xx", "choose")]
)
def test_an_unknown_verb_names_the_nearest(typed: str, hint: str, capsys: Capture) -> None:
    assert f"unknown verb {typed!r}; {hint}" in fails(capsys, 2, typed)


def test_a_result_is_not_written_over_a_device_and_a_link_stays(tmp_path: Path, capsys: Capture) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "is not a file" in fails(capsys, 2, "plan", "experiment=demo", f"out={tmp_path / 'pipe'}")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert main(["plan", "experiment=demo", f"out={tmp_path / 'link'}"]) == 0
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "file").read_text())["parameters"] > 0


def test_what_is_not_a_checkpoint_is_refused(train_config: Callable[..., config.TrainConfig], tmp_path: Path) -> None:
    for name in ("nver", str(tmp_path)):
        with pytest.raises(ConfigError, match=f"resume={name}: not the folder of a checkpoint"):
            choose_checkpoint(train_config(f"run.root={tmp_path}/runs", f"resume={name}"))


def test_an_unknown_task_is_the_only_problem(capsys: Capture) -> None:
    text = fails(capsys, 2, "evaluate", "model=m", "task=nope")
    assert "task=nope: must be one of" in text
    assert "needs" not in text


@pytest.mark.parametrize("override", [override for override, _ in SWEEPS])
def test_several_values_without_a_sweep_are_refused(override: str, capsys: Capture) -> None:
    message = fails(capsys, 2, "plan", *experiment_for(override), override)
    assert f"{override}: give one value" in message
    assert "add -m" in message


@pytest.mark.slow
@pytest.mark.parametrize("name", ["seed", "optim.lr", "optim.betas", "run.name", "strategy", "logger.hparams"])
@settings(max_examples=40)
@given(value=st.text("[]{}(),'\"\\$:=+~@#%!.? a1\n\x00", max_size=12))
def test_no_value_is_a_traceback(name: str, value: str) -> None:
    with contextlib.suppress(ConfigError):
        parse_overrides(config.TrainConfig, [f"{name}={value}"])


def test_two_options_of_a_group_are_refused(capsys: Capture) -> None:
    assert "experiment is given 2 times" in fails(capsys, 2, *DEMO, "experiment=code_clippy_125m")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["optim.lr=fast"], "optim.lr"),
        (["trainer.devices=two"], "trainer.devices"),
        (["optim.lr=-1"], "optim.lr=-1.0: must be at least 0"),
        (["model.attention=flash"], "must be one of auto, eager, sdpa, flex, varlen"),
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
        (["logger.sample_prompts=[a,'']"], "logger.sample_prompts=['a', '']: must not be empty"),
        (["tokenizer.whitespace_tokens=['']"], "tokenizer.whitespace_tokens=['']: must not be empty"),
        (["resume="], "resume=: must not be empty"),
        (["run.root="], "run.root=: must not be empty"),
        (["optim.schedule=wsd"], "optim.schedule=wsd and optim.stable_steps=null: wsd needs stable_steps"),
        (["optim.stable_steps=5"], "optim.schedule=cosine and optim.stable_steps=5: "),
        (["optim.lr=nan"], "optim.lr=nan: must be a finite number"),
        (["checkpoint.every_minutes=inf"], "checkpoint.every_minutes=inf: must be a finite number"),
        (["trainer.peak_tflops=0"], "trainer.peak_tflops=0.0: must be above 0"),
        (["seed=99999999999"], "seed=99999999999: must be at most"),
        (["run.name=${nope}"], "nope"),
        (["data.filter.extensions=.py,.c"], "needs brackets: data.filter.extensions=[.py,.c]"),
        (["data.filter.extensions='.py','.c'"], "needs brackets: data.filter.extensions=['.py','.c']"),
    ],
)
def test_a_wrong_setting_names_its_key_and_the_fix(overrides: list[str], expected: str, capsys: Capture) -> None:
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
def test_a_flag_of_another_verb_is_refused(arguments: list[str], owner: str, tmp_path: Path, capsys: Capture) -> None:
    assert f"is for clippy {owner}" in fails(capsys, 2, *(each.format(tmp_path) for each in arguments))
    assert not list(tmp_path.iterdir())


@pytest.mark.processes
def test_a_plan_of_many_trials_trains_none(tmp_path: Path) -> None:
    arguments = ["plan", "-m", "experiment=code_clippy_125m", f"run.root={tmp_path}/runs", "seed=1,2"]
    # Not in this process, whose logging Hydra would set up again
    done = forks.run(arguments, tmp_path, environment(tmp_path), timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2,097,152 tokens") == 2
    assert not list(tmp_path.rglob("config.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["corpus", "{folder}", "out={file}/x"],
        ["corpus", "{folder}", "out=/proc/x"],
        ["evaluate", "task=perplexity", "model={folder}", "data.path={folder}", "out={file}/x.json"],
        ["evaluate", "task=perplexity", "model={folder}", "data.path={folder}", "out={folder}"],
    ],
)
def test_a_place_that_cannot_be_written_is_named(
    arguments: list[str], tmp_path: Path, source_tree: Path, capsys: Capture
) -> None:
    file = tmp_path / "file"
    file.touch()
    said = fails(capsys, 2, *(each.format(folder=source_tree, file=file) for each in arguments))
    assert arguments[-1].partition("=")[2].format(folder=source_tree, file=file).removesuffix("/x") in said


def test_all_problems_are_reported_at_once(capsys: Capture) -> None:
    message = fails(capsys, 2, *DEMO, "data.seq_len=512", "trainer.micro_batch_size=3", "model.attention=x")
    message += fails(capsys, 2, *DEMO, "data.seq_len=512", "trainer.micro_batch_size=3")
    for key in ("data.seq_len", "trainer.micro_batch_size", "model.attention"):
        assert key in message


def test_train_without_an_experiment_says_what_to_add(capsys: Capture) -> None:
    message = fails(capsys, 2, "train")
    assert "data.seq_len" in message
    assert "experiment=NAME" in message


@pytest.mark.parametrize("place", ["none", "file"])
def test_a_missing_corpus_names_the_key_and_how_to_make_one(
    place: str, capsys: Capture, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    message = fails(capsys, 3, *DEMO, f"data.path={tmp_path / place}", "model.base=null", "tokenizer.base=org/name")
    assert f"data.path={tmp_path / place}: no such folder" in message
    assert "clippy corpus" in message
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_rule_that_cannot_be_followed_is_named_by_its_key_in_training(capsys: Capture, tiny_corpus: Path) -> None:
    corpus = [f"data.path={tiny_corpus}", "tokenizer.base=org/name"]
    message = fails(capsys, 2, *DEMO, *corpus, "data.filter.opt_out=nowhere.txt")
    assert "data.filter.opt_out=nowhere.txt cannot be read" in message


@pytest.mark.parametrize(
    "content",
    [[], [("train", b"")], [("train", zstandard.compress(b'{"text": "x"}'))]],
    ids=["no split", "empty", "no validation"],
)
def test_an_empty_corpus_is_refused_before_anything_starts(
    content: list[tuple[str, bytes]], capsys: Capture, tmp_path: Path, monkeypatch: Patch
) -> None:
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
    line: bytes | None, column: str, expected: str, capsys: Capture, tmp_path: Path, monkeypatch: Patch
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


def test_a_cuda_run_without_cuda_is_refused(
    capsys: Capture, tiny_corpus: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    monkeypatch.chdir(tmp_path)
    settings = ["experiment=code_clippy_125m", "trainer.accelerator=cuda", f"data.path={tiny_corpus}"]
    message = fails(capsys, 2, "train", *settings)
    assert "trainer.accelerator=cuda" in message
    assert "trainer.accelerator=cpu" in message


def test_several_nodes_are_planned_but_not_started(
    capsys: Capture, tiny_corpus: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = ["experiment=demo", f"data.path={tiny_corpus}", "trainer.num_nodes=2", "tokenizer.base=org/name"]
    assert "trainer.num_nodes=2" in fails(capsys, 2, "train", *settings)
    assert main(["train", *settings, "--dry-run"]) == 0


def test_a_corpus_is_a_path_or_a_dataset_and_not_both(capsys: Capture) -> None:
    both = fails(capsys, 2, *DEMO, "data.path=somewhere", "data.hub=org/name")
    assert "data.path=somewhere and data.hub=org/name: set exactly one of them; the other must be null" in both
    assert "data.path=null and data.hub=null" in fails(capsys, 2, *DEMO, "data.path=null")


@pytest.mark.slow
def test_a_dataset_without_a_validation_split_is_told_at_the_start(
    capsys: Capture, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dataset").mkdir()
    for split in ("train", "test"):
        (tmp_path / "dataset" / f"{split}-0.jsonl").write_text('{"text": "x"}\n')
    settings = [*DEMO, "data.path=null", "data.hub=./dataset", "tokenizer.base=org/name"]
    assert "data.validation_split" in fails(capsys, 3, *settings)
    assert main([*settings, "data.validation_split=test", "--dry-run"]) == 0
    assert "not ready to run here" not in capsys.readouterr().out


def test_a_pattern_is_taken_as_it_is_typed() -> None:
    for path in ("/data/{split}/*.parquet", "https://host:80/{split}/a.jsonl.gz", "hf://datasets/o/n@main/{split}"):
        assert compose(config.TrainConfig, ["experiment=demo", f"data.path={path}"]).data.path == path


def test_a_tokenizer_folder_that_is_not_there_is_named(
    capsys: Capture, tiny_corpus: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
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
def test_nothing_is_written_over(arguments: list[str], capsys: Capture, tmp_path: Path) -> None:
    full, run = tmp_path / "full", tmp_path / "run"
    for folder, name in ((full, "precious"), (run, "config.yaml")):
        folder.mkdir()
        (folder / name).write_text("keep")
    message = main([argument.format(full=full, run=run) for argument in arguments]), capsys.readouterr().err
    assert message[0] in (2, 4)
    assert (full / "precious").read_text() == "keep"
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("full", "run")] == []


def test_a_current_folder_that_is_gone_is_named(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    assert main(["plan", "experiment=demo"]) == ConfigError.exit_code
    assert "the current folder no longer exists" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)


def test_corpus_and_export_name_the_folder_that_is_in_the_way(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("keep")
    assert "is not empty" in fails(capsys, 2, "corpus", f"out={tmp_path}")


def test_export_of_a_folder_that_is_no_run_is_refused(capsys: Capture, tmp_path: Path) -> None:
    assert "not a run folder" in fails(capsys, 2, "export", f"run={tmp_path}", f"out={tmp_path / 'x'}")


def test_corpus_of_a_missing_folder_is_refused(capsys: Capture, tmp_path: Path) -> None:
    assert "no such folder" in fails(capsys, 3, "corpus", str(tmp_path / "none"), f"out={tmp_path / 'x'}")


def test_a_model_that_cannot_be_loaded_is_refused(capsys: Capture, tmp_path: Path) -> None:
    assert "no model could be loaded" in fails(capsys, 2, "generate", f"model={tmp_path}", "prompt=x")


@pytest.mark.slow
@settings(max_examples=10)
@given(st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\x00"), min_size=1))
def test_a_prompt_is_taken_as_it_is_typed(prompt: str) -> None:
    if prompt == "null":
        return
    assert compose(config.GenerateConfig, ["model=m", f"prompt={prompt}"]).prompt == prompt


@pytest.mark.slow
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


@pytest.mark.slow
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
        if field.default is not dataclasses.MISSING and field.default != MISSING
    }
    for path in CONF.rglob("*.yaml"):
        content = OmegaConf.load(path)
        prefix = "" if path.parent.name in ("experiment", "recipe", "hardware", CONF.name) else f"{path.parent.name}."
        for name, default in defaults.items():
            if name.startswith(prefix):
                value = OmegaConf.select(content, name.removeprefix(prefix))
                assert value is None or value != default, f"{path} repeats {name}={default}"


def test_no_verb_prints_the_verbs(capsys: Capture) -> None:
    assert main([]) == 2
    assert "corpus" in capsys.readouterr().out


def test_a_sweep_refuses_a_bad_value_before_its_first_trial(
    capsys: Capture, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "optim.lr" in fails(capsys, 2, "train", "-m", "experiment=demo", "optim.lr=1e-3,fast")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["optim.lr=interval(1e-5,1e-3)"], "an interval needs sweep.trials=N"),
        (["sweep.trials=3"], "no key has several values"),
        (["sweep.trials=3", "seed=1,2", "launcher=slurm"], "set launcher.parallel"),
        (["seed=1,2", "trainer.micro_batch_size=3"], "trainer.global_batch_size=16 is not a multiple"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(
    overrides: list[str], expected: str, capsys: Capture, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert expected in fails(capsys, 2, "train", "-m", "experiment=demo", *overrides)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("given", ["sweep.trials=3", "launcher.parallel=2", "launcher.sbatch=--nodes=2"])
@pytest.mark.parametrize("verb", ["train", "plan"])
def test_a_run_is_given_no_key_that_only_sweeps_read(verb: str, given: str, capsys: Capture) -> None:
    assert f"{given}: only a sweep reads it; add -m" in fails(capsys, 2, verb, "experiment=demo", given)


def test_wrong_types_are_config_errors() -> None:
    with pytest.raises(ConfigError, match="max_new_tokens"):
        compose(config.GenerateConfig, ["model=m", "prompt=p", "max_new_tokens=many"])


@pytest.mark.processes
def test_a_launcher_needs_no_torch() -> None:
    """It starts ranks, which take seconds to import it; before them come its checks, which a user waits for."""
    code = (
        "import sys, clippy_train.launch.start; sys.exit(any(name in sys.modules for name in ('torch', 'lightning')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
