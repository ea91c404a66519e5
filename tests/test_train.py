"""Training as a user runs it: the command line, two DeepSpeed ZeRO ranks, real files and signals."""

import asyncio
import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from support.damage import DAMAGE, flip
from support.runs import Runs, end, losses_and_norms, rank_pids, trained, weights, weights_hash
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoForCausalLM

from clippy_train.config import CorpusConfig, load
from clippy_train.corpus.build import build_corpus
from clippy_train.errors import CheckpointError
from clippy_train.hf.export import load_checkpoint_model
from clippy_train.model.build import build_model
from clippy_train.plan import checkpoint_bytes
from clippy_train.run.checkpoint import (
    find_checkpoint,
    open_checkpoint,
    read_checkpoint,
)
from clippy_train.run.folder import (
    LOCK,
    SAMPLES,
    STATE,
    checkpoint_folder,
    checkpoint_folders,
)
from clippy_train.run.rows import read_rows
from clippy_train.train.loggers import SETTINGS


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, tiny_tokenizer: Path) -> Runs:
    return Runs(tmp_path_factory.mktemp("train"), tiny_corpus, tiny_tokenizer)


@pytest.fixture(scope="module")
def reference(runs: Runs) -> str:
    """An uninterrupted run: two ranks, ZeRO-1, bf16, two loader processes, after an attempt without a checkpoint."""
    runs.folder("reference").mkdir(parents=True)
    (runs.folder("reference") / "metrics.jsonl").write_text(
        '{"step": 0, "val/loss": 9.0}\n{"step": 1, "train/loss": 9.0}\n'
    )
    runs.train("reference", "trainer.audit=true")
    return "reference"


def test_a_run_writes_the_documented_files(runs: Runs, reference: str) -> None:
    folder = runs.folder(reference)
    assert sorted(path.suffix == SETTINGS for path in folder.glob("events.out.*")) == [False, True]  # TensorBoard
    assert {path.name for path in folder.iterdir() if not path.name.startswith("events.out.")} == {
        LOCK,
        "config.yaml",
        "settings.jsonl",
        "start.json",
        "environment.json",
        "corpus.json",
        "metrics.jsonl",
        "ledger.jsonl",
        "checkpoints",
        "validation",
        "hf",
    }
    assert json.loads((folder / "environment.json").read_text())["packages"]["torch"] == torch.__version__
    assert [row["step"] for row in runs.rows(reference)] == [1, 2, 3, 4, 5, 6]
    last = runs.rows(reference)[-1]
    assert last["tokens"] == 6 * 8 * 32
    for name in ("train/lr", "train/grad_norm", "throughput/tokens_per_sec", "data/documents", "data/digest"):
        assert name in last


def test_validation_runs_before_the_first_step_on_its_interval_and_after_the_last(runs: Runs, reference: str) -> None:
    rows = runs.rows(reference, "val/loss")
    assert [row["step"] for row in rows] == [0, 4, 6]
    assert rows[-1]["val/bits_per_byte"] < rows[0]["val/bits_per_byte"]
    assert rows[0]["val/perplexity"] == pytest.approx(torch.tensor(rows[0]["val/loss"]).exp().item(), rel=1e-4)


def test_tensorboard_shows_the_numbers_of_the_metrics_file(runs: Runs, reference: str) -> None:
    events = EventAccumulator(str(runs.folder(reference)))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert shown == [(row["step"], pytest.approx(row["train/loss"])) for row in runs.rows(reference)]


def test_every_loss_and_digest_differs_from_step_to_step(runs: Runs, reference: str) -> None:
    rows = runs.rows(reference)
    assert len({row["data/digest"] for row in rows}) == len({row["train/loss"] for row in rows}) == len(rows)


def test_optimizer_state_is_partitioned_over_two_ranks(runs: Runs, reference: str) -> None:
    checkpoint = find_checkpoint(runs.folder(reference))
    assert checkpoint
    files = sorted((checkpoint.path / STATE / "checkpoint").glob("*optim_states.pt"))
    assert len(files) == 2
    sizes = [
        sum(
            part.numel()
            for part in torch.load(file, weights_only=False)["optimizer_state_dict"]["single_partition_of_fp32_groups"]
        )
        for file in files
    ]
    total = sum(tensor.numel() for tensor in weights(runs.folder(reference)).values())
    assert sizes[0] == sizes[1]
    assert total <= sum(sizes) < 1.01 * total + 64


def test_only_the_newest_checkpoints_are_kept(runs: Runs, reference: str) -> None:
    assert [path.name for path in checkpoint_folders(runs.folder(reference))] == ["step-00000006", "step-00000004"]


def test_the_same_command_on_a_finished_run_says_so(runs: Runs, reference: str) -> None:
    before = (runs.folder(reference) / "metrics.jsonl").read_bytes()
    assert "finished, step 6 of 6" in runs.train(reference, "trainer.audit=true").stdout
    assert (runs.folder(reference) / "metrics.jsonl").read_bytes() == before


def test_a_run_refuses_to_resume_with_another_model(runs: Runs, reference: str) -> None:
    before = (runs.folder(reference) / "config.yaml").read_bytes()
    refused = runs.train(reference, "trainer.audit=true", "trainer.max_steps=9", "model.num_heads=4", code=2)
    assert "model.num_heads was 2, is 4" in refused.stderr
    assert (runs.folder(reference) / "config.yaml").read_bytes() == before


def test_an_interrupted_run_resumes_bit_for_bit(runs: Runs, reference: str) -> None:
    name = "interrupted"
    process = runs.start(name, "trainer.audit=true")
    runs.wait_for_step(name, 1, process)
    assert end(process, signal.SIGTERM) == 75
    assert not rank_pids(runs.folder(name))
    stopped = runs.rows(name)[-1]["step"]
    assert 1 <= stopped < 6
    assert open_checkpoint(checkpoint_folders(runs.folder(name))[0]).manifest.step == stopped

    resumed = runs.train(name, "trainer.audit=true")
    assert f"resuming runs/{name} from step {stopped}" in resumed.stdout
    assert "_load_legacy_checkpoint" not in resumed.stdout  # printed by DeepSpeed
    assert list(map(trained, runs.rows(name))) == list(map(trained, runs.rows(reference)))
    assert runs.rows(name, "val/loss") == runs.rows(reference, "val/loss")
    assert weights_hash(runs.folder(name)) == weights_hash(runs.folder(reference))


def test_a_signal_before_the_first_step_leaves_no_checkpoint(runs: Runs) -> None:
    process = runs.start("early", "trainer.audit=true")
    while not rank_pids(runs.folder("early")):
        time.sleep(0.01)
    assert end(process, signal.SIGTERM) == 75
    assert not checkpoint_folders(runs.folder("early"))
    assert not runs.rows("early")


def test_one_command_at_a_time_trains_in_a_folder_and_no_rank_outlives_its_launcher(runs: Runs) -> None:
    process = runs.start_command("train", *runs.settings, "run.name=orphans", "trainer.max_steps=100000")
    runs.wait_for_step("orphans", 2, process)
    assert rank_pids(runs.folder("orphans"))

    refused = runs.train("orphans", "trainer.max_steps=50000", code=2)
    assert f"run.name=orphans: process {process.pid} on " in refused.stderr
    assert load(runs.folder("orphans") / "config.yaml").trainer.max_steps == 100000
    assert process.poll() is None

    process.kill()
    process.communicate()
    deadline = time.monotonic() + 20
    while rank_pids(runs.folder("orphans")):
        assert time.monotonic() < deadline, "ranks still run"
        time.sleep(0.1)


LAYOUTS = {
    "single-0": ["strategy=single", "trainer.devices=1", "data.num_workers=0"],
    "ddp-3": ["strategy=ddp", "data.num_workers=3", "trainer.micro_batch_size=4"],
    "zero2-4": ["strategy=zero2", "trainer.devices=4", "data.num_workers=0"],
    "zero3-2": ["strategy=zero3"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_neither_data_nor_first_weights_depend_on_ranks_strategy_or_loader_processes(
    runs: Runs, reference: str, layout: str
) -> None:
    """The first update has learning rate 0, so the fp32 weights after it are the initial ones."""
    runs.train(layout, "trainer.audit=true", "checkpoint.every_steps=1", "checkpoint.keep_last=6", *LAYOUTS[layout])
    assert [row["data/digest"] for row in runs.rows(layout)] == [row["data/digest"] for row in runs.rows(reference)]

    folder = runs.folder(layout)
    built, _ = build_model(load(folder / "config.yaml"))
    found = load_checkpoint_model(folder / "hf", open_checkpoint(checkpoint_folder(folder, 1))).state_dict()
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in built.parameters())
    assert all(torch.equal(found[name], tensor) for name, tensor in built.named_parameters())


@pytest.fixture(scope="module")
def single_fp32(runs: Runs) -> list[float]:
    runs.train("fp32-single", "trainer.audit=true", "trainer.precision=fp32", "strategy=single", "trainer.devices=1")
    return losses_and_norms(runs, "fp32-single")


@pytest.mark.parametrize("strategy", ["zero3", "ddp"])  # the others: test_parity.py
def test_strategies_agree_on_losses_and_gradient_norms_in_fp32(
    runs: Runs, single_fp32: list[float], strategy: str
) -> None:
    name = f"fp32-{strategy}"
    sampling = ["logger.sample_prompts=['def total(']", "logger.sample_tokens=4"]
    runs.train(name, "trainer.audit=true", "trainer.precision=fp32", f"strategy={strategy}", *sampling)
    assert losses_and_norms(runs, name) == pytest.approx(single_fp32, rel=1e-5)  # with and without samples
    expected = weights(runs.folder("fp32-single"))
    for key, tensor in weights(runs.folder(name)).items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-3, atol=2e-5)

    samples = list(read_rows(runs.folder(name) / SAMPLES))
    assert [row["step"] for row in samples] == [row["step"] for row in runs.rows(name, "val/loss")]
    assert samples[-1]["completion"] == greedy(runs.folder(name), samples[-1]["prompt"], 4)


def greedy(run_dir: Path, prompt: str, length: int) -> str:
    """Greedy completion of a prompt by a run's newest checkpoint, without a cache."""
    checkpoint = find_checkpoint(run_dir)
    assert checkpoint
    model = load_checkpoint_model(run_dir / "hf", checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "hf")
    prompt_ids = ids = tokenizer(prompt, return_tensors="pt").input_ids
    for _ in range(length):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    completion = tokenizer.decode(ids[0, prompt_ids.size(1) :])
    assert isinstance(completion, str)
    return completion.split(tokenizer.eos_token)[0]


def test_bf16_under_deepspeed_stays_near_fp32(runs: Runs, reference: str, single_fp32: list[float]) -> None:
    assert losses_and_norms(runs, reference) == pytest.approx(single_fp32, rel=0.02)


def test_a_damaged_checkpoint_is_skipped_and_named(runs: Runs, reference: str) -> None:
    folder = runs.folder("damaged")
    shutil.copytree(runs.folder(reference), folder)
    newest = checkpoint_folders(folder)[0]
    flip(next((newest / STATE / "checkpoint").glob("*_1_*optim_states.pt")))

    result = runs.train("damaged", "trainer.audit=true")
    assert f"{newest.name} is damaged" in result.stderr
    assert "from step 4" in result.stdout
    assert list(map(trained, runs.rows("damaged"))) == list(map(trained, runs.rows(reference)))
    assert runs.rows("damaged", "val/loss") == runs.rows(reference, "val/loss")  # step 4 has one
    assert weights_hash(folder) == weights_hash(runs.folder(reference))


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_to_any_file_of_a_checkpoint_is_detected(
    runs: Runs, reference: str, tmp_path: Path, damage: str
) -> None:
    newest, older = checkpoint_folders(runs.folder(reference))[:2]
    names = [path.relative_to(newest) for path in newest.rglob("*") if path.is_file()]
    assert len(names) == 7  # manifest, 2 random states, the name of the state, weights, 2 optimizer states
    for name in names:
        if damage == "swapped with an older one" and (newest / name).read_bytes() == (older / name).read_bytes():
            assert name.name == "latest"  # names the same state in every checkpoint: no damage
            continue
        run = tmp_path / str(name).replace("/", "-")
        for checkpoint in (newest, older):
            shutil.copytree(checkpoint, run / "checkpoints" / checkpoint.name)
        copy = run / "checkpoints" / newest.name
        DAMAGE[damage](copy / name, older / name)
        with pytest.raises(CheckpointError, match="is damaged"):
            open_checkpoint(copy)
        found = find_checkpoint(run)
        assert found
        assert found.manifest.step == open_checkpoint(older).manifest.step


def test_a_run_without_an_intact_checkpoint_never_restarts_silently(runs: Runs, reference: str) -> None:
    folder = runs.folder("ruined")
    shutil.copytree(runs.folder(reference), folder)
    for path in checkpoint_folders(folder):
        (path / "manifest.json").unlink()
    before = (folder / "metrics.jsonl").read_bytes()
    assert "no intact checkpoint" in runs.train("ruined", code=4).stderr
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_a_run_refuses_to_resume_with_other_data_or_another_optimizer(runs: Runs, reference: str) -> None:
    changed = runs.train(reference, "trainer.max_steps=8", "data.seq_len=16", code=2).stderr
    assert "data.seq_len was 32, is 16" in changed
    optimizer = runs.train(reference, "trainer.max_steps=8", "optim=adafactor", "optim.lr=0.005", code=2).stderr
    assert "optim.name was adamw, is adafactor" in optimizer


def test_a_run_refuses_to_resume_with_another_tokenizer(runs: Runs, reference: str) -> None:
    (base,) = (each.split("=")[1] for each in runs.settings if each.startswith("tokenizer.base="))
    other = shutil.copytree(base, runs.root / "other-tokenizer")
    content = json.loads((other / "tokenizer.json").read_text())
    merges = content["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]
    (other / "tokenizer.json").write_text(json.dumps(content))

    described = (runs.folder(reference) / "hf" / "tokenizer.json").read_bytes()
    result = runs.train(reference, "trainer.max_steps=8", f"tokenizer.base={other}", code=4)
    assert "trained with another tokenizer" in result.stderr
    assert (runs.folder(reference) / "hf" / "tokenizer.json").read_bytes() == described


def test_an_exported_run_loads_and_generates_in_plain_transformers(runs: Runs, reference: str) -> None:
    out = runs.root / "exported"
    assert "step 6" in runs.clippy("export", f"run=runs/{reference}", f"out={out}").stdout
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert isinstance(model, GPTNeoForCausalLM)
    assert model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()
    for name, tensor in weights(runs.folder(reference)).items():
        assert torch.equal(model.get_parameter(name), tensor)
    code = "def f(x):\n\tif x:\n        return  x\r\n"
    assert tokenizer.decode(tokenizer(code).input_ids, skip_special_tokens=True) == code
    prompt = "def greet(name):\n"
    said = runs.clippy("generate", f"model={out}", f"prompt={prompt}", "max_new_tokens=5").stdout
    assert said.startswith(prompt)
    assert len(said) > len(prompt) + 1


def test_the_recipes_own_model_takes_two_optimizer_steps(runs: Runs, tmp_path: Path) -> None:
    """GPT-Neo-125M's exact shape, random weights, short blocks, on CPU; in fp32 where bf16 takes minutes a step."""
    precision = "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"
    build_corpus(CorpusConfig(src=[str(Path(asyncio.__file__).parent)], out=str(tmp_path / "corpus")))
    tokenizer = AutoTokenizer.from_pretrained(runs.settings[-1].split("=")[1])
    tokenizer.add_tokens(
        [f"<unused-{i}>" for i in range(50257 - len(tokenizer) + 4)]
    )  # it already has the four whitespace tokens
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    runs.clippy(
        "train", "experiment=code_clippy_125m", "run.name=recipe", "model.base=null",
        f"tokenizer.base={tmp_path / 'tokenizer'}", f"data.path={tmp_path / 'corpus'}", "data.streams=1",
        "trainer.accelerator=cpu", "trainer.devices=1", "trainer.global_batch_size=1", "trainer.micro_batch_size=1",
        "trainer.eval_micro_batch_size=1", "trainer.val_samples=1", "trainer.max_steps=2", "trainer.log_every_steps=1",
        "optim.warmup_steps=1", "logger.sample_prompts=[]", "data.seq_len=128", f"trainer.precision={precision}",
    )  # fmt: skip
    first, second = runs.rows("recipe")
    assert first["tokens"] == 128
    assert first["train/lr"] == 0
    assert second["train/lr"] == 1e-4
    assert abs(first["train/loss"] - torch.tensor(50261.0).log().item()) < 0.3
    planned = checkpoint_bytes(125_201_664, load(runs.folder("recipe") / "config.yaml"))
    assert read_checkpoint(checkpoint_folders(runs.folder("recipe"))[0]).num_bytes == pytest.approx(planned, rel=0.01)
