"""Nothing that stands in a checkpoint or a model's folder is run, and what asks for it is refused by name."""

import json
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.distributed import run_distributed
from support.fits import SETTINGS
from support.models import base_folder, small_bpe
from support.runs import Runs

from clippy_train.cli import main
from clippy_train.compose import compose
from clippy_train.config import TrainConfig, save
from clippy_train.errors import CheckpointError, ConfigError
from clippy_train.model.load import load_model
from clippy_train.run import consolidate, plain
from clippy_train.run.checkpoint import flush_and_hash, manifest_bytes, open_checkpoint, read_checkpoint
from clippy_train.run.folder import CONFIG, HF_FOLDER, MANIFEST, checkpoint_folder
from clippy_train.run.moments import MOMENTS
from clippy_train.run.start import Start
from clippy_train.tokenizer import load_tokenizer
from clippy_train.train.callbacks.preemption import SignalFlag
from clippy_train.train.rank import train_rank

LAYOUTS = {
    "single": ["strategy=single", "trainer.devices=1"],
    "ddp": ["strategy=ddp"],
    "zero1": ["strategy=zero1"],
    "zero2 bf16": ["strategy=zero2", "trainer.precision=bf16"],
    "zero3": ["strategy=zero3"],
}
READ_BY_RANKS = ("state", "*model_states.pt", "*optim_states.pt", "rng-*.pt")  # in this order
RANDOM_STATE = "rng-*.pt"


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return os.mkdir, (self.folder,)


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[Path]:
    """The folder that hostile files would make."""
    yield tmp_path / "trap"
    assert not (tmp_path / "trap").exists()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, tiny_tokenizer: Path) -> Runs:
    made = Runs(tmp_path_factory.mktemp("plain"), tiny_corpus, tiny_tokenizer)
    small = [*SETTINGS, "trainer.max_steps=1", "trainer.val_every_steps=1", f"run.root={made.root / 'runs'}"]
    made.settings = ["experiment=demo", *small, f"data.path={tiny_corpus}", f"tokenizer.base={tiny_tokenizer}"]
    return made


@pytest.fixture(scope="module", params=LAYOUTS)
def trained(runs: Runs, request: pytest.FixtureRequest) -> TrainConfig:
    """A run of one step, made without a command."""
    config = compose(TrainConfig, [*runs.settings, *LAYOUTS[request.param], f"run.name={request.param.split()[0]}"])
    config.run_dir.mkdir(parents=True)
    save(config, config.run_dir / CONFIG)
    run_distributed(lambda: train_rank(config, Start(), SignalFlag()), config.world_size)
    return config


def hostile_copies(config: TrainConfig, trap: Path) -> dict[str, tuple[Path, list[Path]]]:
    """For each kind of file in a run's checkpoint, a copy in which the files of that kind are hostile, and these."""
    found = {}
    for kind in READ_BY_RANKS:
        copied = shutil.copytree(checkpoint_folder(config.run_dir, 1), trap.with_name(f"with a hostile {kind}"))
        files = [path for path in copied.rglob(kind) if path.is_file()]
        if files:
            make_hostile(copied, files, trap)
            found[kind] = copied, files
    return found


def make_hostile(checkpoint: Path, files: list[Path], trap: Path) -> None:
    """Hide a call in files of a checkpoint, which stays complete and intact by its manifest."""
    for path in files:
        torch.save({**torch.load(path, weights_only=False), "extra": Hostile(trap)}, path)
        torch.load(path, weights_only=False)
        trap.rmdir()  # so it is hostile
    manifest = read_checkpoint(checkpoint).manifest
    manifest = replace(manifest, files={**manifest.files, **flush_and_hash(checkpoint, files)})
    (checkpoint / MANIFEST).write_bytes(manifest_bytes(manifest))
    open_checkpoint(checkpoint)


@pytest.mark.processes
def test_a_rank_runs_nothing_that_stands_in_a_checkpoint(trained: TrainConfig, trap: Path) -> None:
    """The random state is read last; that it is refused shows that all else was read."""
    copies = hostile_copies(trained, trap)
    assert RANDOM_STATE in copies
    unfinished = replace(trained, trainer=replace(trained.trainer, max_steps=2))

    def resume() -> dict[str, str]:
        said = {}
        for kind, (checkpoint, _) in copies.items():
            with pytest.raises(CheckpointError) as raised:
                train_rank(unfinished, Start(checkpoint), SignalFlag())
            said[kind] = str(raised.value)
        return said

    for said in run_distributed(resume, trained.world_size):
        for kind, (_, files) in copies.items():
            assert said[kind] in [refusal(file) for file in files]


def test_a_name_in_a_checkpoint_is_not_a_path(tmp_path: Path) -> None:
    """DeepSpeed's converter makes a folder for each parameter."""
    path = tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"param_shapes": [{"../../outside": torch.Size([2])}]}, path)
    with pytest.raises(CheckpointError, match=r"model_states.pt is refused.*'../../outside' is a path"):
        plain.load_plain(path)
    torch.save({"param_shapes": [{"inside.weight": torch.Size([2])}]}, path)
    assert plain.load_plain(path) == {"param_shapes": [{"inside.weight": torch.Size([2])}]}


@pytest.mark.processes
def test_an_export_or_resharding_runs_nothing_that_stands_in_a_checkpoint(trained: TrainConfig, trap: Path) -> None:
    wanted = trained.run_dir / HF_FOLDER, (consolidate.WEIGHTS, *MOMENTS)
    for kind, (checkpoint, files) in hostile_copies(trained, trap).items():
        if kind == RANDOM_STATE:  # never opened
            consolidate.consolidated_tensors(open_checkpoint(checkpoint), *wanted)
            continue
        with pytest.raises(CheckpointError) as raised:
            consolidate.consolidated_tensors(open_checkpoint(checkpoint), *wanted)
        assert str(raised.value).endswith(tuple(map(refusal, files)))


@pytest.mark.processes
@pytest.mark.parametrize("trained", ["zero2 bf16", "zero3"], indirect=True)
def test_a_process_of_its_own_converts_and_refuses_as_the_tests_do_in_theirs(
    trained: TrainConfig, trap: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = trained.run_dir / HF_FOLDER, (consolidate.WEIGHTS, *MOMENTS)
    checkpoint = open_checkpoint(checkpoint_folder(trained.run_dir, 1))
    expected = consolidate.consolidated_tensors(checkpoint, *wanted)
    monkeypatch.setattr(consolidate, "subprocess", subprocess)
    torch.testing.assert_close(consolidate.consolidated_tensors(checkpoint, *wanted), expected, rtol=0, atol=0)
    hostile, files = hostile_copies(trained, trap)["*optim_states.pt"]
    with pytest.raises(CheckpointError) as raised:
        consolidate.consolidated_tensors(open_checkpoint(hostile), *wanted)
    assert str(raised.value).endswith(tuple(map(refusal, files)))


def refusal(file: Path) -> str:
    return f"{file} is refused, nothing of it has been run: posix.mkdir is neither a tensor nor a plain value"


@pytest.mark.parametrize("trained", ["zero1"], indirect=True)
def test_commands_refuse_a_hostile_checkpoint_with_the_exit_code_for_checkpoints(
    runs: Runs, trained: TrainConfig, trap: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only rank 1 reads the file. Rank 0 fails with it, with the code for a bug."""
    theirs = checkpoint_folder(trained.run_dir, 1)
    (file,) = theirs.rglob("zero_pp_rank_1_*_optim_states.pt")
    make_hostile(theirs, [file], trap)
    said = runs.train("mine", "strategy=zero1", f"resume={theirs}", "trainer.max_steps=2", code=4).stderr
    assert f"rank 1: {refusal(file)}" in said
    assert main(["export", f"run={trained.run_dir}", f"out={runs.root / 'out'}"]) == 4
    assert refusal(file) in capsys.readouterr().err
    assert not (runs.root / "out").exists()


@pytest.mark.filterwarnings("ignore")
def test_no_form_of_a_file_runs_code(trap: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    pickles = [pickle.dumps(Hostile(trap), protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for content in (*pickles, b""):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{file} is refused"):
            plain.load_plain(file)
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), file)
    with pytest.raises(CheckpointError, match=f"{file} is refused"):
        plain.load_plain(file)


def test_other_loads_are_as_before_when_training_is_over(tmp_path: Path) -> None:
    before = torch.load
    with plain.plain_loads():
        assert torch.load is not before
    assert torch.load is before


def test_pickled_weights_of_a_base_are_read_only_if_they_hold_tensors_alone(tmp_path: Path, trap: Path) -> None:
    base = base_folder(tmp_path / "base", small_bpe())
    expected = load_model(str(base)).state_dict()
    (base / "model.safetensors").unlink()
    torch.save(expected, base / "pytorch_model.bin")
    assert load_model(str(base)).state_dict().keys() == expected.keys()
    for content in (pickle.dumps(Hostile(trap)), b"version https://git-lfs.github.com/spec/v1\n", b""):
        (base / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(ConfigError, match="nothing of it has been run"):
            load_model(str(base))


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_model_that_brings_its_own_code_is_refused_without_asking(
    load: Callable[[str], object], tmp_path: Path, trap: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda question: "y")
    names = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model", "AutoTokenizer": ["own.Tokenizer", None]}
    described = {"model_type": "own", "auto_map": names}
    (tmp_path / "config.json").write_text(json.dumps(described))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(described))
    (tmp_path / "own.py").write_text(f"import os\nos.mkdir({str(trap)!r})\n")
    with pytest.raises(ConfigError, match="custom code"):
        load(str(tmp_path))
