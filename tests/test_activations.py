"""With `model.checkpoint_activations` losses, norms and weights are the same in every bit, under every strategy."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.distributed import run_distributed
from support.fits import SETTINGS, Fit
from support.models import gpt_neo, token_ids
from torch import Tensor
from transformers import GPTNeoForCausalLM
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoBlock

from clippy_train.config import TrainConfig
from clippy_train.model import attention
from clippy_train.model.build import build_model, recompute_activations
from clippy_train.model.loss import loss_head, mean_loss, token_losses
from clippy_train.train import collective

Results = tuple[Tensor, dict[str, Tensor]]


def loss_and_gradients(model: GPTNeoForCausalLM, kernel: str, compiled: bool = False) -> Results:
    function = torch.compile(mean_loss, backend="aot_eager", dynamic=False) if compiled else mean_loss
    torch.manual_seed(0)  # of dropout
    loss = function(model, token_ids(3, 57), kernel)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return loss, gradients


def assert_same(found: Results, expected: Results) -> None:
    assert torch.equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    for name, gradient in found[1].items():
        assert torch.equal(gradient, expected[1][name]), name


@pytest.fixture
def block_calls(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One entry for each time that a block is computed."""
    calls: list[None] = []
    original = attention.block_output

    def counted(*args: object) -> Tensor:
        calls.append(None)
        return original(*args)  # type: ignore[arg-type]  # handed on as they came

    monkeypatch.setattr(attention, "block_output", counted)
    return calls


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_losses_and_gradients_are_the_same_bits(kernel: str, dropout: float) -> None:
    model = gpt_neo(dropout=dropout).train()
    expected = loss_and_gradients(model, kernel)
    recompute_activations(model)
    assert_same(loss_and_gradients(model, kernel), expected)


def test_each_block_is_computed_twice_in_training_and_once_in_validation(block_calls: list[None]) -> None:
    model = gpt_neo().train()
    recompute_activations(model)
    token_losses(model, token_ids(3, 57), "sdpa")
    assert len(block_calls) == 2
    mean_loss(model, token_ids(3, 57), "sdpa").backward()
    assert len(block_calls) == 2 + 4


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_less_is_kept_for_the_backward_pass(kernel: str) -> None:
    def kept(model: GPTNeoForCausalLM) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            mean_loss(model, token_ids(3, 57), kernel)
        parameters = {parameter.data_ptr() for parameter in model.parameters()}
        return sum(size for pointer, size in sizes.items() if pointer not in parameters)

    model = gpt_neo(("global", "local") * 4).train()
    everything = kept(model)
    recompute_activations(model)
    assert kept(model) < everything / 4


@pytest.mark.slow
def test_a_compiled_step_is_one_graph_with_the_same_bits() -> None:
    """Traced and differentiated as with `model.compile=true`, but without minutes of code generation."""
    model = gpt_neo().train()
    model.lm_head = loss_head(model)
    expected = loss_and_gradients(model, "sdpa", compiled=True)
    recompute_activations(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert_same(loss_and_gradients(model, "sdpa", compiled=True), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_the_key_reaches_the_model(train_config: Callable[..., TrainConfig]) -> None:
    for value in (False, True):
        model, _ = build_model(train_config(f"model.checkpoint_activations={value}"))
        assert model.is_activation_checkpointing == value


def trained(config: TrainConfig) -> tuple[list[tuple[float, float]], int]:
    """Loss and gradient norm of each step, and how often the first block was computed."""
    fit = Fit(config)
    calls: list[None] = []
    first = fit.module.model.transformer.h[0]
    assert isinstance(first, GPTNeoBlock)
    first.ln_1.register_forward_hook(lambda *_: calls.append(None))
    fit.fit()
    rows = fit.rows() if collective.rank() == 0 else []
    return [(row["train/loss"], row["train/grad_norm"]) for row in rows], len(calls)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("strategy", "kernel"),
    [("single", "sdpa"), ("ddp", "sdpa"), ("zero1", "sdpa"), ("zero2", "sdpa"), ("zero3", "sdpa"), ("zero3", "eager")],
)
def test_a_run_is_the_same_under_every_strategy(
    train_config: Callable[..., TrainConfig], tmp_path: Path, strategy: str, kernel: str
) -> None:
    ranks = 1 if strategy == "single" else 2
    common = [
        *SETTINGS,
        f"strategy={strategy}",
        f"trainer.devices={ranks}",
        "model.num_layers=2",
        "model.window_size=8",
    ]
    common += [
        "optim.warmup_steps=0",
        "trainer.micro_batch_size=1",
        f"model.attention={kernel}",
        f"run.root={tmp_path}",
    ]
    runs = []
    for value in (False, True):
        config = train_config(*common, f"run.name={value}", f"model.checkpoint_activations={value}")
        runs.append(run_distributed(functools.partial(trained, config), ranks)[0])
    (kept, calls), (recomputed, more_calls) = runs
    assert recomputed == kept
    assert len(set(kept)) == 3
    assert more_calls == calls + 3 * 4 // ranks  # once more in each micro-batch of one sequence
