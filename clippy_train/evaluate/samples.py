"""The file of samples that `clippy evaluate task=humaneval` scores: written by one process or by several.

Promises: the samples depend on the settings alone, not on interruptions or on how many processes share the work, since
each batch has its own seed. A settings file next to them names those settings and the weights, and samples of others
are never mixed in. The file holds whole batches at any time, but for a last one, which is generated again.
"""

import gzip
import json
import zlib
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from itertools import chain, product, zip_longest
from pathlib import Path
from typing import Any

from tqdm import tqdm

from clippy_train.config import EvaluateConfig
from clippy_train.errors import ConfigError, first_line
from clippy_train.evaluate.results import weights_version
from clippy_train.files import locked
from clippy_train.generate import require_room
from clippy_train.model.load import load_model_and_tokenizer
from clippy_train.model.sample import Gap, Prompt, Sampling, complete_prompts, stop_at_sequences
from clippy_train.shards.problems import Problem, open_text

SETTINGS = "_settings.json"  # appended to the name of the samples file
LOCK = "_lock"  # appended to it while a command writes or scores it
GENERATION = ("model", "problems", "batch_size", "temperature", "top_p", "max_new_tokens", "stop", "seed")


def at_temperature(config: EvaluateConfig, temperature: float) -> EvaluateConfig:
    """The evaluation at one of several temperatures, each of which has its own file of samples."""
    if len(config.temperature) == 1:
        return config
    path = Path(str(config.samples))
    return replace(config, temperature=[temperature], samples=str(path.with_name(f"t{temperature:g}-{path.name}")))


def generate_samples(config: EvaluateConfig, problems: dict[str | int, Problem], path: Path) -> None:
    """Write `config.n` samples per problem: the first sample of all problems, then the second, and so on.

    Every batch has its own seed and is written at once, so an interrupted file holds complete batches; an incomplete
    last one is generated again. Nothing is written before the model is known to be able to continue all prompts. A
    process with a share of the batches writes a file of its own, and joins all of them if it is the last.
    """
    work = [problem for _, problem in product(range(config.n), problems.values())]
    batches = [work[start : start + config.batch_size] for start in range(0, len(work), config.batch_size)]
    settings, (index, parts) = settings_of(config, problems), config.part
    if len(require_same_settings(settings, path)) < len(work):
        own = part_file(path, index, parts)
        add_batches(config, batches[index::parts], settings, own)
        if parts > 1 and not join_parts(path, settings, [sum(map(len, batches[n::parts])) for n in range(parts)], own):
            print(f"{own}: complete; {path} follows from the last part")
            return
    print(f"{path}: {config.n} samples of each of {len(problems)} problems")


def part_file(path: Path, index: int, parts: int) -> Path:
    return path if parts == 1 else path.with_name(f"{index + 1}-of-{parts}-{path.name}")


def add_batches(config: EvaluateConfig, batches: list[list[Problem]], settings: dict[str, Any], path: Path) -> None:
    """Generate the batches that a file of samples lacks."""
    if not missing_batches(config, batches, require_same_settings(settings, path)):
        return
    (name,) = config.model
    model, tokenizer = load_model_and_tokenizer(name)
    prompts = map(prompt_of, dict.fromkeys(chain.from_iterable(batches)))
    require_room(model, tokenizer, prompts, config.max_new_tokens)
    stop, (index, parts) = stop_at_sequences(settings["stop"]), config.part
    path.parent.mkdir(parents=True, exist_ok=True)
    with alone(path):
        found = require_same_settings(settings, path)  # again: another command may have written some meanwhile
        missing = missing_batches(config, batches, found)
        if not missing:
            return
        done = len(batches) - len(missing)
        replace_samples(settings, path, found[: done * config.batch_size], path)
        bar = tqdm(missing, "samples", len(batches), initial=done, unit=" batches", leave=False, disable=None)
        for number, some in enumerate(bar, done):
            seed = config.seed + index + number * parts  # that of the batch in all of the samples
            sampling = Sampling(config.max_new_tokens, settings["temperature"], config.top_p, seed)
            texts = complete_prompts(model, tokenizer, [prompt_of(problem) for problem in some], sampling, stop)
            lines = [{"task_id": p.task_id, "completion": text} for p, text in zip(some, texts, strict=True)]
            with open_text(path, "a") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines))


def missing_batches(config: EvaluateConfig, batches: list[list[Problem]], found: list[str]) -> list[list[Problem]]:
    """The batches that are not among the lines found; an incomplete one is missing."""
    return [] if len(found) >= sum(map(len, batches)) else batches[len(found) // config.batch_size :]


def alone(path: Path) -> AbstractContextManager[None]:
    """Keep other commands from writing or scoring a file of samples.

    Raises:
        ConfigError: one does.
    """
    return locked(path.with_name(path.name + LOCK), f"samples={path}: another command uses them; wait for it")


def prompt_of(problem: Problem) -> Prompt:
    return problem.prompt if problem.suffix is None else Gap(problem.prompt, problem.suffix)


def join_parts(path: Path, settings: dict[str, Any], lengths: list[int], own: Path) -> bool:
    """Write the samples from the parts of all processes and remove those; False if some are not complete.

    Several processes may do so at once: they write the same, and one that finds no parts any more leaves.

    Args:
        lengths: samples of each part.
        own: this process's part.
    """
    parts = len(lengths)
    files = [part_file(path, index, parts) for index in range(parts)]
    contents = [complete_lines(file) for file in files]
    if any(len(found) < length for found, length in zip(contents, lengths, strict=True)):
        return len(complete_lines(path)) >= sum(lengths)  # another process has joined them
    size = settings["batch_size"]
    batches = [[found[start : start + size] for start in range(0, len(found), size)] for found in contents]
    lines = chain.from_iterable(chain.from_iterable(zip_longest(*batches, fillvalue=[])))
    replace_samples(settings, path, lines, own)
    for file in files:
        file.unlink(missing_ok=True)
        settings_file(file).unlink(missing_ok=True)
    return True


def settings_of(config: EvaluateConfig, problems: dict[str | int, Problem]) -> dict[str, Any]:
    """What the samples depend on, with the hash of the model's weights."""
    usual = dict.fromkeys(chain.from_iterable(problem.stop for problem in problems.values()))
    weights = {name: weights_version(name) for name in config.model}
    settings = {name: asdict(config)[name] for name in GENERATION}
    (temperature,) = config.temperature
    stop = list(usual) if config.stop is None else config.stop
    return {**settings, "temperature": temperature, "stop": stop, "weights": weights}


def settings_file(samples: Path) -> Path:
    return samples.with_name(samples.name + SETTINGS)


def require_same_settings(wanted: dict[str, Any], path: Path) -> list[str]:
    """Return the lines of the samples file, if there is one.

    Raises:
        ConfigError: the samples were generated with other settings, or by another tool.
    """
    if path.is_dir():
        raise ConfigError(f"samples={path} is a folder: name a file")
    if not path.exists():
        return []
    found = read_settings(path)
    changed = [name for name, value in wanted.items() if found.get(name) != value]
    if changed:
        differs = "; ".join(f"{name} was {found.get(name)!r}, is {wanted[name]!r}" for name in changed)
        raise ConfigError(f"samples={path} has other settings ({differs}): name another file, or omit model")
    return complete_lines(path)


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that samples were generated with; empty if they are from another tool.

    Raises:
        ConfigError: the file of settings is damaged.
    """
    file = settings_file(path)
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_bytes())
    except ValueError as error:
        raise ConfigError(
            f"{file} is damaged ({first_line(error)}): remove it, and generate the samples again"
        ) from error
    return found if isinstance(found, dict) else {}


def replace_samples(settings: dict[str, Any], path: Path, lines: Iterable[str], own: Path) -> None:
    """Write a file of samples and its settings; at any time, both are whole.

    Args:
        own: a file that no other process writes at the same time.
    """
    for target, content in ((settings_file(path), [json.dumps(settings, indent=1) + "\n"]), (path, lines)):
        staging = target.with_name(f".{own.stem}-{target.name}")  # its ending says whether it is compressed
        staging.unlink(missing_ok=True)
        with open_text(staging, "a") as file:
            file.writelines(content)
        staging.replace(target)


def complete_lines(path: Path) -> list[str]:
    """The lines of a file, each with its end, without an unfinished last one; of a damaged file, all but the last."""
    lines: list[str] = []
    try:
        with open_text(path, "r") as file:
            lines.extend(file)
    except FileNotFoundError:
        return []
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError):
        return lines[:-1]
    return [line for line in lines if line.endswith("\n")]
