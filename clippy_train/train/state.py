"""What callbacks share about the optimizer step under way. The module and `Monitor` write it, the others read."""

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
        bits_per_byte: of the last validation, by the step that it followed.
    """

    losses: list[Tensor] = field(default_factory=list)
    ended: bool = False
    lr: float = 0.0
    grad_norm: Tensor | float = 0.0
    bits_per_byte: dict[int, float] = field(default_factory=dict)

    def add_loss(self, loss: Tensor, ended: bool) -> None:
        """Record the loss of a micro-batch, and whether it is the last of its step."""
        if self.ended:
            self.losses = []
        self.losses.append(loss)
        self.ended = ended
