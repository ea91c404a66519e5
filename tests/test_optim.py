"""Learning rate, weight decay and clipping follow the recipe."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.flax_trace import FlaxTrace
from support.models import gpt_neo
from torch import nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.optimization import Adafactor

from clippy_train.config import OptimConfig
from clippy_train.optim import ADAFACTOR, Schedule, build_optimizer, clip_grad_norm, lr_at, parameter_groups

SQRT_2 = math.sqrt(2)
MICRO = Path(__file__).parent / "data" / "flax_micro"


def settings(warmup_steps: int = 2500, decay_steps: int = 25000, **changes: float) -> OptimConfig:
    recipe = OptimConfig(
        lr=1e-4, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.1, min_lr_ratio=0.1, grad_clip=1.0,
        warmup_steps=warmup_steps, decay_steps=decay_steps,
    )  # fmt: skip
    return dataclasses.replace(recipe, **changes)  # type: ignore[arg-type]  # mypy checks ** against every field


def schedule_of(config: OptimConfig) -> tuple[torch.optim.Optimizer, Schedule]:
    optimizer = build_optimizer(nn.Linear(2, 2), config)
    return optimizer, Schedule(optimizer, config)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.0),  # the first update does not change the weights
        (1, 1e-4 / 2500),
        (1250, 5e-5),
        (2500, 1e-4),
        (2500 + 6250, 1e-5 + 9e-5 * (1 + math.sqrt(0.5)) / 2),
        (2500 + 12500, 5.5e-5),
        (27500, 1e-5),
        (27501, 1e-5),
        (100_000, 1e-5),
    ],
)
def test_learning_rate_of_the_recipe(step: int, expected: float) -> None:
    assert lr_at(step, settings()) == pytest.approx(expected, rel=1e-12, abs=1e-20)


@given(
    step=st.integers(0, 10_000),
    warmup_steps=st.integers(1, 3000),
    decay_steps=st.integers(1, 3000),
    min_lr_ratio=st.floats(0, 1),
)
def test_learning_rate_rises_linearly_and_falls_as_a_cosine(
    step: int, warmup_steps: int, decay_steps: int, min_lr_ratio: float
) -> None:
    if step <= warmup_steps:
        share = np.float64(step) / warmup_steps
    else:
        angle = np.pi * np.minimum(np.float64(step - warmup_steps) / decay_steps, 1)
        share = min_lr_ratio + (1 - min_lr_ratio) * np.cos(angle / 2) ** 2
    config = settings(warmup_steps, decay_steps, min_lr_ratio=min_lr_ratio)
    assert lr_at(step, config) == pytest.approx(1e-4 * share, rel=1e-9, abs=1e-18)


def test_learning_rate_is_the_originals_to_fp32_rounding() -> None:
    trace = FlaxTrace(MICRO)
    ours = [lr_at(update, trace.optim_config()) for update in range(len(trace.lr_table))]
    np.testing.assert_allclose(ours, trace.lr_table, rtol=0, atol=2**-23 * trace.args["learning_rate"])


@pytest.mark.parametrize(
    ("warmup_steps", "decay_steps", "expected"),
    [(0, 2, [1e-4, 5.5e-5, 1e-5, 1e-5]), (2, 0, [0, 5e-5, 1e-4, 1e-4]), (0, 0, [1e-4, 1e-4, 1e-4, 1e-4])],
)
def test_zero_warm_up_and_zero_decay_are_allowed(warmup_steps: int, decay_steps: int, expected: list[float]) -> None:
    config = settings(warmup_steps, decay_steps)
    assert [lr_at(step, config) for step in range(4)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("schedule", "stable_steps", "shares"),  # of the peak, at steps 0 to 9
    [
        ("cosine", None, [0, 1 / 2, 1, 0.55 + 0.9 * SQRT_2 / 4, 0.55, 0.55 - 0.9 * SQRT_2 / 4, 0.1, 0.1, 0.1, 0.1]),
        ("linear", None, [0, 1 / 2, 1, 0.775, 0.55, 0.325, 0.1, 0.1, 0.1, 0.1]),
        ("constant", None, [0, 1 / 2, *[1] * 8]),
        ("wsd", 3, [0, 1 / 2, 1, 1, 1, 1, 0.55, 1 - 0.9 * SQRT_2 / 2, 1 - 0.9 * math.sqrt(3) / 2, 0.1]),
    ],
)
def test_each_schedule_has_its_closed_form(schedule: str, stable_steps: int | None, shares: list[float]) -> None:
    config = settings(2, 4)
    config.schedule, config.stable_steps = schedule, stable_steps
    assert [lr_at(step, config) / config.lr for step in range(10)] == pytest.approx(shares, rel=1e-12, abs=1e-20)


def test_update_k_runs_with_the_learning_rate_of_k() -> None:
    config = settings(warmup_steps=3, decay_steps=5)
    optimizer, schedule = schedule_of(config)
    for update in range(12):
        assert [group["lr"] for group in optimizer.param_groups] == [lr_at(update, config)] * 2
        optimizer.step()
        schedule.step()


def test_a_schedule_continues_from_its_state() -> None:
    config = settings(warmup_steps=3, decay_steps=5)
    optimizer, schedule = schedule_of(config)
    for _ in range(4):
        optimizer.step()
        schedule.step()
    again, restored = schedule_of(config)
    again.load_state_dict(optimizer.state_dict())
    restored.load_state_dict(schedule.state_dict())
    for update in range(4, 10):
        assert [group["lr"] for group in again.param_groups] == [lr_at(update, config)] * 2
        again.step()
        restored.step()


def test_a_restored_schedule_follows_the_configuration_of_the_new_run() -> None:
    old, new = settings(warmup_steps=3, decay_steps=5), settings(warmup_steps=3, decay_steps=50, lr=2e-4)
    _, schedule = schedule_of(old)
    optimizer, restored = schedule_of(new)
    restored.load_state_dict(schedule.state_dict())
    optimizer.step()
    restored.step()
    assert optimizer.param_groups[0]["lr"] == lr_at(1, new)


def test_every_parameter_is_in_one_group_and_the_tied_weight_once() -> None:
    model = gpt_neo()
    decayed, plain = parameter_groups(model)
    ids = [id(parameter) for parameter in decayed + plain]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(parameter) for parameter in model.parameters()}
    assert ids.count(id(model.lm_head.weight)) == ids.count(id(model.transformer.wte.weight)) == 1


def test_exactly_biases_and_layer_norms_are_not_decayed() -> None:
    model = gpt_neo(("global",))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, plain = ({names[id(parameter)] for parameter in group} for group in parameter_groups(model))
    layers = {"attn.attention.k_proj", "attn.attention.v_proj", "attn.attention.q_proj", "attn.attention.out_proj"}
    layers |= {"mlp.c_fc", "mlp.c_proj"}
    norms = {f"transformer.{norm}.{kind}" for norm in ("h.0.ln_1", "h.0.ln_2", "ln_f") for kind in ("weight", "bias")}
    biases = {f"transformer.h.0.{layer}.bias" for layer in ("attn.attention.out_proj", "mlp.c_fc", "mlp.c_proj")}
    assert decayed == {"transformer.wte.weight", "transformer.wpe.weight"} | {
        f"transformer.h.0.{layer}.weight" for layer in layers
    }
    assert plain == norms | biases


def test_decay_shrinks_weights_by_the_learning_rate_and_nothing_else() -> None:
    model = gpt_neo(("global",))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    build_optimizer(model, settings(lr=0.5)).step()  # 0.5 x weight decay 0.1
    shrunk = {
        name: (1 - 0.5 * 0.1 if parameter.ndim == 2 else 1) * before[name]
        for name, parameter in model.named_parameters()
    }
    torch.testing.assert_close(dict(model.named_parameters()), shrunk)


def test_the_optimizer_takes_its_settings_from_the_configuration() -> None:
    optimizer = build_optimizer(gpt_neo(), settings(eps=1e-5, weight_decay=0.3))
    assert type(optimizer) is torch.optim.AdamW
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert [(group["betas"], group["eps"], group["amsgrad"]) for group in optimizer.param_groups] == [
        ((0.9, 0.95), 1e-5, False)
    ] * 2


class DeviceReads(TorchDispatchMode):
    """Counts the values that are read back from tensors on `meta`, which stands for a GPU: each would wait for it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch
        self.count = 0

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            self.count += 1
            return 1.0
        return func(*args, **(kwargs or {}))


def device_reads(optimizer: torch.optim.Optimizer) -> int:
    """In two steps, the first of which makes the optimizer's state."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    reads = DeviceReads()
    with reads:
        for _ in range(2):
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter)
            clip_grad_norm(parameters, max_norm=1.0)
            optimizer.step()
    return reads.count


def on_meta(model: nn.Module) -> nn.Module:
    return model.to("meta")


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_a_step_never_waits_for_the_gpu(name: str) -> None:
    config = settings()
    config.name = name
    assert device_reads(build_optimizer(on_meta(gpt_neo()), config)) == 0


def test_transformers_adafactor_waits_for_the_gpu_once_per_tensor() -> None:
    model = on_meta(gpt_neo())
    assert device_reads(Adafactor(model.parameters(), lr=1e-4, **ADAFACTOR)) == 2 * len(list(model.parameters()))


def with_gradients(*gradients: torch.Tensor) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    return parameters


def random_gradients(scale: float, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [scale * torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize(
    "shapes",
    [[(1,)], [(7, 5), (5,), (3, 2, 2)], pytest.param([(50261, 768), (768,)], marks=pytest.mark.slow)],
    ids=str,
)
def test_the_norm_is_that_of_all_gradients_in_float64(shapes: list[tuple[int, ...]]) -> None:
    gradients = random_gradients(1e-3, *shapes)
    rows = (row for gradient in gradients for row in gradient.reshape(-1, gradient.shape[-1]).numpy())
    expected = math.sqrt(math.fsum(np.square(row, dtype=np.float64).sum() for row in rows))
    norm = clip_grad_norm(with_gradients(*gradients), max_norm=0)
    assert norm.item() == pytest.approx(expected, rel=1e-6)


def test_gradients_above_the_limit_are_scaled_to_it() -> None:
    gradients = random_gradients(3.0, (7, 5), (5,))
    parameters = with_gradients(*gradients)
    norm = clip_grad_norm(parameters, max_norm=1.0)
    assert norm > 1
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient / norm.float(), rtol=1e-6, atol=0)
    assert clip_grad_norm(parameters, max_norm=1.0).item() == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize(("scale", "max_norm"), [(3.0, 0.0), (0.1, 1.0), (0.0, 1.0)])
def test_gradients_stay_bit_equal_below_the_limit_and_without_one(scale: float, max_norm: float) -> None:
    gradients = random_gradients(scale, (7, 5), (5,))
    parameters = with_gradients(*gradients)
    clip_grad_norm(parameters, max_norm)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)


def test_parameters_without_a_gradient_are_skipped() -> None:
    parameters = [*with_gradients(torch.tensor([3.0, 4.0])), nn.Parameter(torch.zeros(2))]
    assert clip_grad_norm(parameters, max_norm=1.0).item() == 5
    assert parameters[1].grad is None


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_non_finite_gradient_gives_a_non_finite_norm(value: float) -> None:
    assert not clip_grad_norm(with_gradients(torch.tensor([1.0, value])), max_norm=1.0).isfinite()
