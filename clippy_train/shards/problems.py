"""Programming problems with checks, in the file formats of others: HumanEval, MBPP, MultiPL-E, APPS and their
descendants.

A row is recognised by its fields. Whatever its format, a program is the prompt, what continues it and a suffix if there
is one, and a reference solution is such a continuation, so one problem can be solved, scored, or read. Needs no torch.
"""

import gzip
import json
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, TypeVar, cast

from clippy_train.errors import ConfigError, DataError

T = TypeVar("T")
Row = dict[str, Any]
FORMATS = (
    "HumanEval: task_id, prompt, entry_point, test, and suffix to fill a gap; MBPP: task_id, text, code, test_list; "
    "MultiPL-E: name, prompt, tests, stop_tokens; APPS: problem_id, question, solutions"
)
PYTHON = "Python"
# What others call a language, in `language` or in the first part of `task_id`, with linguist's name for it.
LANGUAGES = {
    "py": PYTHON, "python": PYTHON, "js": "JavaScript", "javascript": "JavaScript", "ts": "TypeScript", "java": "Java",
    "cpp": "C++", "cs": "C#", "go": "Go", "rs": "Rust", "rust": "Rust", "rb": "Ruby", "php": "PHP", "lua": "Lua",
    "pl": "Perl", "r": "R", "sh": "Shell", "swift": "Swift", "scala": "Scala", "jl": "Julia",
}  # fmt: skip
HUMANEVAL_STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # from the paper that introduced HumanEval
MBPP_STOP = ("\nclass", "\nassert", '\n"""', "\nprint", "\nif")  # a program may define several functions


@dataclass(frozen=True)
class Problem:
    """A problem.

    Attributes:
        test: Python that defines `check(candidate)`, which raises if the function `entry_point` is wrong; in another
            language, a script to run after the program; empty if there is none.
        reference: a right continuation of the prompt; empty if the file has none.
        stop: what ends a continuation.
        suffix: what follows a continuation, if that is to fill a gap.
    """

    task_id: str | int
    prompt: str
    test: str
    entry_point: str
    reference: str
    language: str
    stop: tuple[str, ...]
    suffix: str | None = None

    def __post_init__(self) -> None:
        texts = {name: getattr(self, name) for name in ("prompt", "test", "entry_point", "reference", "language")}
        _require_texts(
            {**texts, "suffix": self.suffix or "", **{f"stop[{n}]": each for n, each in enumerate(self.stop)}}
        )
        if not isinstance(self.task_id, str | int):
            raise TypeError(f"its id {self.task_id!r} is neither a string nor a number")


@dataclass(frozen=True)
class Exercise:
    """A prompt, and all solutions that continue it."""

    name: str
    prompt: str
    solutions: list[str]
    language: str

    def __post_init__(self) -> None:
        _require_texts({f"solution {number}": each for number, each in enumerate(self.solutions, 1)})


def _require_texts(named: dict[str, Any]) -> None:
    for name, value in named.items():
        if not isinstance(value, str):
            raise TypeError(f"its {name} is not a string: {value!r:.50}")


def read_problems(name: str, key: str = "problems") -> list[Problem]:
    """Read problems from a file or a dataset on the hub.

    Args:
        key: what names it, for the message.

    Raises:
        ConfigError: neither exists.
        DataError: there are no problems, or one has another format.
    """
    return _read(name, key, "test", _problem)


def read_exercises(name: str, key: str = "problems") -> list[Exercise]:
    """Read problems from a file, or from the training split of a dataset on the hub, to learn from.

    Raises:
        ConfigError, DataError: as `read_problems`.
    """
    return _read(name, key, "train", _exercise)


def read_references(name: str, key: str = "problems") -> list[Problem]:
    """`read_problems` of those that have a reference solution.

    Raises:
        DataError: none has one.
    """
    found = [each for each in read_problems(name, key) if each.reference]
    if not found:
        raise DataError(f"{key}={name} has no reference solutions (canonical_solution, or MBPP's code)")
    return found


def _read(name: str, key: str, split: str, convert: Callable[[Row], T]) -> list[T]:
    rows = list(_rows(name, key, split))
    if not rows:
        raise DataError(f"{key}={name} has no problems")
    found = []
    for number, row in enumerate(rows, 1):
        try:
            if not isinstance(row, dict):
                raise TypeError("it is not an object with fields")
            found.append(convert(row))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            why = f"lacks {error}" if isinstance(error, KeyError) else f"cannot be used: {error}"
            raise DataError(f"{key}={name}: problem {number} {why} (formats: {FORMATS})") from error
    return found


def _rows(name: str, key: str, split: str) -> Iterator[Row]:
    path = Path(name)
    if path.is_file():
        yield from read_lines(path, key)
    elif name.endswith((".jsonl", ".gz")):
        raise ConfigError(f"{key}={name}: no such file")
    else:
        import datasets

        try:
            yield from datasets.load_dataset(name, split=split)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise ConfigError(f"{key}={name} is neither a file nor a dataset: {error}") from error


def read_lines(path: Path, key: str) -> list[Row]:
    """Read a file with one JSON object per line, optionally gzipped."""
    try:
        with open_text(path, "r") as file:
            return [json.loads(line) for line in file if line.strip()]
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{key}={path} cannot be read: {error}") from error
    except ValueError as error:
        raise DataError(f"{key}={path} is not a JSON lines file: {error}") from error


def open_text(path: Path, mode: str) -> TextIO:
    """Open a file, compressed if its name ends in .gz, to read ("r") or to append ("a"); UTF-8, whatever the locale."""
    encoding = "utf-8-sig" if mode == "r" else "utf-8"  # some editors put a mark at its begin
    if path.suffix == ".gz":
        return cast("TextIO", gzip.open(path, f"{mode}t", encoding=encoding))
    return cast("TextIO", path.open(mode, encoding=encoding))


# Formats


def _problem(row: Row) -> Problem:
    if "tests" in row:
        return _multipl_e(row)
    if "question" in row:
        return _apps(row)
    if "base_input" in row:
        return _evalplus(row)
    return _mbpp(row) if "test_list" in row else _humaneval(row)


def _humaneval(row: Row) -> Problem:
    """HumanEval, and HumanEval+ as a dataset: a function to complete; HumanEval-Infilling: one with a gap."""
    suffix = row.get("suffix")
    return Problem(
        task_id=row["task_id"],
        prompt=row["prompt"],
        test=row.get("test") or "",
        entry_point=row.get("entry_point") or "",
        reference=row.get("canonical_solution") or "",
        language=_language(row),
        stop=HUMANEVAL_STOP if suffix is None else (),
        suffix=suffix,
    )


def _evalplus(row: Row) -> Problem:
    """EvalPlus' own file of HumanEval+: inputs, on which a function must agree with the reference solution."""
    if not str(row["task_id"]).startswith("HumanEval/"):
        raise ValueError("test: the inputs of MBPP+ are not what JSON says; use the dataset evalplus/mbppplus")
    reference = row["prompt"] + row["canonical_solution"]
    inputs = json.dumps([*row["base_input"], *row["plus_input"]])
    polynomial = row["task_id"] == FIND_ZERO
    test = AGREES.format(
        reference=reference, entry_point=row["entry_point"], inputs=inputs, atol=row["atol"], polynomial=polynomial
    )
    return _humaneval({**row, "test": test})


FIND_ZERO = "HumanEval/32"  # any root of the polynomial is right
AGREES = """\
import copy, json, math

def agree(found, expected, atol):
    if isinstance(expected, float) or atol and isinstance(expected, int):
        return math.isclose(found, expected, rel_tol=1e-7, abs_tol=atol or 1e-6)
    if isinstance(expected, (list, tuple)) and type(found) is type(expected) and len(found) == len(expected):
        return all(agree(*pair, atol) for pair in zip(found, expected))
    return found == expected

def check(candidate):
    namespace = {{}}
    exec({reference!r}, namespace)
    reference = namespace[{entry_point!r}]
    for arguments in json.loads({inputs!r}):
        found = candidate(*copy.deepcopy(arguments))
        if {polynomial!r}:
            value = sum(each * found**power for power, each in enumerate(arguments[0]))
            assert abs(value) <= {atol!r}, arguments
        else:
            assert agree(found, reference(*copy.deepcopy(arguments)), {atol!r}), arguments
"""


def _mbpp(row: Row) -> Problem:
    """MBPP, and MBPP+ as a dataset: a description, which becomes a docstring with the asserts, and a whole program."""
    described = row["text"] if "text" in row else row["prompt"]
    setup = row.get("test_setup_code") or "\n".join(row.get("test_imports") or [])
    asserts = "\n".join(_strings(row, "test_list"))
    return Problem(
        task_id=row["task_id"],
        prompt=_docstring(f"{described.strip()}\n{asserts}"),
        test=_script(f"{setup}\n{row.get('test') or asserts}"),
        entry_point="check",
        reference=row["code"].replace("\r\n", "\n"),
        language=PYTHON,
        stop=MBPP_STOP,
    )


def _docstring(text: str) -> str:
    """A docstring that shows a text; it must compile, because a program begins with it."""
    literal = '"""\n{}\n"""\n'.format(text.replace('"""', "'''"))
    try:
        with warnings.catch_warnings(action="ignore"):
            compile(literal, "<prompt>", "exec")
    except SyntaxError:  # a backslash in the text begins an escape that cannot be read
        return f"r{literal}"
    return literal


def _multipl_e(row: Row) -> Problem:
    """MultiPL-E: a function to complete, and a script that checks it."""
    language = _language(row)
    return Problem(
        task_id=row["name"],
        prompt=row["prompt"],
        test=_script(row["tests"]) if language == PYTHON else row["tests"],
        entry_point="check",
        reference=row.get("canonical_solution") or "",
        language=language,
        stop=tuple(_strings(row, "stop_tokens")),
    )


def _apps(row: Row) -> Problem:
    """APPS: a description, in the prompt that the original trained on, and whole programs; their tests are not code."""
    solutions = json.loads(row["solutions"] or "[]")
    starter = row.get("starter_code") or ""
    call = "\nUse Call-Based format\n" if starter else "\nUse Standard Input format\n"
    return Problem(
        task_id=row["problem_id"],
        prompt=f"\nQUESTION:\n{row['question']}\n{starter}\n{call}\nANSWER:\n",
        test="",
        entry_point="",
        reference=solutions[0] if solutions else "",
        language=PYTHON,
        stop=MBPP_STOP,
    )


def _exercise(row: Row) -> Exercise:
    """A problem with all its solutions."""
    problem = _problem(row)
    if "problem_id" not in row:
        return Exercise(str(problem.task_id), problem.prompt, [problem.reference], problem.language)
    return Exercise(f"APPS/{problem.task_id}", problem.prompt, json.loads(row["solutions"] or "[]"), problem.language)


def _strings(row: Row, name: str) -> list[str]:
    """A field that is a list of strings: of a single string, each character would be one."""
    found: list[str] = row[name]
    if not isinstance(found, list):
        raise TypeError(f"its {name} is not a list: {found!r:.50}")
    return found


def _script(checks: str) -> str:
    """The test of checks that run as they are read: its `check`, also the entry point, has nothing left to do."""
    return f"{checks}\n\ndef check(candidate):\n    pass\n"


def _language(row: Row) -> str:
    """What the row says, else what its id begins with, as in HumanEval-X; else Python."""
    if "language" in row:
        return LANGUAGES.get(row["language"].lower(), str(row["language"]))
    return LANGUAGES.get(str(row.get("task_id")).partition("/")[0].lower(), PYTHON)
