"""What callbacks share about the optimizer step under way. The module writes it, they read."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class StepState:
    """
    Attributes:
        losses: mean loss of each micro-batch of the step so far, on the device.
        ended: whether the last micro-batch was the last of the step.
        lr: learning rate of the last update.
        grad_norm: global gradient norm of the last update, before clipping; on the device if it was computed there.
    """

    losses: list[Tensor] = field(default_factory=list)
    ended: bool = False
    lr: float = 0.0
    grad_norm: Tensor | float = 0.0

    def add_loss(self, loss: Tensor, ended: bool) -> None:
        """Record the loss of a micro-batch, and whether it is the last of its step."""
        if self.ended:
            self.losses = []
        self.losses.append(loss)
        self.ended = ended
