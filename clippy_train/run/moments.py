"""Adam's state beside a base model: a file that `clippy import` writes and that a run can continue from.

`optimizer.safetensors` holds `exp_avg.NAME` and `exp_avg_sq.NAME` in fp32 for every parameter, by its Hugging Face name
and shape, and in its metadata `step`, the number of updates made. It does not depend on ranks or strategy.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from clippy_train.errors import ConfigError

if TYPE_CHECKING:  # the launcher reads the step without importing torch
    from torch import Tensor

OPTIMIZER = "optimizer.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")  # torch.optim.AdamW's names


@dataclass(frozen=True)
class BaseState:
    """Adam's state in `path` after `step` updates; tensors are read on demand."""

    path: Path
    step: int

    def shapes(self) -> dict[str, list[int]]:
        """Shape of every tensor in the file, by its name there."""
        with safe_open(self.path, "pt") as file:
            return {name: file.get_slice(name).get_shape() for name in sorted(file.keys())}

    def moments(self, name: str) -> dict[str, "Tensor"]:
        """The two moments of a parameter."""
        with safe_open(self.path, "pt") as file:
            return {moment: file.get_tensor(f"{moment}.{name}") for moment in MOMENTS}

    def require_fit(self, parameters: Iterable[tuple[str, "Tensor"]]) -> None:
        """Raise ConfigError unless the file holds both moments of exactly these parameters."""
        expected = {f"{moment}.{name}": list(each.shape) for name, each in parameters for moment in MOMENTS}
        found = self.shapes()
        wrong = [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]
        if wrong:
            first = wrong[0]
            raise ConfigError(
                f"{self.path} is not from the model in training: {len(wrong)} tensors differ, the first is {first}: "
                f"{found.get(first, 'missing')} there, {expected.get(first, 'missing')} here. "
                "Tokens added to the base enlarge its embedding; use the base's own tokenizer"
            )


def save_base_state(folder: Path, step: int, moments: dict[str, dict[str, "Tensor"]]) -> None:
    """Write Adam's state to a model's folder. `moments` maps each of `MOMENTS` to a tensor per parameter."""
    from safetensors.torch import save_file

    tensors = {f"{moment}.{name}": tensor for moment in MOMENTS for name, tensor in moments[moment].items()}
    save_file(tensors, folder / OPTIMIZER, metadata={"step": str(step)})


def open_base_state(folder: Path) -> BaseState:
    """Adam's state beside a base model.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    path = folder / OPTIMIZER
    try:
        with safe_open(path, "pt") as file:
            return BaseState(path, int(file.metadata()["step"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"model.base_optimizer=continue: cannot read an optimizer state from {path} ({type(error).__name__}). "
            "`clippy import` writes one; or set model.base_optimizer=ignore"
        ) from error
