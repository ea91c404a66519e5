"""The recipe's optimizers: learning-rate schedule, AdamW and Adafactor, gradient clipping."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from transformers.optimization import Adafactor

from clippy_train.config import OptimConfig

# The defaults of `optax.adafactor` (the same from 0.0.9 to 0.2.8), which the original's --adafactor used, by the names
# of transformers' class: beta2 of update t (from 1) is 1 - t**-0.8, 1e-30 is added to squared gradients, a tensor's
# update is clipped to a root mean square of 1, then scaled by that of the tensor, at least 1e-3. No momentum, no decay.
# optax factors a matrix only if both sides are at least 128, transformers always; all of GPT-Neo's matrices are.
ADAFACTOR: dict[str, Any] = {
    "decay_rate": -0.8,
    "eps": (1e-30, 1e-3),
    "clip_threshold": 1.0,
    "scale_parameter": True,
    "beta1": None,
    "weight_decay": 0.0,
    "relative_step": False,
    "warmup_init": False,
}


class DeviceAdafactor(Adafactor):
    """Adafactor whose learning rate stays on the GPU: the base class reads every tensor's scale back to the host."""

    @staticmethod
    def _get_lr(param_group: dict[str, Any], param_state: dict[str, Any]) -> Tensor:
        scale: Tensor = param_state["RMS"].clamp(min=param_group["eps"][1])  # `ADAFACTOR` sets scale_parameter
        lr: Tensor = scale * param_group["lr"]
        return lr


# Share of the way from the peak to the end, at a share of the decay. That of `wsd` is the "1-sqrt" that Hagele et al.
# 2024 (arXiv 2405.18392) found best for a decay after a constant rate.
DECAY: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: (1 - math.cos(math.pi * progress)) / 2,
    "linear": lambda progress: progress,
    "wsd": math.sqrt,
    "constant": lambda progress: 0.0,
}


def lr_at(step: int, settings: OptimConfig) -> float:
    """Learning rate of update `step`, counted from 0: linear warm-up from 0, decay, then constant.

    The recipe's: `lr(k) = peak * min(k, w)/w - (peak - end) * (1 - cos(pi * clip(k - w, 0, d)/d))/2`, with `end =
    min_lr_ratio * peak`; the original's, except that zero warm-up or decay steps are allowed (it gave NaN or an error).
    """
    warm = min(step, settings.warmup_steps) / settings.warmup_steps if settings.warmup_steps else 1.0
    after = step - settings.warmup_steps - (settings.stable_steps or 0)
    progress = min(max(after, 0) / settings.decay_steps, 1.0) if settings.decay_steps else 0.0
    drop = settings.lr * (1 - settings.min_lr_ratio)
    return settings.lr * warm - drop * DECAY[settings.schedule](progress)


def describe_schedule(settings: OptimConfig) -> str:
    """The schedule in words, with its end."""
    rise = f"0 to {settings.lr:g} in {settings.warmup_steps} steps"
    if settings.schedule == "constant":
        return f"{rise}, then constant"
    stable = f"constant for {settings.stable_steps}, " if settings.stable_steps else ""
    shape = "1-sqrt" if settings.schedule == "wsd" else settings.schedule
    end = settings.lr * settings.min_lr_ratio
    return f"{rise}, {stable}{shape} decay to {end:g} in {settings.decay_steps}, then constant"


class Schedule(LRScheduler):
    """`lr_at` as a torch scheduler, stepped once after every optimizer step: update k runs with `lr_at(k)`."""

    def __init__(self, optimizer: torch.optim.Optimizer, settings: OptimConfig) -> None:
        self.settings = settings
        self._groups = [
            {name: each for name, each in group.items() if name != "params"} for group in optimizer.param_groups
        ]
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        return [lr_at(self.last_epoch, self.settings) for _ in self.optimizer.param_groups]

    def start_at(self, step: int) -> None:
        """Continue as if `step` updates had been made, with the settings that the optimizer was built with.

        A checkpoint brings those of the attempt that wrote it.
        """
        self.last_epoch = step
        for group, built, lr in zip(self.optimizer.param_groups, self._groups, self.get_lr(), strict=True):
            group.update(built, lr=lr)

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.last_epoch}  # settings come from the configuration, never from a checkpoint


def build_optimizer(model: nn.Module, settings: OptimConfig) -> torch.optim.Optimizer:
    """Build the optimizer that `settings.name` names, over all parameters of the model."""
    if settings.name == "adafactor":
        return DeviceAdafactor(model.parameters(), lr=settings.lr, **ADAFACTOR)  # type: ignore[no-untyped-call]  # untyped in transformers
    return build_adamw(model, settings)


def build_adamw(model: nn.Module, settings: OptimConfig) -> torch.optim.AdamW:
    """AdamW with the original's decay mask: everything decays, embeddings included, but biases and LayerNorm scales."""
    assert settings.betas is not None  # `config.training_problems` requires betas, eps and weight_decay for AdamW
    assert settings.eps is not None
    decayed, plain = parameter_groups(model)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    beta1, beta2 = settings.betas
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(beta1, beta2), eps=settings.eps)


def parameter_groups(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Split the parameters into those with and without weight decay: disjoint, complete, a tied weight once."""
    norms = {id(p) for module in model.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():  # named_parameters yields a shared parameter once
        (plain if name.endswith("bias") or id(parameter) in norms else decayed).append(parameter)
    return decayed, plain


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients in place to a global norm of at most `max_norm` (0 disables it); return the norm before.

    The norm is computed in float64: on CPU, torch's fp32 norm of a large embedding is off by up to 2.7e-3.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    total = torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt()
    if max_norm > 0:
        scale = torch.where(total < max_norm, 1.0, max_norm / total)
        for gradient in gradients:
            gradient.mul_(scale.to(gradient.dtype))
    return total
