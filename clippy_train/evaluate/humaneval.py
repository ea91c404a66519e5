"""`clippy evaluate task=humaneval`: the share of programming problems that a model's samples solve (pass@k).

There are two independent steps: samples are generated into a file in the standard schema (`task_id`, `completion`), and
a file of samples from any source is scored by running them (`evaluate.sandbox`). Promises: an interrupted generation
resumes and ends with the same file; the results file, next to the samples, keeps their order and adds `passed` and
`result`; pass@k is the unbiased estimate of Chen et al. 2021.
"""

import gzip
import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from tqdm import tqdm

from clippy_train.config import EvaluateConfig
from clippy_train.errors import ConfigError, DataError
from clippy_train.evaluate.sandbox import PASSED, Limits, describe_isolation, run_checked
from clippy_train.generate import require_room
from clippy_train.model.load import load_model_and_tokenizer
from clippy_train.model.sample import Sampling, complete_prompts, stop_at_sequences

RESULTS = "_results.jsonl"  # appended to the name of the samples file, as in OpenAI's harness
SETTINGS = "_settings.json"
GENERATION = ("model", "problems", "batch_size", "temperature", "top_p", "max_new_tokens", "stop", "seed")


@dataclass(frozen=True)
class Problem:
    task_id: str
    prompt: str
    test: str
    entry_point: str


def humaneval(config: EvaluateConfig) -> dict[str, float]:
    """Generate the missing samples if a model is given, score them if execution is allowed; return pass@k by name.

    Raises:
        ConfigError: a file is missing, or its samples were generated with other settings.
        DataError: a file has the wrong format, or the samples do not match the problems.
    """
    problems, samples = read_problems(str(config.problems)), Path(str(config.samples))
    if config.model:
        generate_samples(config, problems, samples)
        print(f"{samples}: {config.n} samples of each of {len(problems)} problems")
    if not config.allow_code_execution:
        print("not scored: scoring runs the samples and requires allow_code_execution=true")
        return {}
    return score_samples(config, problems, samples)


def read_problems(name: str) -> dict[str, Problem]:
    """Read problems by task id, from a file or a dataset on the hub.

    Raises:
        ConfigError: neither exists.
        DataError: there are no problems, or one lacks a field.
    """
    path = Path(name)
    if path.is_file():
        rows = read_lines(path, "problems")
    elif name.endswith((".jsonl", ".gz")):
        raise ConfigError(f"problems={name}: no such file")
    else:
        import datasets

        try:
            rows = list(datasets.load_dataset(name, split="test"))
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise ConfigError(f"problems={name} is neither a file nor a dataset: {error}") from error
    if not rows:
        raise DataError(f"problems={name} has no problems")
    fields = Problem.__dataclass_fields__
    try:
        return {row["task_id"]: Problem(**{field: row[field] for field in fields}) for row in rows}
    except (KeyError, TypeError) as error:
        raise DataError(f"problems={name}: a problem lacks {error} (required: {', '.join(fields)})") from error


def read_lines(path: Path, key: str) -> list[dict[str, Any]]:
    """Read a file with one JSON object per line, optionally gzipped."""
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            return [json.loads(line) for line in file if line.strip()]
    except (OSError, EOFError) as error:
        raise ConfigError(f"{key}={path} cannot be read: {error}") from error
    except ValueError as error:
        raise DataError(f"{key}={path} is not a JSON lines file: {error}") from error


# Samples


def generate_samples(config: EvaluateConfig, problems: dict[str, Problem], path: Path) -> None:
    """Write `config.n` samples per problem: the first sample of all problems, then the second, and so on.

    Every batch has its own seed and is written at once, so an interrupted file holds complete batches; an incomplete
    last one is generated again.
    """
    work = [problem for _, problem in product(range(config.n), problems.values())]
    starts = range(0, len(work), config.batch_size)
    done = finished_batches(config, path, work)
    if done == len(starts):
        return
    (name,) = config.model
    model, tokenizer = load_model_and_tokenizer(name)
    for problem in problems.values():
        require_room(model, tokenizer, problem.prompt, config.max_new_tokens)
    stop = stop_at_sequences(config.stop)
    for number in tqdm(range(len(starts)), "samples", initial=done, unit=" batches", leave=False, disable=None):
        if number < done:
            continue
        some = work[starts[number] : starts[number] + config.batch_size]
        sampling = Sampling(config.max_new_tokens, config.temperature, config.top_p, config.seed + number)
        texts = complete_prompts(model, tokenizer, [problem.prompt for problem in some], sampling, stop)
        lines = [{"task_id": p.task_id, "completion": text} for p, text in zip(some, texts, strict=True)]
        with path.open("a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))


def finished_batches(config: EvaluateConfig, path: Path, work: list[Problem]) -> int:
    """Count the complete batches in the samples file, and truncate it after the last one.

    Raises:
        ConfigError: the samples were generated with other settings, or by another tool.
    """
    settings = path.with_name(path.name + SETTINGS)
    wanted = {name: asdict(config)[name] for name in GENERATION}
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        settings.write_text(json.dumps(wanted, indent=1) + "\n")
        path.touch()
        return 0
    found = json.loads(settings.read_text()) if settings.exists() else {}
    changed = [name for name, value in wanted.items() if found.get(name) != value]
    if changed:
        differs = "; ".join(f"{name} was {found.get(name)!r}, is {wanted[name]!r}" for name in changed)
        raise ConfigError(f"samples={path} has other settings ({differs}): name another file, or omit model")
    lines = path.read_bytes().splitlines(keepends=True)
    complete = [line for line in lines if line.endswith(b"\n")]
    batches = min(len(complete), len(work)) // config.batch_size
    if len(complete) >= len(work):
        return -(-len(work) // config.batch_size)
    with path.open("r+b") as file:
        file.truncate(sum(map(len, complete[: batches * config.batch_size])))
    return batches


# Scores


def score_samples(config: EvaluateConfig, problems: dict[str, Problem], path: Path) -> dict[str, float]:
    """Run every sample, write the results next to the samples file, and estimate pass@k."""
    samples = read_lines(path, "samples")
    check_samples(samples, problems, path)
    print(f"sandbox: {describe_isolation()}")
    limits = Limits(config.timeout, config.memory_mb << 20)

    def outcome(sample: dict[str, Any]) -> str:
        problem = problems[sample["task_id"]]
        return run_checked(problem.prompt + sample["completion"], problem.test, problem.entry_point, limits)

    with ThreadPoolExecutor(config.workers or os.cpu_count()) as pool:
        bar = tqdm(pool.map(outcome, samples), "scoring", len(samples), unit=" samples", leave=False, disable=None)
        outcomes = list(bar)
    results = path.with_name(path.name + RESULTS)
    with results.open("w") as file:
        for sample, result in zip(samples, outcomes, strict=True):
            file.write(json.dumps({**sample, "passed": result == PASSED, "result": result}) + "\n")
    print(f"{results}: {outcomes.count(PASSED)} of {len(outcomes)} samples passed")
    return dict(estimate_pass_at_k(samples, outcomes, config.ks))


def check_samples(samples: list[dict[str, Any]], problems: dict[str, Problem], path: Path) -> None:
    """Require well-formed samples, for all of these problems and no others.

    Raises:
        DataError: a line is not a sample, or the samples do not match the problems.
    """
    for number, sample in enumerate(samples, 1):
        if not (isinstance(sample, dict) and isinstance(sample.get("completion"), str) and "task_id" in sample):
            raise DataError(f"samples={path}: line {number} has no task_id, or its completion is not a string")
    names = {sample["task_id"] for sample in samples}
    if names != problems.keys():
        unknown, missing = sorted(names - problems.keys()), sorted(problems.keys() - names)
        raise DataError(f"samples={path} do not match the problems: {unknown[:5]} are not among them, "
                        f"{missing[:5]} have no samples ({len(unknown)} and {len(missing)} in all)")  # fmt: skip


def estimate_pass_at_k(
    samples: list[dict[str, Any]], outcomes: list[str], ks: list[int]
) -> Iterator[tuple[str, float]]:
    """Yield pass@k, the mean over problems, for each k for which every problem has enough samples."""
    drawn = Counter(sample["task_id"] for sample in samples)
    right = Counter(sample["task_id"] for sample, outcome in zip(samples, outcomes, strict=True) if outcome == PASSED)
    for k in ks:
        if k <= min(drawn.values()):
            yield f"pass@{k}", mean(pass_at_k(drawn[task], right[task], k) for task in drawn)


def pass_at_k(n: int, right: int, k: int) -> float:
    """The probability that k of n samples, drawn without replacement, include one of the `right` correct ones."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)
