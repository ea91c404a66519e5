"""Sampling from a causal LM: the one home of generation, for `clippy generate`, HumanEval and samples during training.

Rows are padded on the left and share a key-value cache. A row ends where a `Stop` says so, which looks at the text
after each token (tokens do not end where a stop sequence begins). Costs, beside the model: decoding each
completion as often as it has tokens.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

NO_TOKEN = -1  # as end of text

Stop = Callable[[str], int | None]  # a completion so far -> where it ends, or None while it goes on


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; `temperature` 0 is greedy.

    Attributes:
        fixed_length: take `max_new_tokens` steps whatever is written, as ranks must that hold parts of one model.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    fixed_length: bool = False


def never(text: str) -> int | None:
    return None


def at_sequence(sequences: list[str]) -> Stop:
    """Stop before the first of some strings."""
    pattern = re.compile("|".join(map(re.escape, sequences)) or "(?!)")

    def stop(text: str) -> int | None:
        found = pattern.search(text)
        return found.start() if found else None

    return stop


def at_function_end(text: str) -> int | None:
    """Stop where the function that is being written ends: behind a brace in column 0, or before what else stands there.

    Column 0 may still hold what closes a parameter list or a literal (`):`, `]`), and the first line, which continues
    the prompt's last.
    """
    for found in re.finditer(r"\n(?=[^\s)\]])", text):
        if text[found.end()] != "}":
            return found.start() + 1
        line_end = text.find("\n", found.end())
        return line_end + 1 if line_end >= 0 else None
    return None


@torch.no_grad()
def complete(
    model: Any,
    tokenizer: Any,
    prompts: list[str],
    sampling: Sampling,
    stop: Stop = never,
    on_text: Callable[[str], None] | None = None,
) -> list[str]:
    """A completion for each prompt, without it and without what a stop cuts off.

    Args:
        on_text: told of text as it grows; for a single prompt, and stops that never cut off what was there before.
    """
    encoded = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    longest = max(map(len, encoded))
    end, device = tokenizer.eos_token_id, next(model.parameters()).device
    ids = torch.tensor([[end] * (longest - len(each)) + each for each in encoded], device=device)
    mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in encoded], device=device)
    ended = Ended(tokenizer, longest, stop, on_text)
    chosen: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        chosen = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        torch.manual_seed(sampling.seed)
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=NO_TOKEN if sampling.fixed_length else end,
        pad_token_id=end,
        stopping_criteria=StoppingCriteriaList([ended]),
        **chosen,
    )
    texts = [ended.text(row) for row in out]
    if on_text:
        on_text(texts[0][ended.shown :])
    return texts


class Ended(StoppingCriteria):
    """Which rows have ended, by their text."""

    def __init__(self, tokenizer: Any, prompt_length: int, stop: Stop, on_text: Callable[[str], None] | None) -> None:
        self.tokenizer, self.prompt_length, self.stop, self.on_text = tokenizer, prompt_length, stop, on_text
        self.shown = 0  # characters of the first row that `on_text` knows

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        texts = [self._decoded(row) for row in input_ids]
        if self.on_text:
            self._show(texts[0])
        return torch.tensor([self.stop(text) is not None for text in texts], device=input_ids.device)

    def text(self, row: Tensor) -> str:
        decoded = self._decoded(row)
        return decoded[: self.stop(decoded)]

    def _decoded(self, row: Tensor) -> str:
        ids, end = row[self.prompt_length :].tolist(), self.tokenizer.eos_token_id
        return self.tokenizer.decode(ids[: ids.index(end)] if end in ids else ids, skip_special_tokens=True)

    def _show(self, text: str) -> None:
        """Pass on what no later token changes: not the first bytes of a character that is not complete."""
        certain = text[: self.stop(text)].rstrip("\ufffd")
        self.on_text(certain[self.shown :])  # type: ignore[misc]
        self.shown = max(self.shown, len(certain))
