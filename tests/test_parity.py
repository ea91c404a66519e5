"""The framework's own training step repeats a recorded run of the original Flax script, step by step.

More recordings: `CLIPPY_FLAX_GOLDEN=FOLDER:FOLDER...`. One process, and two DeepSpeed ranks under ZeRO-1 and ZeRO-2.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.flax_trace import FlaxTrace
from support.replay import Replay, configuration, train, train_on_two_ranks

from clippy_train.config import OptimConfig
from clippy_train.model import attention
from clippy_train.optim import build_optimizer, lr_at
from clippy_train.train.module import CodeLM

MICRO = Path(__file__).parent / "data" / "flax_micro"
MORE = [*map(Path, filter(None, os.environ.get("CLIPPY_FLAX_GOLDEN", "").split(":")))]

LOSS = 2e-5  # absolute
GRAD_NORM = 1e-5  # relative
WEIGHT = 5e-6  # absolute
BF16_LOSS = 5e-3  # absolute, against the recording in fp32
# The original computes the learning rate in fp32, ours is a double: equal within two roundings of the peak to fp32.
LEARNING_RATE = 2**-23  # share of the peak

ONE_RANK = {"single": ["strategy=single"], "single-eager": ["strategy=single", "model.attention=eager"]}
TWO_RANKS = {"zero1": ["strategy=zero1"], "zero2": ["strategy=zero2"]}
FP32, BF16 = "trainer.precision=fp32", "trainer.precision=bf16"
CASES = [(MICRO, layout) for layout in (*ONE_RANK, *TWO_RANKS)]
CASES += [(folder, layout) for folder in MORE for layout in ("single", *TWO_RANKS)]

pytestmark = pytest.mark.timeout(1200)  # a recording with the real vocabulary takes minutes


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    """This process as the only rank of a run."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def replay(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, str, str], Replay]:
    """Train on a recording in a layout; all runs on two ranks are made at the first need of one."""
    on_two_ranks: dict[Path, dict[tuple[str, str], Replay]] = {}

    def replayed(folder: Path, layout: str, precision: str) -> Replay:
        if layout in ONE_RANK:
            trace = FlaxTrace(folder)
            return train(trace, configuration(trace, precision, *ONE_RANK[layout]))
        if folder not in on_two_ranks:
            wanted = [(name, FP32) for name in TWO_RANKS] + ([("zero1", BF16)] if folder == MICRO else [])
            layouts = [[*TWO_RANKS[name], each] for name, each in wanted]
            made = train_on_two_ranks(folder, tmp_path_factory.mktemp("ranks"), *layouts)
            on_two_ranks[folder] = dict(zip(wanted, made, strict=True))
        return on_two_ranks[folder][layout, precision]

    return replayed


@pytest.mark.parametrize("folder", [MICRO, *MORE], ids=lambda folder: folder.name)
def test_the_recording_is_the_run_that_its_settings_describe(folder: Path) -> None:
    trace = FlaxTrace(folder)
    args, updates = trace.args, trace.args["max_steps"]
    shape = (args["per_device_train_batch_size"], args["block_size"])
    assert trace.train_ids.shape == (updates * trace.accumulation, *shape)
    assert trace.eval_ids.shape == (args["max_eval_samples_ie_batches"], *shape)
    assert len(trace.losses) == updates * trace.accumulation
    assert len(trace.grad_norms) == len(trace.lr_table) == updates


@pytest.mark.parametrize(("folder", "layout"), CASES, ids=[f"{folder.name}-{layout}" for folder, layout in CASES])
def test_every_step_repeats_the_recording_in_fp32(
    replay: Callable[[Path, str, str], Replay], folder: Path, layout: str
) -> None:
    errors = differences(replay(folder, layout, FP32), FlaxTrace(folder))
    print(layout, {name: f"{value:.1e}" for name, value in errors.items()})
    assert errors["loss"] <= LOSS
    assert errors["eval loss"] <= LOSS
    assert errors["gradient norm"] <= GRAD_NORM
    assert errors["learning rate"] <= LEARNING_RATE
    assert errors["weight"] <= WEIGHT


@pytest.mark.parametrize("layout", ["single", "zero1"])
def test_losses_in_bf16_stay_near_the_recording_in_fp32(
    replay: Callable[[Path, str, str], Replay], layout: str
) -> None:
    assert 1e-6 < largest(replay(MICRO, layout, BF16).losses, FlaxTrace(MICRO).losses) <= BF16_LOSS


def differences(replay: Replay, trace: FlaxTrace) -> dict[str, float]:
    """The largest difference of each kind; of gradient norms it is relative, of learning rates a share of the peak."""
    recorded = trace.final_weights()
    assert recorded.keys() == replay.weights.keys()
    assert trace.evals.keys() <= replay.evals.keys()  # the original never validates after its last update
    ratios = [ours / theirs for ours, theirs in zip(replay.grad_norms, trace.grad_norms, strict=True)]
    return {
        "loss": largest(replay.losses, trace.losses),
        "eval loss": max(largest(replay.evals[update], losses) for update, losses in trace.evals.items()),
        "gradient norm": largest(ratios, [1.0] * len(ratios)),
        "learning rate": largest(replay.learning_rates, trace.lr_applied) / trace.args["learning_rate"],
        "weight": max(
            (replay.weights[name][rows] - values).abs().max().item() for name, (rows, values) in recorded.items()
        ),
    }


def largest(ours: list[float], theirs: list[float]) -> float:
    """The largest absolute difference; infinite where ours is not a number."""
    return max(abs(a - b) if math.isfinite(a) else math.inf for a, b in zip(ours, theirs, strict=True))


# Every detail of the recipe that was measured to matter, broken on purpose: the comparison must notice each.
Break = Callable[[pytest.MonkeyPatch], None]


def replaced(target: str, value: Any) -> Break:
    return lambda patch: patch.setattr(target, value)


def setting(name: str, change: Callable[[OptimConfig], Any]) -> Break:
    """Train with another value of one optimizer setting."""

    def changed(trace: FlaxTrace) -> OptimConfig:
        config = optim_config(trace)
        return dataclasses.replace(config, **{name: change(config)})

    return replaced("support.flax_trace.FlaxTrace.optim_config", changed)


def optimizer(change: Callable[[torch.optim.Optimizer, Any], torch.optim.Optimizer]) -> Break:
    """Train with another optimizer, made from ours and the model."""
    return replaced(
        "clippy_train.train.module.build_optimizer", lambda model, config: change(build_optimizer(model, config), model)
    )


def decay_all(ours: torch.optim.Optimizer, model: Any) -> torch.optim.Optimizer:
    for group in ours.param_groups:
        group["weight_decay"] = 0.1
    return ours


def decay_no_embedding(ours: torch.optim.Optimizer, model: Any) -> torch.optim.Optimizer:
    embeddings = {model.transformer.wte.weight, model.transformer.wpe.weight}
    decayed = ours.param_groups[0]
    decayed["params"] = [parameter for parameter in decayed["params"] if parameter not in embeddings]
    ours.add_param_group({"params": list(embeddings), "weight_decay": 0.0})
    return ours


def coupled_decay(ours: torch.optim.Optimizer, model: Any) -> torch.optim.Optimizer:
    for group in ours.param_groups:
        group["decoupled_weight_decay"] = False
    return ours


def targets_across_rows(model: Any, input_ids: torch.Tensor, *settings: Any) -> torch.Tensor:
    """A row's first token is the target of the row before."""
    logits = model.lm_head(attention.hidden_states(model.transformer, input_ids)).flatten(0, 1)
    return F.cross_entropy(logits[:-1], input_ids.flatten()[1:])


def summed_step(module: CodeLM, batch: Any, batch_idx: int) -> torch.Tensor:
    return training_step(module, batch, batch_idx) * module.config.micro_steps


def all_global(layer: Any, x: torch.Tensor, *settings: Any) -> torch.Tensor:
    layer.attention_type = "global"
    return self_attention(layer, x, *settings)


def default_scale(*args: Any, scale: float, **kwargs: Any) -> torch.Tensor:
    return F.scaled_dot_product_attention(*args, **kwargs)


def erf_gelu(x: torch.Tensor, approximate: str) -> torch.Tensor:
    return gelu(x)


# Kept, since the names are replaced while a test runs.
optim_config, training_step, gelu = FlaxTrace.optim_config, CodeLM.training_step, F.gelu
self_attention, local_attention = attention.self_attention, attention.local_attention

BREAKS = {
    "coupled decay": optimizer(coupled_decay),
    "cosine ends at D": setting("decay_steps", lambda config: config.decay_steps - config.warmup_steps),
    "end lr 0": setting("min_lr_ratio", lambda config: 0.0),
    "beta2 .999": setting("betas", lambda config: [config.betas[0], 0.999]),
    "accumulate the sum": replaced("clippy_train.train.module.CodeLM.training_step", summed_step),
    "lr index off by one": replaced("clippy_train.optim.lr_at", lambda step, config: lr_at(step + 1, config)),
    "all layers global": replaced("clippy_train.model.attention.self_attention", all_global),
    "no clipping": setting("grad_clip", lambda config: 0.0),
    "targets across rows": replaced("clippy_train.train.module.mean_loss", targets_across_rows),
    "decay on all": optimizer(decay_all),
    "scaled attention": replaced(
        "clippy_train.model.attention.F",
        SimpleNamespace(pad=F.pad, gelu=F.gelu, scaled_dot_product_attention=default_scale),
    ),
    "no decay on embeddings": optimizer(decay_no_embedding),
    "window off by one": replaced(
        "clippy_train.model.attention.local_attention",
        lambda q, k, v, window, *settings: local_attention(q, k, v, window - 1, *settings),
    ),
    "eps 1e-6": setting("eps", lambda config: 1e-6),
    "erf GELU": replaced("clippy_train.model.attention.F.gelu", erf_gelu),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_detail_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    BREAKS[name](monkeypatch)
    trace = FlaxTrace(MICRO)
    broken = differences(train(trace, configuration(trace, FP32, "strategy=single")), trace)
    print(name, {kind: f"{value:.1e}" for kind, value in broken.items()})
    assert broken["loss"] > LOSS or broken["gradient norm"] > GRAD_NORM
