"""`clippy evaluate task=humaneval`: the share of programming problems that a model's samples solve (pass@k).

There are two independent steps: samples are generated into a file in the standard schema (`evaluate.samples`), and a
file of samples from any source is scored by running them (`evaluate.sandbox`). Promises: an interrupted scoring
resumes; the results file, next to the samples, keeps their order and adds `passed` and `result`; pass@k is the unbiased
estimate of Chen et al. 2021; scores name the weights that the samples are from.
"""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from tqdm import tqdm

from clippy_train.config import EvaluateConfig
from clippy_train.errors import ConfigError, DataError
from clippy_train.evaluate.cgroups import divisible_group
from clippy_train.evaluate.inside import PASSED, interpreter
from clippy_train.evaluate.interpreters import as_python, runnable_languages
from clippy_train.evaluate.samples import alone, at_temperature, complete_lines, generate_samples, read_settings
from clippy_train.evaluate.sandbox import Limits, isolation, run_checked
from clippy_train.files import atomic_write
from clippy_train.shards.problems import Problem, read_lines, read_problems

RESULTS = "_results.jsonl"  # appended to the name of the samples file, as in OpenAI's harness
UNFINISHED = ".unfinished"  # appended to that of the results, until all are there
PROTOCOL = ("temperature", "top_p", "max_new_tokens", "stop", "seed")  # of the settings, what scores depend on


@dataclass(frozen=True)
class Scores:
    """What a scoring found.

    Attributes:
        pass_at: pass@k by name; with several temperatures, that of the best one.
        about: what it belongs to: `models` (weights by name) and `samples` (how they were made).
        by_temperature: pass@k of each temperature, if there are several.
    """

    pass_at: dict[str, float]
    about: dict[str, Any]
    by_temperature: dict[float, dict[str, float]] = field(default_factory=dict)


def humaneval(config: EvaluateConfig) -> Scores | None:
    """Generate the missing samples if a model is given, and score them if execution is allowed (otherwise None).

    Raises:
        ConfigError: a file is missing, its samples were generated with other settings, or the sandbox has gaps.
        DataError: a file has the wrong format, or the samples do not match the problems.
        SandboxFault: the machine allows no verdict.
    """
    problems = scorable_problems(str(config.problems))
    runs = {temperature: at_temperature(config, temperature) for temperature in config.temperature}
    for each in runs.values() if config.model else ():
        generate_samples(each, problems, Path(str(each.samples)))
    if not config.allow_code_execution:
        print("not scored: scoring runs the samples and requires allow_code_execution=true")
        return None
    scores = {temperature: score_samples(each, problems, Path(str(each.samples))) for temperature, each in runs.items()}
    return best_scores(scores)


def best_scores(scores: dict[float, Scores]) -> Scores:
    """For each k, the score of the temperature that is best for it, as in Chen et al. 2021.

    Raises:
        DataError: the samples are of different weights.
    """
    if len(scores) == 1:
        return next(iter(scores.values()))
    if len({json.dumps(each.about["models"], sort_keys=True) for each in scores.values()}) > 1:
        raise DataError("samples: those of the temperatures are of different weights")
    by_temperature = {temperature: each.pass_at for temperature, each in scores.items()}
    names = dict.fromkeys(name for each in by_temperature.values() for name in each)
    best = {name: max(scores, key=lambda each: by_temperature[each].get(name, -1.0)) for name in names}
    first = next(iter(scores.values()))
    samples = {**first.about["samples"], "temperature": list(scores), "best_temperature": best}
    return Scores(
        {name: by_temperature[temperature][name] for name, temperature in best.items()},
        {**first.about, "samples": samples},
        by_temperature,
    )


def scorable_problems(name: str) -> dict[str | int, Problem]:
    """The problems by task id.

    Raises:
        ConfigError, DataError: as `read_problems`; or a problem has no checks that can be run here.
    """
    problems, runnable = read_problems(name), runnable_languages()
    for number, problem in enumerate(problems, 1):
        lacking = [field for field in ("test", "entry_point") if not getattr(problem, field)]
        if lacking or problem.language not in runnable:
            languages = ", ".join(runnable)
            why = f"lacks {', '.join(lacking)}" if lacking else f"is {problem.language}; here {languages} can be run"
            raise DataError(f"problems={name}: problem {number} {why}")
    found = {problem.task_id: problem for problem in problems}
    if len(found) < len(problems):
        ((task, times),) = Counter(problem.task_id for problem in problems).most_common(1)
        raise DataError(
            f"problems={name}: {times} problems have the id {task!r}; samples could be of any: split the file"
        )
    return found


def score_samples(config: EvaluateConfig, problems: dict[str | int, Problem], path: Path) -> Scores:
    """Run every sample, write the results next to the samples file, and estimate pass@k."""
    if not path.is_file():
        raise ConfigError(f"samples={path}: no such file")
    results = path.with_name(path.name + RESULTS)
    with alone(path):
        samples = read_lines(path, "samples")
        check_samples(samples, problems, path)
        require_isolation(config)
        about = provenance(samples, problems, path)
        outcomes = run_samples(config, problems, samples, results)
    print(f"{results}: {outcomes.count(PASSED)} of {len(outcomes)} samples passed")
    print(describe_samples(about["samples"]))
    found = dict(estimate_pass_at_k(samples, outcomes, config.ks))
    skipped = [f"pass@{k}" for k in config.ks if f"pass@{k}" not in found]
    if skipped:
        print(f"not estimated, since some problem has fewer samples: {', '.join(skipped)}")
    return Scores(found, about)


def check_samples(samples: list[dict[str, Any]], problems: dict[str | int, Problem], path: Path) -> None:
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
    sums = "sampled (no cgroup of its own)" if divisible_group() is None else "limited by the kernel"
    print(f"sandbox: {gaps or 'no network, no other processes, a file system of its own'}; "
          f"memory of several processes: {sums}")  # fmt: skip


def provenance(samples: list[dict[str, Any]], problems: dict[str | int, Problem], path: Path) -> dict[str, Any]:
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
    config: EvaluateConfig, problems: dict[str | int, Problem], samples: list[dict[str, Any]], results: Path
) -> list[str]:
    """Return the outcome of each sample, and write the results file.

    Until the last one, results are in an unfinished file that begins with what they depend on. A later call with the
    same problems and limits continues it.
    """
    limits = Limits(config.timeout, config.memory_mb << 20)
    scored_with = {"problems": problems_hash(problems), **asdict(limits), "interpreter": interpreter()}
    unfinished = results.with_name(results.name + UNFINISHED)
    outcomes = finished_outcomes(unfinished, scored_with, samples)
    workers = config.workers or len(os.sched_getaffinity(0))
    with unfinished.open("a") as file, ThreadPoolExecutor(workers) as pool:
        judged = pool.map(lambda sample: judge(sample, problems, limits), samples[len(outcomes) :])
        rest = zip(samples[len(outcomes) :], judged, strict=True)
        bar = tqdm(rest, "scoring", len(samples), initial=len(outcomes), unit=" samples", leave=False, disable=None)
        try:
            for sample, outcome in bar:
                file.write(result_line(sample, outcome))
                file.flush()
                outcomes.append(outcome)
        finally:
            pool.shutdown(cancel_futures=True)  # do not run the others if the disk is full
    with atomic_write(results) as file:
        file.writelines(map(result_line, samples, outcomes))
    unfinished.unlink()
    return outcomes


def judge(sample: dict[str, Any], problems: dict[str | int, Problem], limits: Limits) -> str:
    """Run a sample: a whole program (`solution`), or what continues its problem's prompt (`completion`)."""
    problem = problems[sample["task_id"]]
    if "solution" in sample:
        program = sample["solution"]
    else:
        program = problem.prompt + sample["completion"] + (problem.suffix or "")
    return run_checked(*as_python(problem, program), limits)


def result_line(sample: dict[str, Any], outcome: str) -> str:
    return json.dumps({**sample, "passed": outcome == PASSED, "result": outcome}) + "\n"


def finished_outcomes(unfinished: Path, scored_with: dict[str, Any], samples: list[dict[str, Any]]) -> list[str]:
    """Return the outcomes that an interrupted scoring has left for these samples, and drop the rest of its file."""
    head, *lines = complete_lines(unfinished) or [""]
    outcomes: list[str] = []
    if head == json.dumps(scored_with) + "\n":
        for sample, line in zip(samples, lines, strict=False):
            outcome = outcome_in(line)
            if line != result_line(sample, outcome):
                break
            outcomes.append(outcome)
    with atomic_write(unfinished) as file:
        file.write(json.dumps(scored_with) + "\n")
        file.writelines(lines[: len(outcomes)])
    return outcomes


def outcome_in(line: str) -> str:
    """The outcome that a line of results says; empty if it is damaged."""
    try:
        return str(json.loads(line)["result"])
    except (ValueError, TypeError, KeyError):
        return ""


def problems_hash(problems: dict[str | int, Problem]) -> str:
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
