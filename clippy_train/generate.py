"""`clippy generate`: complete a prompt with any causal LM of a Hugging Face folder."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from clippy_train.config import GenerateConfig
from clippy_train.errors import ConfigError
from clippy_train.model.load import load_both
from clippy_train.model.sample import Sampling, at_function_end, complete, never


def prompt_of(config: GenerateConfig) -> str:
    """The prompt: `prompt`, the content of `file`, or standard input for `prompt=-`.

    Raises:
        ConfigError: none or two of them are set, or what they name cannot be read.
    """
    if (config.prompt is None) == (config.file is None):
        raise ConfigError("set one of prompt=TEXT (- reads standard input) and file=PATH, or use --interactive")
    if config.prompt not in (None, "-"):
        return str(config.prompt)
    try:
        return Path(config.file).read_text() if config.file is not None else sys.stdin.read()
    except (OSError, UnicodeDecodeError) as error:
        source = f"file={config.file}" if config.file is not None else "prompt=-"
        raise ConfigError(f"{source} cannot be read: {error}") from error


def generate(config: GenerateConfig, prompt: str, out: TextIO | None = None) -> list[str]:
    """Completions of `prompt`, without it: greedy at temperature 0, else sampled.

    With `out`, prompt and completion are written there as they are made (a single one while it grows).

    Raises:
        ConfigError: no model there, or prompt and completion do not fit its positions.
    """
    return completions(*load_both(config.model), config, prompt, out)


def interact(config: GenerateConfig, source: TextIO, out: TextIO) -> None:
    """Complete one prompt after another; an empty line ends a prompt, the end of `source` ends it all."""
    model, tokenizer = load_both(config.model)
    print("A prompt, then an empty line. Ctrl-D ends.", file=out, flush=True)
    for prompt in _prompts(source):
        try:
            completions(model, tokenizer, config, prompt, out)
        except ConfigError as error:
            print(error, file=out)
        print(file=out, flush=True)


def completions(model: Any, tokenizer: Any, config: GenerateConfig, prompt: str, out: TextIO | None) -> list[str]:
    """As `generate`, with a loaded model."""
    fit(model, tokenizer, prompt, config.max_new_tokens)
    sampling = Sampling(config.max_new_tokens, config.temperature, config.top_p, config.seed)
    stop = at_function_end if config.stop == "function" else never
    if out is None or config.num_samples > 1:
        texts = complete(model, tokenizer, [prompt] * config.num_samples, sampling, stop)
        for number, text in enumerate(texts if out else [], 1):
            print(f"# {number} of {config.num_samples}\n{prompt}{text}", file=out, flush=True)
        return texts

    def show(text: str) -> None:
        print(text, end="", file=out, flush=True)

    show(prompt)
    texts = complete(model, tokenizer, [prompt], sampling, stop, show)
    show("" if texts[0].endswith("\n") else "\n")
    return texts


def fit(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> None:
    """Raises ConfigError if the prompt is empty, no text, or too long for a completion of that length."""
    if not is_text(prompt):
        raise ConfigError("prompt is not UTF-8")
    length = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    room = getattr(model.config, "max_position_embeddings", None)
    if not length:
        raise ConfigError("prompt is empty")
    if room is not None and length + max_new_tokens > room:
        raise ConfigError(
            f"max_new_tokens={max_new_tokens}: with a prompt of {length} tokens it exceeds the model's "
            f"{room} positions; at most {max(0, room - length)} fit"
        )


def is_text(prompt: str) -> bool:
    """Whether every character is one; Python carries bytes that are none as lone surrogates."""
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
