"""In which precision, and how many bytes of them, gradients cross between ranks: counted under the real strategies."""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributed import run_distributed
from support.fits import SETTINGS, Fit
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clippy_train.config import TrainConfig

REDUCE = ("allreduce_", "reduce_", "reduce_scatter_", "_reduce_scatter_base_")
STEPS = 3
BYTES = {torch.float32: 4, torch.bfloat16: 2}


class Traffic(TorchDispatchMode):
    """Counts elements that reductions of the training group take, by type. (Norms and flags are single numbers.)"""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of torch
        self.elements: dict[torch.dtype, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d" and func._schema.name.split("::")[1] in REDUCE:
            tensors = args[1] if "scatter" in func._schema.name else args[0]
            for each in tree_leaves(tensors):
                if isinstance(each, torch.Tensor) and each.is_floating_point() and each.numel() > 64:
                    self.elements[each.dtype] = self.elements.get(each.dtype, 0) + each.numel()
        return func(*args, **(kwargs or {}))


@pytest.mark.processes
@pytest.mark.parametrize(
    ("strategy", "reduce_dtype"),
    [("ddp", "fp32"), *product(("zero1", "zero2", "zero3"), ("fp32", "bf16"))],  # DDP in bf16 needs CUDA
)
def test_gradients_are_reduced_in_the_precision_that_is_set(
    train_config: Callable[..., TrainConfig], tmp_path: Path, strategy: str, reduce_dtype: str
) -> None:
    config = train_config(
        *SETTINGS, f"strategy={strategy}", f"strategy.reduce_dtype={reduce_dtype}", "trainer.devices=2",
        "trainer.precision=bf16", "trainer.micro_batch_size=1", "trainer.val_samples=2", f"run.root={tmp_path}",
    )  # fmt: skip

    def train() -> tuple[dict[torch.dtype, int], int]:
        fit = Fit(config)
        parameters = sum(each.numel() for each in fit.module.model.parameters())
        with Traffic() as traffic:
            fit.fit()
        return traffic.elements, parameters

    (elements, parameters), _ = run_distributed(train, 2)
    (dtype,) = elements
    assert dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[reduce_dtype]
    reductions = STEPS * (1 if strategy in ("ddp", "zero1") else config.micro_steps)
    assert parameters <= elements[dtype] / reductions < 1.05 * parameters + 64  # padded to the ranks
