"""Sample from a causal LM: the generation code of `clippy generate`, HumanEval and samples during training.

Prompts are cut and padded on the left, and share a key-value cache; of a gap, the text farthest from it is cut. A
completion ends where a `Stop` says. It sees the decoded text after every token, because a stop sequence may begin
inside a token. Each token is decoded once.
"""

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, StoppingCriteria, StoppingCriteriaList

from clippy_train.tokenizer import FimIds, encoder, fim_ids, fim_tokens

GAP_TOKENS = len(FimIds._fields)  # in a prompt that is a gap
NO_TOKEN = -1  # an end-of-text id that is never produced


class Gap(NamedTuple):
    """The text before and after what is to be written (fill-in-the-middle)."""

    before: str
    after: str


Prompt = str | Gap
Stop = Callable[[str], int | None]  # the completion so far -> where to cut it, or None to continue


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; `temperature` 0 is greedy.

    Attributes:
        fixed_length: generate `max_new_tokens` tokens even after end-of-text: under ZeRO-3 all ranks must run the same
            number of forward passes.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    fixed_length: bool = False


def never_stop(text: str) -> int | None:
    """Let a completion run to its end-of-text token or its maximum length."""
    return None


def stop_at_sequences(sequences: list[str]) -> Stop:
    """Stop before the first occurrence of any of the strings."""
    pattern = re.compile("|".join(map(re.escape, sequences)) or "(?!)")

    def stop(text: str) -> int | None:
        found = pattern.search(text)
        return found.start() if found else None

    return stop


def stop_at_function_end(text: str) -> int | None:
    """Stop where the current function ends: after a closing brace in column 0, or before other text in column 0.

    The first line is exempt, because it continues the prompt's last line, and so are lines that close a parameter list
    or a literal (`):`, `]`).
    """
    for found in re.finditer(r"\n(?=[^\s)\]])", text):
        if text[found.end()] != "}":
            return found.start() + 1
        line_end = text.find("\n", found.end())
        return line_end + 1 if line_end >= 0 else None
    return None


@torch.no_grad()
def complete_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    stop: Stop = never_stop,
    on_text: Callable[[str], None] | None = None,
) -> list[str]:
    """Return the completion of each prompt, without the prompt and cut at `stop`.

    Of a prompt that leaves no room for `max_new_tokens` in the model's positions, the first tokens are not used.

    Args:
        on_text: called with each new piece of text. It requires a single prompt, and a `stop` that never cuts text that
            it has let pass before.

    Raises:
        ConfigError: a prompt is a gap, and the tokenizer has no tokens for it.
    """
    room = prompt_room(model, sampling.max_new_tokens)
    encoded = [prompt_ids(tokenizer, prompt, room) for prompt in prompts]
    longest = max(map(len, encoded))
    end, device = tokenizer.eos_token_id, next(model.parameters()).device
    ids = torch.tensor([[end] * (longest - len(each)) + each for each in encoded], device=device)
    mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in encoded], device=device)
    stopping = StopOnText(tokenizer, longest, stop, on_text)
    settings: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        settings = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        torch.manual_seed(sampling.seed)
    out = generate_tokens(
        model,
        ids,
        attention_mask=mask,
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=NO_TOKEN if sampling.fixed_length else end,
        pad_token_id=end,
        suppress_tokens=list(fim_ids(tokenizer)) if fim_tokens(tokenizer) else None,  # they are never an answer
        stopping_criteria=StoppingCriteriaList([stopping]),
        **settings,
    )
    texts = [stopping.completion(row) for row in out]
    if on_text:
        on_text(texts[0][stopping.shown :])
    return texts


def prompt_ids(tokenizer: PreTrainedTokenizerFast, prompt: Prompt, room: int = sys.maxsize) -> list[int]:
    """The ids of a prompt, at most `room`; of a gap, each side has half of it and what the other leaves.

    Raises:
        ConfigError: it is a gap, and the tokenizer has no tokens for it.
    """
    if isinstance(prompt, str):
        ids: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return ids[max(0, len(ids) - room) :]
    special = fim_ids(tokenizer)
    before, after = encoder(tokenizer)([prompt.before, prompt.after])
    room -= GAP_TOKENS
    after = after[: max(room // 2, room - len(before))]
    before = before[max(0, len(before) - (room - len(after))) :]
    return [special.prefix, *before, special.suffix, *after, special.middle]


def prompt_room(model: PreTrainedModel, max_new_tokens: int) -> int:
    """The longest prompt, in tokens, that leaves room for `max_new_tokens`; not positive if none does."""
    positions: int = getattr(model.config, "max_position_embeddings", sys.maxsize)
    return positions - max_new_tokens


def generate_tokens(model: PreTrainedModel, input_ids: Tensor, **settings: Any) -> Tensor:
    """Call transformers' `generate`, `[batch, seq]` to `[batch, longer seq]`; its declared types reject its models."""
    generate = cast("Callable[..., Tensor]", model.generate)
    return generate(input_ids, **settings)


class StopOnText(StoppingCriteria):
    """Apply a `Stop` to the decoded text of every sequence, and stream the text of the first to `on_text`.

    Attributes:
        shown: characters of the first completion that `on_text` has received.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        prompt_length: int,
        stop: Stop,
        on_text: Callable[[str], None] | None,
    ) -> None:
        self.tokenizer, self.prompt_length, self.stop, self.on_text = tokenizer, prompt_length, stop, on_text
        self.shown = 0
        self._texts: list[str] = []
        self._streams: list[DecodeStream | None] = []  # None: the completion has ended

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if not self._streams:
            self._streams = [DecodeStream(skip_special_tokens=True) for _ in input_ids]
            self._texts = [""] * len(input_ids)
        for row, token in enumerate(input_ids[:, -1].tolist()):
            self._add(row, token)
        if self.on_text:
            self._show(self.on_text)
        return torch.tensor([stream is None for stream in self._streams], device=input_ids.device)

    def completion(self, row: Tensor) -> str:
        """The text of a generated sequence `[seq]` after its prompt, cut at the stop."""
        ids, end = row[self.prompt_length :].tolist(), self.tokenizer.eos_token_id
        decoded = str(self.tokenizer.decode(ids[: ids.index(end)] if end in ids else ids, skip_special_tokens=True))
        return decoded[: self.stop(decoded)]

    def _add(self, row: int, token: int) -> None:
        """Decode one more token of a row. Its text lacks the first bytes of a character that is not complete yet."""
        stream = self._streams[row]
        if stream is None:
            return
        if token != self.tokenizer.eos_token_id:
            self._texts[row] += stream.step(self.tokenizer.backend_tokenizer, token) or ""
        if token == self.tokenizer.eos_token_id or self.stop(self._texts[row]) is not None:
            self._streams[row] = None

    def _show(self, on_text: Callable[[str], None]) -> None:
        certain = self._texts[0][: self.stop(self._texts[0])]
        on_text(certain[self.shown :])
        self.shown = max(self.shown, len(certain))
