"""Adafactor computes optax's updates, as the original did: in one process, and with its state partitioned over two."""

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.distributed import run_distributed
from support.models import gpt_neo
from support.runs import Runs, end, losses_and_norms, trained, weights, weights_hash
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from transformers import AutoModelForCausalLM, GPTNeoForCausalLM

from clippy_train.compose import compose
from clippy_train.config import OptimConfig, TrainConfig
from clippy_train.errors import ConfigError
from clippy_train.model.build import gpt_neo_config
from clippy_train.optim import Schedule, build_optimizer, clip_grad_norm
from clippy_train.train.module import CodeLM

NAMES = ("matrix", "narrow", "bias", "scale")
FACTORED_FROM = 128  # optax factors a matrix only if both sides are at least this long


class Trace:
    """Ten updates of optax, recorded by `make_adafactor_trace.py`, which describes the file."""

    def __init__(self) -> None:
        self.file = np.load(Path(__file__).parent / "data" / "adafactor_trace.npz")
        self.grad_norms, self.lr = self.file["grad_norm"], self.file["lr"]
        self.settings = OptimConfig(
            name="adafactor",
            lr=self.file["peak"].item(),
            warmup_steps=self.file["warmup_steps"].item(),
            decay_steps=self.file["decay_steps"].item(),
            min_lr_ratio=self.file["min_lr_ratio"].item(),
            grad_clip=1.0,
        )

    def start(self, name: str) -> Tensor:
        return torch.from_numpy(self.file[f"{name}/start"] * self.file["weight_scale"][NAMES.index(name)])

    def gradient(self, name: str, update: int) -> Tensor:
        return torch.from_numpy(self.file[f"{name}/gradients"][update] * self.file["gradient_scale"][update])

    def weights(self, name: str) -> Tensor:
        """Weights after each update, `[updates, *shape]`; of matrices only after the last, `[1, *shape]`."""
        return torch.from_numpy(self.file[f"{name}/weights"])

    def sizes(self, name: str) -> list[float]:
        """Root mean square of each update's change."""
        return list(map(float, self.file[f"{name}/size"]))


TRACE = Trace()


class Replay:
    """Our optimizer, schedule and clipping on the recorded gradients, optionally with every matrix transposed."""

    def __init__(self, transposed: bool) -> None:
        def orient(tensor: Tensor) -> Tensor:
            return tensor.mT.contiguous() if transposed and tensor.ndim == 2 else tensor

        model = nn.ParameterDict({name: orient(TRACE.start(name)) for name in NAMES})
        optimizer = build_optimizer(model, TRACE.settings)
        schedule = Schedule(optimizer, TRACE.settings)
        self.grad_norms: list[float] = []
        self.lr: list[float] = []
        self.weights: dict[str, list[Tensor]] = {name: [] for name in NAMES}
        self.sizes: dict[str, list[float]] = {name: [] for name in NAMES}
        for update in range(len(TRACE.lr)):
            before = {name: model[name].detach().clone() for name in NAMES}
            for name in NAMES:
                model[name].grad = orient(TRACE.gradient(name, update))
            self.grad_norms.append(clip_grad_norm(model.parameters(), TRACE.settings.grad_clip).item())
            self.lr.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
            for name in NAMES:
                self.weights[name].append(orient(model[name].detach().clone()))
                self.sizes[name].append((model[name].detach() - before[name]).double().square().mean().sqrt().item())


@pytest.fixture(scope="module", params=[False, True], ids=["as recorded", "transposed"])
def replay(request: pytest.FixtureRequest) -> Replay:
    """Both orientations, because the original's kernels are [in, out] and ours [out, in]."""
    return Replay(transposed=request.param)


def test_the_recording_covers_clipping_and_factoring() -> None:
    assert TRACE.lr[0] == 0
    assert len(set(TRACE.lr)) > 5
    assert max(TRACE.grad_norms) > TRACE.settings.grad_clip > min(TRACE.grad_norms)
    assert min(TRACE.start("matrix").shape) >= FACTORED_FROM > min(TRACE.start("narrow").shape)
    assert TRACE.start("bias").abs().max() == 0  # its size counts as 1e-3
    per_lr = np.array(TRACE.sizes("scale")[1:]) / TRACE.lr[1:] / 0.3  # an update clipped to 1 gives about 1
    assert min(per_lr) < 0.6 < 0.95 < max(per_lr)


def test_norms_and_learning_rates_match_optax(replay: Replay) -> None:
    assert replay.grad_norms == pytest.approx(TRACE.grad_norms, rel=1e-6)
    assert replay.lr == pytest.approx(TRACE.lr, abs=2**-23 * TRACE.settings.lr)  # optax's schedule is fp32


@pytest.mark.parametrize("name", ["matrix", "bias", "scale"])
def test_the_size_of_every_update_matches_optax(replay: Replay, name: str) -> None:
    assert replay.sizes[name] == pytest.approx(TRACE.sizes(name), rel=2e-6, abs=0)  # measured: 4e-7


@pytest.mark.parametrize("name", ["matrix", "bias", "scale"])
def test_weights_match_optax(replay: Replay, name: str) -> None:
    """Within one fp32 rounding of the largest weight per update (measured: a third of that)."""
    expected = TRACE.weights(name)
    ours = torch.stack(replay.weights[name][-len(expected) :])
    assert (ours - expected).abs().max() <= len(TRACE.lr) * 2**-24 * expected.abs().max()
    assert (ours[-1] - TRACE.start(name)).abs().max() > 1e4 * 2**-24 * expected.abs().max()


def test_a_matrix_with_a_side_below_128_is_factored_here_and_not_in_optax(replay: Replay) -> None:
    """A known difference: the updates of such a matrix have another direction. GPT-Neo-125M has none."""
    ours, expected = (
        each - TRACE.start("narrow") for each in (replay.weights["narrow"][-1], TRACE.weights("narrow")[-1])
    )
    assert 0.02 < (ours - expected).norm() / expected.norm() < 0.5


@pytest.mark.parametrize("experiment", ["code_clippy_125m", "code_clippy_1_3b"])
def test_every_matrix_of_the_recipes_models_is_factored_in_optax_too(experiment: str) -> None:
    settings = compose(TrainConfig, [f"experiment={experiment}"]).model
    with torch.device("meta"):
        model = GPTNeoForCausalLM(gpt_neo_config(settings, vocab_size=settings.vocab_size))
    assert {parameter.ndim for parameter in model.parameters()} == {1, 2}
    assert min(min(parameter.shape) for parameter in model.parameters() if parameter.ndim == 2) >= FACTORED_FROM


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["optim=adafactor", "optim.weight_decay=0.1"], "optim.weight_decay is set, but only AdamW has it"),
        (["optim=adafactor", "optim.betas=[0.9,0.95]"], "optim.betas is set"),
        (["optim=adafactor", "optim.eps=0"], "optim.eps is set"),
        (["optim.name=adafactor"], "choose optim=adamw or optim=adafactor"),
        (["optim=adafactor", "optim.name=adamw"], "optim.betas is not set"),
        (["optim=adafactor", "strategy=zero2"], "choose strategy=zero1 or ddp"),
        (["optim=adafactor", "strategy=zero3"], "choose strategy=zero1 or ddp"),
    ],
)
def test_settings_that_adafactor_lacks_are_rejected(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose(TrainConfig, ["experiment=demo", *overrides])
    assert expected in str(error.value)


def updated(strategy: str) -> tuple[GPTNeoForCausalLM, torch.optim.Optimizer]:
    """A model after two updates by the optimizer that a run with this strategy builds, and the optimizer."""
    config = compose(
        TrainConfig,
        ["experiment=demo", "trainer.devices=1", "optim=adafactor", "optim.warmup_steps=0", f"strategy={strategy}"],
    )
    torch.manual_seed(0)
    module = CodeLM(config, gpt_neo(), np.ones(97, dtype=np.int32))
    chosen: Any = module.configure_optimizers()  # a dict, one of the many types that Lightning allows
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        for parameter in module.model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        chosen["optimizer"].step()
        chosen["lr_scheduler"]["scheduler"].step()
    return module.model, chosen["optimizer"]


def update_on_rank() -> tuple[list[str], dict[str, np.ndarray]]:
    """The names of the tensors whose optimizer state this rank holds, and all weights."""
    model, optimizer = updated("zero1")
    assert isinstance(optimizer, ZeroRedundancyOptimizer)
    held = [name for name, parameter in model.named_parameters() if parameter in optimizer.optim.state]
    return held, {name: tensor.numpy() for name, tensor in model.state_dict().items()}


@pytest.mark.processes
def test_each_tensors_state_is_on_one_of_two_ranks_and_its_update_on_both() -> None:
    (first, state), (second, same) = run_distributed(update_on_rank, 2)
    model, _ = updated("single")
    assert sorted(first + second) == sorted(name for name, _ in model.named_parameters())
    held, total = (sum(model.get_parameter(name).numel() for name in names) for names in (first, first + second))
    assert 0.4 < held / total < 0.6
    for name, tensor in model.state_dict().items():
        assert np.array_equal(state[name], tensor)
        assert np.array_equal(same[name], tensor)


ADAFACTOR = ["optim=adafactor", "optim.lr=1e-2", "trainer.audit=true", "trainer.precision=fp32"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, tiny_tokenizer: Path) -> Runs:
    return Runs(tmp_path_factory.mktemp("adafactor"), tiny_corpus, tiny_tokenizer)


@pytest.fixture(scope="module")
def zero1(runs: Runs) -> str:
    """The name of an uninterrupted run on two ranks with partitioned state."""
    runs.train("zero1", *ADAFACTOR, "strategy=zero1")
    return "zero1"


@pytest.fixture(scope="module")
def single(runs: Runs) -> str:
    runs.train("single", *ADAFACTOR, "strategy=single", "trainer.devices=1")
    return "single"


def test_two_ranks_train_like_one_process(runs: Runs, single: str, zero1: str) -> None:
    runs.train("ddp", *ADAFACTOR, "strategy=ddp")
    alone = weights(runs.folder(single))
    for name in ("ddp", zero1):
        assert losses_and_norms(runs, name) == pytest.approx(losses_and_norms(runs, single), rel=1e-5)
        for key, tensor in weights(runs.folder(name)).items():
            torch.testing.assert_close(tensor, alone[key], rtol=1e-3, atol=2e-5)


def test_an_interrupted_run_with_partitioned_state_resumes_bit_for_bit(runs: Runs, zero1: str) -> None:
    process = runs.start("stopped", *ADAFACTOR, "strategy=zero1")
    runs.wait_for_step("stopped", 2, process)
    assert end(process, signal.SIGTERM) == 75
    assert 2 <= runs.rows("stopped")[-1]["step"] < 6
    runs.train("stopped", *ADAFACTOR, "strategy=zero1")
    assert list(map(trained, runs.rows("stopped"))) == list(map(trained, runs.rows(zero1)))
    assert weights_hash(runs.folder("stopped")) == weights_hash(runs.folder(zero1))


def test_a_run_with_partitioned_state_is_exported_with_its_weights_and_its_optimizers_name(
    runs: Runs, zero1: str
) -> None:
    out = runs.root / "exported"
    runs.clippy("export", f"run=runs/{zero1}", f"out={out}")
    model = AutoModelForCausalLM.from_pretrained(out)
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in weights(runs.folder(zero1)).items())
    assert "| optimizer | adafactor, clipping 1.0 |" in (out / "README.md").read_text()


def test_a_run_refuses_to_resume_with_another_optimizer(runs: Runs, zero1: str) -> None:
    message = runs.train(zero1, "trainer.max_steps=8", "trainer.precision=fp32", "strategy=zero1", code=2).stderr
    assert "optim.name was adafactor, is adamw" in message
