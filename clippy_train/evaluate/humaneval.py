"""`clippy evaluate task=humaneval`: the share of programming problems that a model's samples solve (pass@k).

There are two independent steps: samples are generated into a file in the standard schema (`task_id`, `completion`), and
a file of samples from any source is scored by running them (`evaluate.sandbox`). Promises: an interrupted generation
resumes and ends with the same samples; an interrupted scoring resumes; the results file, next to the samples, keeps
their order and adds `passed` and `result`; pass@k is the unbiased estimate of Chen et al. 2021. The settings file, next
to the samples too, names the weights that they are from, so that scores of any later command name them as well.
"""

import gzip
import hashlib
import json
import math
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any, TextIO, cast

from tqdm import tqdm

from clippy_train.config import EvaluateConfig
from clippy_train.errors import ConfigError, DataError
from clippy_train.evaluate.inside import PASSED
from clippy_train.evaluate.results import weights_hash
from clippy_train.evaluate.sandbox import Limits, isolation, run_checked
from clippy_train.files import atomic_write
from clippy_train.generate import require_room
from clippy_train.model.load import load_model_and_tokenizer
from clippy_train.model.sample import Sampling, complete_prompts, stop_at_sequences

RESULTS = "_results.jsonl"  # appended to the name of the samples file, as in OpenAI's harness
UNFINISHED = ".unfinished"  # appended to that of the results, until all are there
SETTINGS = "_settings.json"
GENERATION = ("model", "problems", "batch_size", "temperature", "top_p", "max_new_tokens", "stop", "seed")
PROTOCOL = ("temperature", "top_p", "max_new_tokens", "stop", "seed")  # of the settings, what scores depend on


@dataclass(frozen=True)
class Scores:
    """What a scoring found.

    Attributes:
        pass_at: pass@k by name.
        about: what it belongs to: `models` (weights by name) and `samples` (how they were made).
    """

    pass_at: dict[str, float]
    about: dict[str, Any]


@dataclass(frozen=True)
class Problem:
    task_id: str
    prompt: str
    test: str
    entry_point: str


def humaneval(config: EvaluateConfig) -> Scores | None:
    """Generate the missing samples if a model is given, and score them if execution is allowed (otherwise None).

    Raises:
        ConfigError: a file is missing, its samples were generated with other settings, or the sandbox has gaps.
        DataError: a file has the wrong format, or the samples do not match the problems.
        SandboxFault: the machine allows no verdict.
    """
    problems, samples = read_problems(str(config.problems)), Path(str(config.samples))
    if config.model:
        generate_samples(config, problems, samples)
        print(f"{samples}: {config.n} samples of each of {len(problems)} problems")
    if not config.allow_code_execution:
        print("not scored: scoring runs the samples and requires allow_code_execution=true")
        return None
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
        with open_text(path, "r") as file:
            return [json.loads(line) for line in file if line.strip()]
    except (OSError, EOFError) as error:
        raise ConfigError(f"{key}={path} cannot be read: {error}") from error
    except ValueError as error:
        raise DataError(f"{key}={path} is not a JSON lines file: {error}") from error


def open_text(path: Path, mode: str) -> TextIO:
    """Open a file, compressed if its name ends in .gz, to read ("r") or to append ("a")."""
    if path.suffix == ".gz":
        return cast("TextIO", gzip.open(path, f"{mode}t"))
    return cast("TextIO", path.open(mode))


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


# Samples


def generate_samples(config: EvaluateConfig, problems: dict[str, Problem], path: Path) -> None:
    """Write `config.n` samples per problem: the first sample of all problems, then the second, and so on.

    Every batch has its own seed and is written at once, so an interrupted file holds complete batches; an incomplete
    last one is generated again. Nothing is written before the model is known to be able to continue all prompts.
    """
    work = [problem for _, problem in product(range(config.n), problems.values())]
    settings = settings_of(config)
    found = require_same_settings(settings, path)
    starts = range(0, len(work), config.batch_size)
    done = len(starts) if len(found) >= len(work) else len(found) // config.batch_size
    if done == len(starts):
        return
    (name,) = config.model
    model, tokenizer = load_model_and_tokenizer(name)
    for problem in problems.values():
        require_room(model, tokenizer, problem.prompt, config.max_new_tokens)
    stop = stop_at_sequences(config.stop)
    begin_samples(settings, path, found[: done * config.batch_size])
    for number in tqdm(range(len(starts)), "samples", initial=done, unit=" batches", leave=False, disable=None):
        if number < done:
            continue
        some = work[starts[number] : starts[number] + config.batch_size]
        sampling = Sampling(config.max_new_tokens, config.temperature, config.top_p, config.seed + number)
        texts = complete_prompts(model, tokenizer, [problem.prompt for problem in some], sampling, stop)
        lines = [{"task_id": p.task_id, "completion": text} for p, text in zip(some, texts, strict=True)]
        with open_text(path, "a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))


def settings_of(config: EvaluateConfig) -> dict[str, Any]:
    """What the samples depend on, with the hash of the model's weights."""
    weights = {name: weights_hash(Path(name)) for name in config.model}
    return {**{name: asdict(config)[name] for name in GENERATION}, "weights": weights}


def settings_file(samples: Path) -> Path:
    return samples.with_name(samples.name + SETTINGS)


def require_same_settings(wanted: dict[str, Any], path: Path) -> list[str]:
    """Return the lines of the samples file, if there is one.

    Raises:
        ConfigError: the samples were generated with other settings, or by another tool.
    """
    if not path.exists():
        return []
    found = read_settings(path)
    changed = [name for name, value in wanted.items() if found.get(name) != value]
    if changed:
        differs = "; ".join(f"{name} was {found.get(name)!r}, is {wanted[name]!r}" for name in changed)
        raise ConfigError(f"samples={path} has other settings ({differs}): name another file, or omit model")
    return complete_lines(path)


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that samples were generated with; empty if they are from another tool."""
    file = settings_file(path)
    return cast("dict[str, Any]", json.loads(file.read_text())) if file.exists() else {}


def begin_samples(settings: dict[str, Any], path: Path, kept: list[str]) -> None:
    """Write the settings, and the samples that are kept from an interrupted generation."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(settings_file(path)) as file:
        file.write(json.dumps(settings, indent=1) + "\n")
    rewritten = path.with_name(f".{path.name}")  # with the same ending, which says whether it is compressed
    rewritten.unlink(missing_ok=True)
    with open_text(rewritten, "a") as file:
        file.writelines(kept)
    rewritten.replace(path)


# Scores


def score_samples(config: EvaluateConfig, problems: dict[str, Problem], path: Path) -> Scores:
    """Run every sample, write the results next to the samples file, and estimate pass@k."""
    samples = read_lines(path, "samples")
    check_samples(samples, problems, path)
    require_isolation(config)
    about = provenance(samples, problems, path)
    results = path.with_name(path.name + RESULTS)
    outcomes = run_samples(config, problems, samples, results)
    print(f"{results}: {outcomes.count(PASSED)} of {len(outcomes)} samples passed")
    print(describe_samples(about["samples"]))
    return Scores(dict(estimate_pass_at_k(samples, outcomes, config.ks)), about)


def check_samples(samples: list[dict[str, Any]], problems: dict[str, Problem], path: Path) -> None:
    """Require well-formed samples of these problems, and say so if some problems have none.

    Raises:
        DataError: there are none, or a line is not a sample of one of the problems.
    """
    if not samples:
        raise DataError(f"samples={path} has no samples")
    for number, sample in enumerate(samples, 1):
        program = sample.get("solution", sample.get("completion")) if isinstance(sample, dict) else None
        if not isinstance(program, str) or not isinstance(sample.get("task_id"), str | int):
            raise DataError(
                f"samples={path}: line {number} has no task_id, or its completion (or solution) is not a string"
            )
    names = {sample["task_id"] for sample in samples}
    unknown = sorted(names - problems.keys(), key=str)
    if unknown:
        raise DataError(f"samples={path} do not match the problems: {unknown[:5]} are not among them "
                        f"({len(unknown)} in all)")  # fmt: skip
    if len(names) < len(problems):
        print(f"PARTIAL: {path} has samples of {len(names)} of {len(problems)} problems; scores are over these only")


def require_isolation(config: EvaluateConfig) -> None:
    """Name what the sandbox leaves open here, and require that the user accepts it.

    Raises:
        ConfigError: the user has not.
    """
    gaps = "; ".join(isolation().gaps)
    if gaps and not config.allow_weak_sandbox:
        raise ConfigError(
            f"the sandbox is weak here: {gaps}. Allow user namespaces, or use a container (docs/evaluate.md); if you "
            "accept this, add allow_weak_sandbox=true"
        )
    print(f"sandbox: {gaps or 'no network, no other processes, a file system of its own'}")


def provenance(samples: list[dict[str, Any]], problems: dict[str, Problem], path: Path) -> dict[str, Any]:
    """The weights that the samples are from, and how they were drawn; None where another tool made them."""
    settings = read_settings(path)
    drawn = Counter(sample["task_id"] for sample in samples)
    fewest, most = min(drawn.values()), max(drawn.values())
    made = {
        "n": fewest if fewest == most else f"{fewest} to {most}",
        **{name: settings.get(name) for name in PROTOCOL},
        "problems": f"{len(drawn)} of {len(problems)}",
    }
    return {"models": settings.get("weights", {}), "samples": made}


def describe_samples(made: dict[str, Any]) -> str:
    """What a pass@k is stated with, in one line."""
    shown = {
        name: "unknown" if made[name] is None else made[name] for name in ("n", "temperature", "top_p", "problems")
    }
    return ", ".join(f"{name}: {value}" for name, value in shown.items())


def run_samples(
    config: EvaluateConfig, problems: dict[str, Problem], samples: list[dict[str, Any]], results: Path
) -> list[str]:
    """Return the outcome of each sample, and write the results file.

    Until the last one, results are in an unfinished file that begins with what they depend on. A later call with the
    same problems and limits continues it.
    """
    limits = Limits(config.timeout, config.memory_mb << 20)
    scored_with = {"problems": problems_hash(problems), **asdict(limits)}
    unfinished = results.with_name(results.name + UNFINISHED)
    outcomes = finished_outcomes(unfinished, scored_with, samples)
    workers = config.workers or len(os.sched_getaffinity(0))
    with unfinished.open("a") as file, ThreadPoolExecutor(workers) as pool:
        judged = pool.map(lambda sample: judge(sample, problems, limits), samples[len(outcomes) :])
        rest = zip(samples[len(outcomes) :], judged, strict=True)
        bar = tqdm(rest, "scoring", len(samples), initial=len(outcomes), unit=" samples", leave=False, disable=None)
        for sample, outcome in bar:
            file.write(result_line(sample, outcome))
            file.flush()
            outcomes.append(outcome)
    with atomic_write(results) as file:
        file.writelines(map(result_line, samples, outcomes))
    unfinished.unlink()
    return outcomes


def judge(sample: dict[str, Any], problems: dict[str, Problem], limits: Limits) -> str:
    """Run a sample: a whole program (`solution`), or the continuation of its problem's prompt (`completion`)."""
    problem = problems[sample["task_id"]]
    program = sample["solution"] if "solution" in sample else problem.prompt + sample["completion"]
    return run_checked(program, problem.test, problem.entry_point, limits)


def result_line(sample: dict[str, Any], outcome: str) -> str:
    return json.dumps({**sample, "passed": outcome == PASSED, "result": outcome}) + "\n"


def finished_outcomes(unfinished: Path, scored_with: dict[str, Any], samples: list[dict[str, Any]]) -> list[str]:
    """Return the outcomes that an interrupted scoring has left for these samples, and drop the rest of its file."""
    head, *lines = complete_lines(unfinished) or [""]
    outcomes: list[str] = []
    if head == json.dumps(scored_with) + "\n":
        for sample, line in zip(samples, lines, strict=False):
            outcome = json.loads(line)["result"]
            if line != result_line(sample, outcome):
                break
            outcomes.append(outcome)
    with atomic_write(unfinished) as file:
        file.write(json.dumps(scored_with) + "\n")
        file.writelines(lines[: len(outcomes)])
    return outcomes


def problems_hash(problems: dict[str, Problem]) -> str:
    """Identifies everything about the problems that a result depends on."""
    return hashlib.sha256(json.dumps([asdict(each) for each in problems.values()]).encode()).hexdigest()


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
