"""`clippy evaluate task=humaneval`: the share of programming problems that samples of a model solve (pass@k).

Two steps, each useful alone: samples are generated into a file in the standard schema (`task_id`, `completion`), and a
file of samples, ours or somebody else's, is scored by running it (`evaluate.sandbox`). Promises: an interrupted
generation goes on where it stopped and ends with the same file; samples keep their order in the file of results, which
lies beside them with `passed` and `result` added to each; pass@k is the unbiased estimate of Chen et al. 2021.
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
from clippy_train.evaluate.sandbox import PASSED, Limits, isolation, run_checked
from clippy_train.generate import fit
from clippy_train.model.load import load_both
from clippy_train.model.sample import Sampling, at_sequence, complete

RESULTS = "_results.jsonl"  # behind the name of the samples' file, as OpenAI's harness has it
SETTINGS = "_settings.json"
GENERATION = ("model", "problems", "batch_size", "temperature", "top_p", "max_new_tokens", "stop", "seed")


@dataclass(frozen=True)
class Problem:
    task_id: str
    prompt: str
    test: str
    entry_point: str


def humaneval(config: EvaluateConfig) -> dict[str, float]:
    """Generate what the samples' file lacks (with a model), score it (if that is allowed): pass@k by its name.

    Raises:
        ConfigError: a file is missing, or samples were made with other settings.
        DataError: a file is not in its format, or samples and problems do not belong together.
    """
    problems, samples = read_problems(str(config.problems)), Path(str(config.samples))
    if config.model:
        generate_samples(config, problems, samples)
        print(f"{samples}: {config.n} samples of each of {len(problems)} problems")
    if not config.allow_code_execution:
        print("not scored: that runs them, with allow_code_execution=true")
        return {}
    return score(config, problems, samples)


def read_problems(name: str) -> dict[str, Problem]:
    """Problems by their id, from a file or from the hub."""
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
        raise DataError(f"problems={name} holds none")
    fields = Problem.__dataclass_fields__
    try:
        return {row["task_id"]: Problem(**{field: row[field] for field in fields}) for row in rows}
    except (KeyError, TypeError) as error:
        raise DataError(f"problems={name}: each must have {', '.join(fields)}, but one lacks {error}") from error


def read_lines(path: Path, key: str) -> list[dict[str, Any]]:
    """The JSON objects of a file, one in a line; it may be compressed with gzip."""
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            return [json.loads(line) for line in file if line.strip()]
    except (OSError, EOFError) as error:
        raise ConfigError(f"{key}={path} cannot be read: {error}") from error
    except ValueError as error:
        raise DataError(f"{key}={path} is not a file of JSON lines: {error}") from error


# Samples


def generate_samples(config: EvaluateConfig, problems: dict[str, Problem], path: Path) -> None:
    """Write `config.n` samples of each problem, the first of all problems before the second of any.

    Every batch has its own seed and is written at once, so a file that was interrupted is a number of whole batches
    (a last one that is not whole is made again), and goes on as if nothing had happened.
    """
    work = [problem for _, problem in product(range(config.n), problems.values())]
    starts = range(0, len(work), config.batch_size)
    done = finished_batches(config, path, work)
    if done == len(starts):
        return
    (name,) = config.model
    model, tokenizer = load_both(name)
    for problem in problems.values():
        fit(model, tokenizer, problem.prompt, config.max_new_tokens)
    stop = at_sequence(config.stop)
    for number in tqdm(range(len(starts)), "samples", initial=done, unit=" batches", leave=False, disable=None):
        if number < done:
            continue
        some = work[starts[number] : starts[number] + config.batch_size]
        sampling = Sampling(config.max_new_tokens, config.temperature, config.top_p, config.seed + number)
        texts = complete(model, tokenizer, [problem.prompt for problem in some], sampling, stop)
        lines = [{"task_id": p.task_id, "completion": text} for p, text in zip(some, texts, strict=True)]
        with path.open("a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))


def finished_batches(config: EvaluateConfig, path: Path, work: list[Problem]) -> int:
    """How many whole batches a file of samples has; what is behind them is cut off.

    Raises:
        ConfigError: it was made with other settings, or is not ours.
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
        raise ConfigError(f"samples={path} was made otherwise ({differs}): name another file, or leave out model")
    lines = path.read_bytes().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]
    batches = min(len(whole), len(work)) // config.batch_size
    if len(whole) >= len(work):
        return -(-len(work) // config.batch_size)
    with path.open("r+b") as file:
        file.truncate(sum(map(len, whole[: batches * config.batch_size])))
    return batches


# Scores


def score(config: EvaluateConfig, problems: dict[str, Problem], path: Path) -> dict[str, float]:
    """Run every sample, write the results beside them, and estimate pass@k."""
    samples = read_lines(path, "samples")
    check_samples(samples, problems, path)
    print(f"sandbox: {isolation()}")
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
    return dict(estimates(samples, outcomes, config.ks))


def check_samples(samples: list[dict[str, Any]], problems: dict[str, Problem], path: Path) -> None:
    """Raises DataError if a sample is none, or is of no problem here, or a problem has none."""
    for number, sample in enumerate(samples, 1):
        if not (isinstance(sample, dict) and isinstance(sample.get("completion"), str) and "task_id" in sample):
            raise DataError(f"samples={path}: line {number} has no task_id, or no text as its completion")
    names = {sample["task_id"] for sample in samples}
    if names != problems.keys():
        unknown, missing = sorted(names - problems.keys()), sorted(problems.keys() - names)
        raise DataError(f"samples={path} does not belong to the problems: {unknown[:5]} are not among them, "
                        f"{missing[:5]} have no samples ({len(unknown)} and {len(missing)} in all)")  # fmt: skip


def estimates(samples: list[dict[str, Any]], outcomes: list[str], ks: list[int]) -> Iterator[tuple[str, float]]:
    """pass@k, the mean over problems, for each k that no problem has fewer samples than."""
    drawn = Counter(sample["task_id"] for sample in samples)
    right = Counter(sample["task_id"] for sample, outcome in zip(samples, outcomes, strict=True) if outcome == PASSED)
    for k in ks:
        if k <= min(drawn.values()):
            yield f"pass@{k}", mean(pass_at_k(drawn[task], right[task], k) for task in drawn)


def pass_at_k(n: int, right: int, k: int) -> float:
    """The chance that k of n samples, drawn without putting back, hold one of the `right` ones."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)
