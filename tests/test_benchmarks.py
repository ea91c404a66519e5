"""Documents that hold a benchmark's problem, against copies of it that differ where copies do."""

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.formats import APPS

from clippy_train.config import FilterConfig, TrainConfig
from clippy_train.errors import ConfigError
from clippy_train.run.identity import data_identity
from clippy_train.shards.benchmarks import held_problem
from clippy_train.shards.filters import broken_rule, require_rules

PROMPT = '''from typing import List


def longest_run(values: List[int], limit: int) -> int:
    """Return how many of the values in a row stay below the limit, at most.
    An empty list has a run of length zero.
    >>> longest_run([1, 2, 9, 3], 5)
    2
    """
'''
SOLUTION = """    best, current = 0, 0
    for value in values:
        if value < limit:
            current += 1
            best = max(best, current)
        else:
            current = 0
    return best
"""
RENAMED = {"longest_run": "f", "values": "xs", "value": "x", "limit": "k", "best": "b_1", "current": "n"}
ORDINARY = "import json\n\n\ndef load(path):\n    with open(path) as file:\n        return json.load(file)\n"


@pytest.fixture
def problems(tmp_path: Path) -> str:
    path = tmp_path / "problems.jsonl.gz"
    row = {"task_id": "Own/0", "prompt": PROMPT, "canonical_solution": SOLUTION, "test": "", "entry_point": "f"}
    with gzip.open(path, "wt") as file:
        file.write(json.dumps(row))
    return str(path)


def renamed(text: str) -> str:
    return re.sub(r"\w+", lambda word: RENAMED.get(word[0], word[0]), text)


def without_docstring(program: str) -> str:
    return re.sub(r'\s*"""[\s\S]*?"""', "", program)


COPIES: dict[str, Callable[[str], str]] = {
    "whole": lambda program: program,
    "description": lambda program: f"# TODO\n# {' '.join(program.partition('>>>')[0].split())}",
    "solution": without_docstring,
    "renamed": lambda program: renamed(without_docstring(program)),
    "white space": lambda program: without_docstring(program).replace("    ", "\t").replace("\n", "\r\n\r\n"),
    "comments": lambda program: without_docstring(program).replace("\n", "  # as said\n"),
    "another docstring": lambda program: re.sub(r'"""[\s\S]*?"""', '"""Mine."""', renamed(program)),
    "one line changed": lambda program: renamed(without_docstring(program)).replace("0, 0", "int(), int()"),
}


@pytest.mark.parametrize("copy", COPIES)
def test_a_planted_copy_is_found(copy: str, problems: str) -> None:
    document = f"{ORDINARY}\n\n{COPIES[copy](PROMPT + SOLUTION)}\n\n{ORDINARY}"
    assert held_problem(document, [problems]) == "Own/0"
    assert broken_rule({}, document, FilterConfig(decontaminate=[problems])) == "benchmark"


@pytest.mark.parametrize("text", ["", ORDINARY, Path(__file__).with_name("test_filters.py").read_text()], ids=len)
def test_other_code_is_kept(text: str, problems: str) -> None:
    assert held_problem(text, [problems]) is None


def test_a_problem_too_short_to_be_told_from_other_code_is_not_searched_for(tmp_path: Path) -> None:
    path = tmp_path / "apps.jsonl"
    path.write_text(json.dumps(APPS))
    assert held_problem(json.loads(APPS["solutions"])[0], [str(path)]) is None
    path = tmp_path / "long.jsonl"
    question = "Read a number from the standard input and print the double of it on a line."
    path.write_text(json.dumps({**APPS, "question": question}))
    assert held_problem(f"/* {question.upper()} */", [str(path)]) == "9"


@pytest.mark.slow
def test_the_identity_of_the_data_includes_the_problems_but_not_their_place(
    problems: str, tmp_path: Path, train_config: Callable[..., TrainConfig]
) -> None:
    def identity(path: str | Path) -> dict[str, Any]:
        return data_identity(train_config(f"data.filter.decontaminate=[{path}]"), [])

    moved = tmp_path / "elsewhere" / Path(problems).name
    moved.parent.mkdir()
    moved.write_bytes(Path(problems).read_bytes())
    before = identity(problems)
    assert before == identity(moved)
    assert str(tmp_path) not in str(before)
    with gzip.open(moved, "at") as file:
        file.write("\n" + json.dumps(APPS))
    assert before != identity(moved)


@pytest.mark.parametrize("key", ["decontaminate", "opt_out"])
def test_a_file_that_is_missing_is_named(key: str, tmp_path: Path) -> None:
    missing = str(tmp_path / "none.jsonl")
    rules = FilterConfig(decontaminate=[missing]) if key == "decontaminate" else FilterConfig(opt_out=missing)
    with pytest.raises(ConfigError, match=rf"filter\.{key}=.*none\.jsonl cannot be read: No such file"):
        require_rules(rules)
