"""`clippy generate`: complete a prompt with any causal LM in a Hugging Face folder or on the hub."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from clippy_train.config import GenerateConfig
from clippy_train.errors import ConfigError
from clippy_train.model.load import load_model_and_tokenizer
from clippy_train.model.sample import (
    GAP_TOKENS,
    Gap,
    Prompt,
    Sampling,
    complete_prompts,
    never_stop,
    prompt_ids,
    prompt_room,
    stop_at_function_end,
)


def read_prompt(config: GenerateConfig) -> str:
    """Return `prompt`, the content of `file`, or standard input for `prompt=-`.

    Raises:
        ConfigError: neither or both keys are set, or the source cannot be read.
    """
    if (config.prompt is None) == (config.file is None):
        raise ConfigError("set either prompt=TEXT (- reads standard input) or file=PATH, or use --interactive")
    if config.prompt not in (None, "-"):
        return str(config.prompt)
    try:
        content = Path(config.file).read_bytes() if config.file is not None else sys.stdin.buffer.read()
        return content.decode()  # unlike reading text, this keeps \r\n
    except (OSError, UnicodeDecodeError) as error:
        source = f"file={config.file}" if config.file is not None else "prompt=-"
        raise ConfigError(f"{source} cannot be read: {error}") from error


def generate(config: GenerateConfig, prompt: str, out: TextIO | None = None) -> list[str]:
    """Return completions of `prompt`, without the prompt: greedy at temperature 0, otherwise sampled.

    If `out` is given, prompt and completion are also written there, or with `suffix` what stands before it alone; a
    single completion is streamed.

    Raises:
        ConfigError: the model cannot be loaded, or the prompt cannot be used (see `excess_tokens`).
    """
    return generate_with(*load_model_and_tokenizer(config.model), config, prompt, out)


def interact(config: GenerateConfig, source: TextIO, out: TextIO) -> None:
    """Complete one prompt after another until `source` ends; an empty line ends a prompt."""
    model, tokenizer = load_model_and_tokenizer(config.model)
    print("Enter a prompt, then an empty line. Ctrl-D quits.", file=out, flush=True)
    for prompt in _prompts(source):
        try:
            generate_with(model, tokenizer, config, prompt, out)
        except ConfigError as error:
            print(error, file=out)
        print(file=out, flush=True)


def generate_with(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, config: GenerateConfig, prompt: str, out: TextIO | None
) -> list[str]:
    """`generate` with a loaded model."""
    asked: Prompt = prompt if config.suffix is None else Gap(prompt, config.suffix)
    shown = prompt if config.suffix is None else ""
    excess = excess_tokens(model, tokenizer, asked, config.max_new_tokens)
    if excess:
        which = f"first {excess} tokens of the prompt" if config.suffix is None else f"{excess} tokens at both ends"
        print(f"the {which} are not used: no room before max_new_tokens", file=sys.stderr)
    sampling = Sampling(config.max_new_tokens, config.temperature, config.top_p, config.seed)
    stop = stop_at_function_end if config.stop == "function" and config.suffix is None else never_stop
    if out is None or config.num_samples > 1:
        texts = complete_prompts(model, tokenizer, [asked] * config.num_samples, sampling, stop)
        for number, text in enumerate(texts if out else [], 1):
            print(f"# {number} of {config.num_samples}\n{shown}{text}", file=out, flush=True)
        return texts

    def show(text: str) -> None:
        print(text, end="", file=out, flush=True)

    show(shown)
    texts = complete_prompts(model, tokenizer, [asked], sampling, stop, show)
    show("" if texts[0].endswith("\n") else "\n")
    return texts


def require_room(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: Iterable[Prompt], max_new_tokens: int
) -> None:
    """Raise ConfigError as in `excess_tokens`, and for prompts of which something would be cut."""
    excess = max((excess_tokens(model, tokenizer, each, max_new_tokens) for each in prompts), default=0)
    if excess >= max_new_tokens:
        raise ConfigError("the longest prompt exceeds this model's positions: choose another model or other problems")
    if excess:
        raise ConfigError(
            f"max_new_tokens={max_new_tokens}: with the longest prompt, this exceeds the model's positions; at most "
            f"{max_new_tokens - excess} fit"
        )


def excess_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: Prompt, max_new_tokens: int
) -> int:
    """How many tokens of a prompt have no room before `max_new_tokens`.

    Raises:
        ConfigError: the prompt is empty or not valid Unicode, `max_new_tokens` leaves no room for any, or it is a gap
            and the tokenizer has no tokens for it.
    """
    if not all(map(is_valid_text, [prompt] if isinstance(prompt, str) else prompt)):
        raise ConfigError("prompt is not UTF-8" if isinstance(prompt, str) else "prompt or suffix is not UTF-8")
    length, room = len(prompt_ids(tokenizer, prompt)), prompt_room(model, max_new_tokens)
    if not length:
        raise ConfigError("prompt is empty")
    least = 1 if isinstance(prompt, str) else 1 + GAP_TOKENS
    if room < least:
        raise ConfigError(f"max_new_tokens={max_new_tokens}: this model has room for {max_new_tokens + room - least}")
    return max(0, length - room)


def is_valid_text(prompt: str) -> bool:
    """Whether the prompt has no lone surrogates, which Python puts in place of bytes that are not UTF-8."""
    return prompt.encode(errors="ignore").decode() == prompt


def _prompts(source: TextIO) -> Iterator[str]:
    lines: list[str] = []
    for line in source:
        if line.strip():
            lines.append(line)
        elif lines:
            yield "".join(lines)
            lines = []
    if lines:
        yield "".join(lines)
