"""A Flax checkpoint becomes a Hugging Face folder, and training continues from it as if uninterrupted.

The original's libraries wrote `data/flax_checkpoint` (`make_flax_checkpoint.py`).
"""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.runs import Runs
from tools.make_flax_checkpoint import ACCUMULATION, BETAS, CLIP, MICRO_STEPS, OUT, UPDATES, gradient
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2Config, GPTNeoForCausalLM

from clippy_train.cli import main
from clippy_train.compose import compose
from clippy_train.config import ImportConfig, OptimConfig, TrainConfig
from clippy_train.errors import CheckpointError, ConfigError
from clippy_train.hf.export import load_checkpoint_model
from clippy_train.hf.import_flax import import_flax, read_tree
from clippy_train.model.load import generation_config
from clippy_train.optim import build_optimizer, lr_at
from clippy_train.run.checkpoint import open_checkpoint
from clippy_train.run.folder import STATE, checkpoint_folder
from clippy_train.run.moments import OPTIMIZER, open_base_state
from clippy_train.tokenizer import load_tokenizer
from clippy_train.train.callbacks.progress import fresh_cursors
from clippy_train.train.data import DataModule

ARRAY = 1  # Flax's extension type of an array


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The imported folder; do not write to it."""
    out = tmp_path_factory.mktemp("imported") / "hf"
    import_flax(ImportConfig(flax=str(OUT), out=str(out)))
    return out


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the checkpoint folder, to be damaged."""
    return shutil.copytree(OUT, tmp_path / "flax")


def flax_leaves() -> dict[tuple[str, ...], np.ndarray]:
    """The weights of the checkpoint by Flax's names, sorted by them."""

    def walk(node: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
        if isinstance(node, dict):
            for name, value in node.items():
                yield from walk(value, (*path, name))
        else:
            shape, kind, values = msgpack.unpackb(node.data)
            yield path, np.frombuffer(values, kind).reshape(shape)

    return dict(sorted(walk(msgpack.unpackb((OUT / "flax_model.msgpack").read_bytes()), ())))


def in_torch(leaves: dict[tuple[str, ...], np.ndarray]) -> dict[str, Tensor]:
    """Flax's leaves by PyTorch's names; a Dense kernel is `[in, out]` in Flax and `[out, in]` in PyTorch."""
    named = {}
    for (*modules, leaf), value in leaves.items():
        kind = "bias" if leaf == "bias" else "weight"
        named[".".join([*modules, kind])] = torch.from_numpy((value.T if leaf == "kernel" else value).copy())
    return named


def recomputed_moments() -> dict[str, dict[str, Tensor]]:
    """Adam's moments after the recorded updates, in float64 from their synthetic gradients."""
    leaves = flax_leaves()
    first = {name: np.zeros(leaf.shape) for name, leaf in leaves.items()}
    second = {name: np.zeros(leaf.shape) for name, leaf in leaves.items()}
    clipped = []
    for update in range(UPDATES):
        micro_steps = range(update * ACCUMULATION, (update + 1) * ACCUMULATION)
        means = {
            name: np.mean([gradient(step, index, leaf.size) for step in micro_steps], axis=0, dtype=np.float64)
            for index, (name, leaf) in enumerate(leaves.items())
        }
        norm = np.sqrt(sum(np.square(mean).sum() for mean in means.values()))
        clipped.append(norm > CLIP)
        for name, mean in means.items():
            mean = mean.reshape(leaves[name].shape) * min(1.0, CLIP / norm)
            first[name] = BETAS[0] * first[name] + (1 - BETAS[0]) * mean
            second[name] = BETAS[1] * second[name] + (1 - BETAS[1]) * mean**2
    assert set(clipped) == {True, False}
    return {"exp_avg": in_torch(first), "exp_avg_sq": in_torch(second)}


# The contents of an imported folder


def test_every_weight_is_the_flax_leaf_of_its_name_with_kernels_transposed(imported: Path) -> None:
    expected = in_torch(flax_leaves())
    stored = load_file(imported / "model.safetensors")
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], expected[name]) for name in expected)
    assert len({path.stat().st_mode for path in imported.iterdir()}) == 1  # all can be read by the same users


@torch.no_grad()
def test_plain_transformers_computes_the_logits_that_flax_recorded(imported: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(imported)
    assert model.dtype == torch.float32
    with np.load(OUT / "logits.npz") as recorded:
        logits = model(torch.from_numpy(recorded["input_ids"])).logits[:, -recorded["logits"].shape[1] :]
        np.testing.assert_allclose(logits, recorded["logits"], atol=2e-5, rtol=0)
        assert np.abs(recorded["logits"]).max() > 1  # the scale to which 2e-5 compares
    assert generation_config(model).eos_token_id == GenerationConfig.from_pretrained(OUT).eos_token_id == 511


@pytest.mark.parametrize("written", ["opt_state.msgpack", "opt_state_0_3_4.msgpack"])
def test_step_and_moments_are_those_of_the_updates_made(written: str, source: Path, tmp_path: Path) -> None:
    """Written by a current Flax and by that of 2021, both with the embedding in chunks."""
    assert b"__msgpack_chunked_array__" in (source / written).read_bytes()
    (source / written).rename(source / "opt_state.msgpack")
    summary = import_flax(ImportConfig(flax=str(source), out=str(tmp_path / "hf")))
    assert f"step {UPDATES} " in summary
    assert f"{MICRO_STEPS - ACCUMULATION * UPDATES} further micro-steps are dropped" in summary

    assert open_base_state(tmp_path / "hf").step == UPDATES
    stored = load_file(tmp_path / "hf" / OPTIMIZER)
    expected = recomputed_moments()
    assert stored.keys() == {f"{moment}.{name}" for moment, tensors in expected.items() for name in tensors}
    for moment, tensors in expected.items():
        for name, tensor in tensors.items():
            largest = tensor.abs().max().item()
            np.testing.assert_allclose(stored[f"{moment}.{name}"], tensor, rtol=1e-5, atol=1e-6 * largest)


def test_every_type_that_flax_writes_is_read() -> None:
    kinds = read_tree(OUT / "kinds.msgpack")
    np.testing.assert_allclose(kinds["bfloat16"], [[1.0, -2.5], [3.0e38, 0.0]], rtol=2**-8)
    assert (kinds["float16"] == [0.5, 2.0]).all()
    assert kinds["scalar"] == 1.5
    assert kinds["empty"].shape == (0, 3)


def test_without_an_optimizer_state_only_the_weights_are_imported(source: Path, tmp_path: Path) -> None:
    (source / "opt_state.msgpack").unlink()
    (source / "training_state.json").unlink()
    (source / "generation_config.json").unlink()
    import_flax(ImportConfig(flax=str(source), out=str(tmp_path / "hf")))
    assert not (tmp_path / "hf" / OPTIMIZER).exists()
    assert GenerationConfig.from_pretrained(tmp_path / "hf").eos_token_id == 511
    with pytest.raises(ConfigError, match="base_optimizer"):
        open_base_state(tmp_path / "hf")


def test_the_tokenizer_is_imported_too(source: Path, tiny_tokenizer: Path, tmp_path: Path) -> None:
    AutoTokenizer.from_pretrained(tiny_tokenizer).save_pretrained(source)
    assert main(["import", f"flax={source}", f"out={tmp_path / 'hf'}"]) == 0
    text = "def f():\n        return '  '\n"
    assert AutoTokenizer.from_pretrained(tmp_path / "hf")(text) == AutoTokenizer.from_pretrained(tiny_tokenizer)(text)


# What is refused


Tree = dict[str, Any]
Damage = Callable[[Path], object]  # of a checkpoint folder


def edited(path: Path, change: Callable[[Tree], object]) -> None:
    """Change the tree in a file without decoding its arrays."""
    tree = msgpack.unpackb(path.read_bytes())
    change(tree)
    path.write_bytes(msgpack.packb(tree))


def array(values: np.ndarray) -> msgpack.ExtType:
    return msgpack.ExtType(ARRAY, msgpack.packb((values.shape, values.dtype.name, values.tobytes())))


def weights(change: Callable[[Tree], object]) -> Damage:
    return lambda folder: edited(folder / "flax_model.msgpack", lambda tree: change(tree["transformer"]))


def adam(change: Callable[[Tree], object]) -> Damage:
    state = ["inner_opt_state", "1", "0"]  # of MultiSteps, the chain and AdamW
    return lambda folder: edited(folder / "opt_state.msgpack", lambda tree: change(inside(tree, state)))


def inside(tree: Tree, path: list[str]) -> Tree:
    for key in path:
        tree = tree[key]
    return tree


def cut(name: str, share: float) -> Damage:
    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return change


def with_config(**changes: Any) -> Damage:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


NOT_A_CHECKPOINT: dict[str, tuple[Damage, str]] = {
    "no such folder": (shutil.rmtree, "no such folder"),
    "no weights": (lambda folder: (folder / "flax_model.msgpack").unlink(), "flax_model.msgpack"),
    "config that is not JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
    "config that contradicts itself": (with_config(num_layers=3), "`config.num_layers = 3`"),
    "config of no model": (with_config(hidden_size=9), "no model can be built from config.json"),
    "another model": (lambda folder: GPT2Config().save_pretrained(folder), "gpt2 model, not GPT-Neo"),
}
DAMAGED: dict[str, tuple[Damage, str]] = {
    "truncated weights": (cut("flax_model.msgpack", 0.5), "flax_model.msgpack is damaged"),
    "empty weights": (cut("flax_model.msgpack", 0), "flax_model.msgpack is damaged"),
    "truncated moments": (cut("opt_state.msgpack", 0.99), "opt_state.msgpack is damaged"),
    "not msgpack": (lambda folder: (folder / "flax_model.msgpack").write_bytes(b"\x80\x04K\x01."), "is damaged"),
    "a list": (lambda folder: (folder / "flax_model.msgpack").write_bytes(msgpack.packb([1])), "not a dictionary"),
    "a missing tensor": (weights(lambda tree: tree["ln_f"].pop("bias")), "transformer.ln_f.bias is missing"),
    "a missing layer": (weights(lambda tree: tree["h"].pop("1")), "and 8 more"),
    "a layer too many": (weights(lambda tree: tree["h"].update({"2": tree["h"]["1"]})), "h/2/attn"),
    "a tensor of another kind": (
        weights(lambda tree: tree["ln_f"].update(table=tree["ln_f"]["bias"])),
        "transformer/ln_f/table is not a tensor of GPT-Neo",
    ),
    "two tensors for one": (
        weights(lambda tree: tree["ln_f"].update(kernel=tree["ln_f"]["scale"])),
        "transformer/ln_f/kernel is unused",
    ),
    "another shape": (
        weights(lambda tree: tree["wpe"].update(embedding=array(np.zeros((65, 8), np.float32)))),
        "transformer/wpe/embedding has shape (65, 8), not (64, 8)",
    ),
    "integers": (
        weights(lambda tree: tree["wpe"].update(embedding=array(np.zeros((64, 8), np.int32)))),
        "transformer/wpe/embedding",
    ),
    "a missing moment": (adam(lambda state: state["nu"]["transformer"]["ln_f"].pop("bias")), "opt_state.msgpack"),
    "a moment of another shape": (
        adam(lambda state: state["mu"]["transformer"]["ln_f"].update(bias=array(np.zeros(9, np.float32)))),
        "transformer/ln_f/bias has shape (9,), not (8,)",
    ),
    "another optimizer": (adam(lambda state: state.pop("nu")), "0 Adam states"),
    "a counter that is not a number": (adam(lambda state: state.update(count="three")), "a counter is not a number"),
    "another checkpoint's step": (
        lambda folder: (folder / "training_state.json").write_text('{"step": 2}'),
        "micro-step 2 is before update 3",
    ),
    "a training state without a step": (
        lambda folder: (folder / "training_state.json").write_text("{}"),
        "training_state.json",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NOT_A_CHECKPOINT, *DAMAGED])
def test_a_bad_checkpoint_is_named_and_leaves_nothing_behind(
    name: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, expected = {**NOT_A_CHECKPOINT, **DAMAGED}[name]
    change(source)
    (tmp_path / "new").mkdir()
    code = main(["import", f"flax={source}", f"out={tmp_path / 'new' / 'hf'}"])
    assert code == (ConfigError if name in NOT_A_CHECKPOINT else CheckpointError).exit_code
    assert expected in capsys.readouterr().err
    assert not list((tmp_path / "new").iterdir())


def test_corrupt_bytes_are_read_or_refused_but_never_crash(source: Path) -> None:
    path, content = source / "flax_model.msgpack", (OUT / "flax_model.msgpack").read_bytes()
    rng, refused = random.Random(0), 0
    for _ in range(300):
        flipped = bytearray(content)
        for _ in range(30):
            flipped[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(flipped)
        try:
            read_tree(path)
        except CheckpointError:
            refused += 1
    assert refused > 100


def test_nothing_in_a_file_can_run_code(source: Path) -> None:
    for kind in ("object", "O", "V8"):
        content = msgpack.packb({"wte": msgpack.ExtType(ARRAY, msgpack.packb(((1,), kind, b"\0" * 8)))})
        (source / "flax_model.msgpack").write_bytes(content)
        with pytest.raises(CheckpointError):
            import_flax(ImportConfig(flax=str(source), out=str(source / "out")))


# Training from an imported folder

FIRST = UPDATES  # index of the first update made here
CONTINUE = [
    "model.base_optimizer=continue", "model.hidden_size=8", "data.streams=6", "trainer.global_batch_size=12",
    "trainer.max_steps=5", "trainer.log_every_steps=1", "checkpoint.every_steps=1", "checkpoint.keep_last=5",
    "optim.decay_steps=6",
]  # fmt: skip
LAYOUTS = {
    "single": ["strategy=single", "trainer.devices=1"],
    "ddp": ["strategy=ddp"],
    "zero1": ["strategy=zero1"],
    "zero3": ["strategy=zero3", "trainer.devices=3"],  # a bias of 8 elements over three ranks
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, tiny_tokenizer: Path, imported: Path) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("continue"), tiny_corpus, tiny_tokenizer)
    runs.settings += [f"model.base={imported}", *CONTINUE]
    return runs


def checkpoint_weights(runs: Runs, name: str, step: int) -> dict[str, Tensor]:
    checkpoint = open_checkpoint(checkpoint_folder(runs.folder(name), step))
    model = load_checkpoint_model(runs.folder(name) / "hf", checkpoint)
    return {key: parameter.detach() for key, parameter in model.named_parameters()}


def first_rows(config: TrainConfig) -> Tensor:
    """The sequences of a run's first optimizer step, `[global_batch, seq]`."""
    tokenizer = load_tokenizer(str(config.tokenizer.base))
    data = DataModule(config, tokenizer, 0, fresh_cursors(config.data.streams))
    batches = iter(data.train_dataloader())
    return torch.cat([next(batches)["input_ids"] for _ in range(config.micro_steps)])


@pytest.fixture(scope="module")
def expected_update(runs: Runs) -> tuple[dict[str, Tensor], OptimConfig]:
    """The weights after one update of torch's AdamW from the imported state, on the run's first sequences."""
    settings = [*runs.settings, *LAYOUTS["single"], "data.num_workers=0"]
    config = compose(TrainConfig, settings)
    model = GPTNeoForCausalLM.from_pretrained(str(config.model.base))
    rows = first_rows(config)
    model(rows, labels=rows).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
    optimizer = build_optimizer(model, config.optim)
    moments = recomputed_moments()
    for name, parameter in model.named_parameters():
        state = {moment: tensors[name].float() for moment, tensors in moments.items()}
        optimizer.state[parameter] = {"step": torch.tensor(float(UPDATES)), **state}
    for group in optimizer.param_groups:
        group["lr"] = lr_at(FIRST, config.optim)
    optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}, config.optim


@pytest.mark.parametrize("strategy", LAYOUTS)
def test_the_first_update_is_that_of_an_uninterrupted_adamw(
    runs: Runs, expected_update: tuple[dict[str, Tensor], OptimConfig], strategy: str
) -> None:
    weights, optim = expected_update
    output = runs.train(strategy, "trainer.precision=fp32", *LAYOUTS[strategy]).stdout
    assert f"starting runs/{strategy} at step {UPDATES} with the moments in" in output
    assert "data start from the beginning" in output
    rows = runs.rows(strategy)
    assert [row["step"] for row in rows] == [UPDATES + 1, UPDATES + 2]
    assert [row["train/lr"] for row in rows] == pytest.approx([lr_at(FIRST, optim), lr_at(FIRST + 1, optim)], rel=1e-12)
    assert rows[0]["tokens"] == (UPDATES + 1) * 12 * 32
    assert [row["step"] for row in runs.rows(strategy, "val/loss")] == [3, 4, 5]
    first = checkpoint_weights(runs, strategy, UPDATES + 1)
    assert first.keys() == weights.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=1e-6, msg=partial("{}: {}".format, name))


def test_an_interrupted_continuation_resumes_from_its_own_checkpoint(runs: Runs) -> None:
    name, settings = "twice", ["trainer.precision=fp32", *LAYOUTS["zero1"]]
    runs.train(name, *settings, "trainer.max_steps=4")
    assert "from step 4" in runs.train(name, *settings).stdout
    runs.train("zero1", *settings)  # does nothing if the test above has run
    once, twice = (checkpoint_weights(runs, each, 5) for each in ("zero1", name))
    assert all(torch.equal(once[key], twice[key]) for key in once)
    assert [row["train/loss"] for row in runs.rows(name)] == [row["train/loss"] for row in runs.rows("zero1")]
    state = checkpoint_folder(runs.folder(name), 5) / STATE / "checkpoint" / "mp_rank_00_model_states.pt"
    assert torch.load(state, weights_only=False)["global_steps"] == 5  # DeepSpeed's own count


@pytest.mark.parametrize("strategy", ["zero1", "zero3"])
def test_a_bf16_run_continues_from_the_fp32_weights(runs: Runs, imported: Path, strategy: str) -> None:
    """With a learning rate of 0 they must not change; DeepSpeed by itself would round them to bf16."""
    name = f"bf16-{strategy}"
    runs.train(name, *LAYOUTS[strategy], "optim.lr=0", "trainer.max_steps=4")
    expected = load_file(imported / "model.safetensors")
    found = checkpoint_weights(runs, name, 4)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_by_default_only_the_weights_of_a_base_are_used(runs: Runs) -> None:
    runs.train("ignore", "model.base_optimizer=ignore", "trainer.max_steps=1", *LAYOUTS["single"])
    assert [(row["step"], row["train/lr"]) for row in runs.rows("ignore")] == [(1, 0.0)]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["trainer.max_steps=3"], "is at step 3"),
        (["model.base_optimizer=continue", "model.base=null"], "needs a model.base"),
    ],
)
def test_a_state_that_cannot_be_continued_is_refused_before_anything_starts(
    runs: Runs, overrides: list[str], expected: str
) -> None:
    assert expected in runs.train("refused", *overrides, code=2).stderr
    assert not runs.folder("refused").exists()


def test_a_base_without_a_state_or_with_a_damaged_one_is_refused(runs: Runs, imported: Path) -> None:
    base = shutil.copytree(imported, runs.root / "base")
    content = (base / OPTIMIZER).read_bytes()
    for damaged in (content[:-1], content[:100], b"", None):
        (base / OPTIMIZER).unlink() if damaged is None else (base / OPTIMIZER).write_bytes(damaged)
        with pytest.raises(ConfigError, match="cannot read an optimizer state"):
            open_base_state(base)
    assert "clippy import" in runs.train("refused", f"model.base={base}", code=2).stderr


def test_a_state_of_another_model_is_refused(imported: Path) -> None:
    model, state = AutoModelForCausalLM.from_pretrained(imported), open_base_state(imported)
    state.require_fit(model.named_parameters())
    model.resize_token_embeddings(524, mean_resizing=False)  # the effect of adding four tokens
    with pytest.raises(ConfigError, match=r"wte.weight: \[520, 8\] there, \[524, 8\] here"):
        state.require_fit(model.named_parameters())


def test_the_fixture_is_a_checkpoint_between_two_updates() -> None:
    assert json.loads((OUT / "training_state.json").read_text()) == {"step": MICRO_STEPS}
    assert MICRO_STEPS % ACCUMULATION
