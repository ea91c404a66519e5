"""In fp32, the project's parts repeat a recorded run of the original Flax script step by step.

Plain PyTorch, without Lightning and DeepSpeed. More recordings: `CLIPPY_FLAX_GOLDEN=FOLDER:FOLDER...`.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from flax_trace import FlaxTrace
from torch import Tensor

from clippy_train.model.loss import token_losses
from clippy_train.optim import Schedule, build_optimizer, clip_grad_norm

FOLDERS = [Path(__file__).parent / "data" / "flax_micro"]
FOLDERS += [Path(folder) for folder in os.environ.get("CLIPPY_FLAX_GOLDEN", "").split(":") if folder]

LOSS = 2e-5  # absolute
GRAD_NORM = 1e-5  # relative
WEIGHT = 5e-6  # absolute
# The original computes the learning rate in fp32, ours is a double: equal within two roundings of the peak to fp32.
LEARNING_RATE = 2**-23  # share of the peak

pytestmark = pytest.mark.timeout(1200)  # a recording with the real vocabulary takes minutes


@dataclass
class Replay:
    """What our parts computed on the recorded micro-batches."""

    trace: FlaxTrace
    losses: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    evals: dict[int, list[float]] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda folder: folder.name)
def trace(request: pytest.FixtureRequest) -> FlaxTrace:
    return FlaxTrace(request.param)


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def replay(request: pytest.FixtureRequest, trace: FlaxTrace) -> Replay:
    return run(trace, attention=request.param)


def run(trace: FlaxTrace, attention: str) -> Replay:
    """Train on the recorded micro-batches with the recorded settings."""
    model, settings, done = trace.initial_model(), trace.optim_config(), Replay(trace)
    optimizer = build_optimizer(model, settings)
    schedule = Schedule(optimizer, settings)
    for update in range(trace.args["max_steps"]):
        for input_ids in trace.micro_batches(update):
            loss = token_losses(model, input_ids, attention).mean()
            (loss / trace.accumulation).backward()
            done.losses.append(loss.item())
        done.grad_norms.append(clip_grad_norm(model.parameters(), settings.grad_clip).item())
        done.learning_rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (update + 1) % trace.args["eval_steps"] == 0:
            with torch.no_grad():
                done.evals[update + 1] = [token_losses(model, ids, attention).mean().item() for ids in trace.eval_ids]
    done.weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return done


def test_the_recording_is_the_run_that_its_settings_describe(trace: FlaxTrace) -> None:
    args, updates = trace.args, trace.args["max_steps"]
    shape = (args["per_device_train_batch_size"], args["block_size"])
    assert trace.train_ids.shape == (updates * trace.accumulation, *shape)
    assert trace.eval_ids.shape == (args["max_eval_samples_ie_batches"], *shape)
    assert len(trace.losses) == updates * trace.accumulation
    assert len(trace.grad_norms) == len(trace.lr_table) == updates
    assert max(trace.grad_norms) > args["clip_global_norm"] > min(trace.grad_norms)


def test_loss_of_every_micro_batch(replay: Replay) -> None:
    torch.testing.assert_close(replay.losses, replay.trace.losses, atol=LOSS, rtol=0)


def test_learning_rate_of_every_update(replay: Replay) -> None:
    limit = LEARNING_RATE * replay.trace.args["learning_rate"]
    torch.testing.assert_close(replay.learning_rates, replay.trace.lr_applied, atol=limit, rtol=0)


def test_gradient_norm_of_every_update(replay: Replay) -> None:
    torch.testing.assert_close(replay.grad_norms, replay.trace.grad_norms, atol=0, rtol=GRAD_NORM)


def test_loss_of_every_validation_batch(replay: Replay) -> None:
    recorded = replay.trace.evals  # the original never validates after its last update
    assert {update: replay.evals[update] for update in recorded} == {
        update: pytest.approx(losses, abs=LOSS, rel=0) for update, losses in recorded.items()
    }


def test_final_weights(replay: Replay) -> None:
    recorded = replay.trace.final_weights()
    assert recorded.keys() == replay.weights.keys()
    for name, (rows, values) in recorded.items():
        assert (replay.weights[name][rows] - values).abs().max() <= WEIGHT, name
