"""The framework's training step repeats a recorded run of the original Flax script, step by step.

It runs in one process, and on two DeepSpeed ranks under ZeRO-1 and ZeRO-2. `CLIPPY_FLAX_GOLDEN=FOLDER:FOLDER...` adds
recordings, for one process; they may have other settings.
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
from transformers import GPTNeoForCausalLM
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention

from clippy_train.config import OptimConfig
from clippy_train.data.batches import Batch
from clippy_train.model import attention
from clippy_train.optim import build_optimizer, lr_at
from clippy_train.train.module import CodeLM

MICRO = Path(__file__).parent / "data" / "flax_micro"
MORE = [*map(Path, filter(None, os.environ.get("CLIPPY_FLAX_GOLDEN", "").split(":")))]

LOSS = 2e-5  # absolute
GRAD_NORM = 1e-5  # relative
WEIGHT = 5e-6  # absolute
BF16_LOSS = 5e-3  # absolute, against the recording in fp32
# The original computes the learning rate in fp32, we in double: equal within two roundings of the peak to fp32.
LEARNING_RATE = 2**-23  # share of the peak

ONE_RANK = {"single": ["strategy=single"], "single-eager": ["strategy=single", "model.attention=eager"]}
TWO_RANKS = {"zero1": ["strategy=zero1"], "zero2": ["strategy=zero2"]}
FP32, BF16 = "trainer.precision=fp32", "trainer.precision=bf16"
CASES = [(MICRO, layout) for layout in (*ONE_RANK, *TWO_RANKS)]
CASES += [(folder, "single") for folder in MORE]  # minutes each

pytestmark = pytest.mark.timeout(1200)  # a recording with the real vocabulary takes minutes


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    """Make this process the only rank of a run."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def replay() -> Callable[[Path, str, str], Replay]:
    """Train on a recording in a layout; the first request for two ranks makes all runs on two ranks."""
    on_two_ranks: dict[Path, dict[tuple[str, str], Replay]] = {}

    def make_replay(folder: Path, layout: str, precision: str) -> Replay:
        if layout in ONE_RANK:
            trace = FlaxTrace(folder)
            return train(trace, configuration(trace, precision, *ONE_RANK[layout]))
        if folder not in on_two_ranks:
            wanted = [*((name, FP32) for name in TWO_RANKS), ("zero1", BF16)]
            layouts = [[*TWO_RANKS[name], each] for name, each in wanted]
            made = train_on_two_ranks(FlaxTrace(folder), *layouts)
            on_two_ranks[folder] = dict(zip(wanted, made, strict=True))
        return on_two_ranks[folder][layout, precision]

    return make_replay


@pytest.mark.parametrize("folder", [MICRO, *MORE], ids=lambda folder: folder.name)
def test_the_recording_is_the_run_that_its_settings_describe(folder: Path) -> None:
    require_consistent(FlaxTrace(folder))


def require_consistent(trace: FlaxTrace) -> None:
    """Require a recording that has the batches, losses and updates of its settings."""
    args, updates = trace.args, trace.args["max_steps"]
    train_batch, eval_batch = args["per_device_train_batch_size"], args["per_device_eval_batch_size"]
    assert trace.train_ids.shape == (updates * trace.accumulation, train_batch, args["block_size"])
    assert trace.eval_ids.shape == (args["max_eval_samples_ie_batches"], eval_batch, args["block_size"])
    assert trace.evals.keys() <= set(range(args["eval_steps"], updates + 1, args["eval_steps"]))
    assert {len(losses) for losses in trace.evals.values()} <= {len(trace.eval_ids)}
    assert len(trace.losses) == updates * trace.accumulation
    assert len(trace.grad_norms) == len(trace.lr_table) == updates


@pytest.mark.slow
def test_validation_batches_may_differ_in_size_from_micro_batches() -> None:
    trace = FlaxTrace(MICRO)
    trace.args |= {"per_device_eval_batch_size": 8, "max_eval_samples_ie_batches": 4}
    with pytest.raises(AssertionError):
        require_consistent(trace)
    trace.eval_ids = trace.eval_ids.reshape(4, 8, -1)
    trace.evals = {
        update: [sum(pair) / 2 for pair in zip(losses[::2], losses[1::2], strict=True)]
        for update, losses in trace.evals.items()
    }
    require_consistent(trace)
    replayed = train(trace, configuration(trace, FP32, "strategy=single"))
    assert differences(replayed, trace)["eval loss"] <= LOSS


@pytest.mark.parametrize(("folder", "layout"), CASES, ids=[f"{folder.name}-{layout}" for folder, layout in CASES])
def test_every_step_repeats_the_recording_in_fp32(
    replay: Callable[[Path, str, str], Replay], folder: Path, layout: str
) -> None:
    trace = FlaxTrace(folder)
    if layout in TWO_RANKS and trace.args["per_device_train_batch_size"] % 2:
        pytest.skip("an odd micro-batch does not divide between two ranks")
    errors = differences(replay(folder, layout, FP32), trace)
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
    """The largest difference of each kind: relative for gradient norms, a share of the peak for learning rates."""
    recorded = trace.final_weights()
    assert recorded.keys() == replay.weights.keys()
    assert trace.evals.keys() <= replay.evals.keys()  # the original never validates after its last update
    assert len(replay.grad_norms) == len(trace.grad_norms)
    return {
        "loss": largest(replay.losses, trace.losses),
        "eval loss": max((largest(replay.evals[each], losses) for each, losses in trace.evals.items()), default=0.0),
        "gradient norm": largest(ratios(replay, trace), [1.0] * len(trace.grad_norms)),
        "learning rate": largest(replay.learning_rates, trace.lr_applied) / trace.args["learning_rate"],
        "weight": max(
            (replay.weights[name][rows] - values).abs().max().item() for name, (rows, values) in recorded.items()
        ),
    }


def ratios(replay: Replay, trace: FlaxTrace) -> list[float]:
    """Of the gradient norms so far to the recorded ones."""
    return [ours / theirs for ours, theirs in zip(replay.grad_norms, trace.grad_norms, strict=False)]


def largest(ours: list[float], theirs: list[float]) -> float:
    """The largest absolute difference; infinite if one of ours is not finite."""
    return max(abs(a - b) if math.isfinite(a) else math.inf for a, b in zip(ours, theirs, strict=True))


# Each detail of the recipe that was measured to matter is broken on purpose: the comparison must notice every one.
Break = Callable[[pytest.MonkeyPatch], None]


def replace_name(target: str, value: Any) -> Break:
    return lambda patch: patch.setattr(target, value)


def change_setting(name: str, change: Callable[[OptimConfig], Any]) -> Break:
    """Train with another value of one optimizer setting."""

    def changed(trace: FlaxTrace) -> OptimConfig:
        config = optim_config(trace)
        return dataclasses.replace(config, **{name: change(config)})

    return replace_name("support.flax_trace.FlaxTrace.optim_config", changed)


def change_optimizer(
    change: Callable[[torch.optim.Optimizer, GPTNeoForCausalLM], torch.optim.Optimizer],
) -> Break:
    """Train with another optimizer, made from ours and the model."""
    return replace_name(
        "clippy_train.train.module.build_optimizer", lambda model, config: change(build_optimizer(model, config), model)
    )


def decay_all(ours: torch.optim.Optimizer, model: GPTNeoForCausalLM) -> torch.optim.Optimizer:
    for group in ours.param_groups:
        group["weight_decay"] = 0.1
    return ours


def decay_no_embedding(ours: torch.optim.Optimizer, model: GPTNeoForCausalLM) -> torch.optim.Optimizer:
    embeddings = {model.transformer.wte.weight, model.transformer.wpe.weight}
    decayed = ours.param_groups[0]
    decayed["params"] = [parameter for parameter in decayed["params"] if parameter not in embeddings]
    ours.add_param_group({"params": list(embeddings), "weight_decay": 0.0})
    return ours


def coupled_decay(ours: torch.optim.Optimizer, model: GPTNeoForCausalLM) -> torch.optim.Optimizer:
    for group in ours.param_groups:
        group["decoupled_weight_decay"] = False
    return ours


def targets_across_rows(
    model: GPTNeoForCausalLM, input_ids: torch.Tensor, *settings: Any, **kwargs: Any
) -> torch.Tensor:
    """Predict the first token of a sequence from the end of the one before."""
    logits = model.lm_head(attention.hidden_states(model.transformer, input_ids)).flatten(0, 1)
    return F.cross_entropy(logits[:-1], input_ids.flatten()[1:])


def summed_step(module: CodeLM, batch: Batch, batch_idx: int) -> torch.Tensor:
    return training_step(module, batch, batch_idx) * module.config.micro_steps


def all_global(layer: GPTNeoSelfAttention, x: torch.Tensor, *settings: Any) -> torch.Tensor:
    layer.attention_type = "global"
    return self_attention(layer, x, *settings)


def default_scale(*args: Any, scale: float, **kwargs: Any) -> torch.Tensor:
    return F.scaled_dot_product_attention(*args, **kwargs)


def erf_gelu(x: torch.Tensor, approximate: str) -> torch.Tensor:
    return gelu(x)


# The originals, because the names are replaced while a test runs.
optim_config, training_step, gelu = FlaxTrace.optim_config, CodeLM.training_step, F.gelu
self_attention, local_attention = attention.self_attention, attention.local_attention

BREAKS = {
    "coupled decay": change_optimizer(coupled_decay),
    "cosine ends at D": change_setting("decay_steps", lambda config: config.decay_steps - config.warmup_steps),
    "end lr 0": change_setting("min_lr_ratio", lambda config: 0.0),
    "beta2 .999": change_setting("betas", lambda config: [0.9, 0.999]),
    "accumulate the sum": replace_name("clippy_train.train.module.CodeLM.training_step", summed_step),
    "lr index off by one": replace_name("clippy_train.optim.lr_at", lambda step, config: lr_at(step + 1, config)),
    "all layers global": replace_name("clippy_train.model.attention.self_attention", all_global),
    "no clipping": change_setting("grad_clip", lambda config: 0.0),
    "targets across rows": replace_name("clippy_train.train.module.mean_loss", targets_across_rows),
    "decay on all": change_optimizer(decay_all),
    "scaled attention": replace_name(
        "clippy_train.model.attention.F",
        SimpleNamespace(pad=F.pad, gelu=F.gelu, scaled_dot_product_attention=default_scale),
    ),
    "no decay on embeddings": change_optimizer(decay_no_embedding),
    "window off by one": replace_name(
        "clippy_train.model.attention.local_attention",
        lambda q, k, v, window, *settings: local_attention(q, k, v, window - 1, *settings),
    ),
    "eps 1e-6": change_setting("eps", lambda config: 1e-6),
    "erf GELU": replace_name("clippy_train.model.attention.F.gelu", erf_gelu),
}


@pytest.mark.processes
@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_detail_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    BREAKS[name](monkeypatch)
    trace = FlaxTrace(MICRO)
    broken = train(
        trace,
        configuration(trace, FP32, "strategy=single"),
        enough=lambda seen: not repeats_losses_and_norms(seen, trace),
    )
    print(f"{name}: noticed at update {len(broken.grad_norms)}")
    assert not repeats_losses_and_norms(broken, trace)


def repeats_losses_and_norms(replay: Replay, trace: FlaxTrace) -> bool:
    """Whether the losses and gradient norms so far are the recorded ones."""
    return (
        largest(replay.losses, trace.losses[: len(replay.losses)]) <= LOSS
        and largest(ratios(replay, trace), [1.0] * len(replay.grad_norms)) <= GRAD_NORM
    )
