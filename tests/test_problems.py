"""Problems are read from the formats of others, told by their fields, and mean the same in each."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from support.formats import APPS, HUMANEVAL, HUMANEVAL_PLUS, INFILLING, MBPP, MBPP_PLUS, MULTIPL_E, RIGHT, WRONG

from clippy_train.errors import ConfigError, DataError
from clippy_train.shards.problems import HUMANEVAL_STOP, MBPP_STOP, Problem, read_problems, read_references


def read(tmp_path: Path, *rows: dict[str, Any]) -> list[Problem]:
    path = tmp_path / "problems.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return read_problems(str(path))


def judged(problem: Problem, solution: str) -> bool:
    """Whether a solution passes, by the meaning of a problem's fields; without a sandbox, since we wrote it."""
    namespace: dict[str, Any] = {}
    exec(problem.prompt + solution, namespace)
    try:
        exec(problem.test, namespace)
        namespace["check"](namespace[problem.entry_point])
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize(
    ("row", "before", "stop"),
    [
        (HUMANEVAL, "", HUMANEVAL_STOP),
        (HUMANEVAL_PLUS, "", HUMANEVAL_STOP),
        (MBPP, "def double(x):\n", MBPP_STOP),
        (MULTIPL_E, "", ("\ndef", "\n#")),
        (MBPP_PLUS, "def double(x):\n", MBPP_STOP),
    ],
    ids=["HumanEval", "HumanEval+", "MBPP", "MultiPL-E", "MBPP+"],
)  # fmt: skip
def test_every_format_tells_right_solutions_from_wrong_ones(
    row: dict[str, Any], before: str, stop: tuple[str, ...], tmp_path: Path
) -> None:
    (problem,) = read(tmp_path, row)
    assert judged(problem, before + RIGHT)
    assert not judged(problem, before + WRONG)
    assert (problem.language, problem.stop) == ("Python", stop)
    if problem.reference:
        assert judged(problem, problem.reference)


@pytest.mark.parametrize(
    ("body", "atol", "passes"),
    [
        ("    return [x / 3, 1]\n", 0, True),
        ("    return [x / 3 + 1e-8, 1]\n", 0, True),
        ("    return [x / 3 + 1e-3, 1]\n", 0, False),
        ("    return [x / 3 + 1e-3, 1]\n", 1e-2, True),
        ("    return (x / 3, 1)\n", 0, False),
        ("    return [x / 3, 2]\n", 0, False),
        ("    return [x / 3]\n", 0, False),
        ("    x.append(1)\n", 0, False),
        ("    return None\n", 0, False),
    ],
)
def test_answers_agree_with_those_of_the_reference(body: str, atol: float, passes: bool, tmp_path: Path) -> None:
    row = {**HUMANEVAL_PLUS, "canonical_solution": "    return [x / 3, 1]\n", "plus_input": [[7]], "atol": atol}
    (problem,) = read(tmp_path, row)
    try:
        assert judged(problem, body) is passes
    except (TypeError, AttributeError):
        assert not passes


def test_any_root_is_right_where_several_are(tmp_path: Path) -> None:
    row = {
        **HUMANEVAL_PLUS, "task_id": "HumanEval/32", "prompt": "def find_zero(xs):\n", "entry_point": "find_zero",
        "canonical_solution": "    return 1.0\n", "base_input": [[[-1, 0, 1]]], "plus_input": [], "atol": 1e-4,
    }  # fmt: skip
    (problem,) = read(tmp_path, row)
    assert judged(problem, "    return -1.0\n")
    assert not judged(problem, "    return -1.1\n")


def test_a_gap_is_filled_between_prompt_and_suffix(tmp_path: Path) -> None:
    problem, whole = read(tmp_path, INFILLING, HUMANEVAL)
    assert (problem.prompt, problem.suffix, problem.stop) == ("def double(x):\n", "    return doubled\n", ())
    assert judged(problem, f"{problem.reference}{problem.suffix}")
    assert whole.suffix is None


def test_mbpp_is_prompted_with_its_description_and_asserts(tmp_path: Path) -> None:
    (problem,) = read(tmp_path, MBPP)
    asserts = "assert double(two) == 4\nassert double(3) == 6"
    assert problem.prompt == f'"""\nWrite a function to double a number.\n{asserts}\n"""\n'
    assert "\r" not in problem.reference


@pytest.mark.parametrize("text", ['Say """hi""" twice', r"Find \N and \x", "ends with \\", 'ends with "'])
def test_any_description_makes_a_prompt_that_compiles(text: str, tmp_path: Path) -> None:
    (problem,) = read(tmp_path, {**MBPP, "text": text})
    compile(problem.prompt + problem.reference, "<sample>", "exec")
    assert text.replace('"""', "'''") in problem.prompt


def test_apps_is_prompted_with_its_description_and_has_no_checks(tmp_path: Path) -> None:
    problem, unsolved = read(tmp_path, APPS, {**APPS, "solutions": ""})
    asked = "Read a number and print its double."
    assert problem.prompt == f"\nQUESTION:\n{asked}\n\n\nUse Standard Input format\n\nANSWER:\n"
    assert (problem.reference, problem.test, unsolved.reference) == ("print(2 * int(input()))\n", "", "")


def test_the_language_is_stated_or_begins_the_id(tmp_path: Path) -> None:
    rows = [
        {**HUMANEVAL, "task_id": "CPP/0"},
        {**MULTIPL_E, "name": "a", "language": "rs"},
        {**MULTIPL_E, "name": "b", "language": "Zig"},
        HUMANEVAL,
    ]
    assert [each.language for each in read(tmp_path, *rows)] == ["C++", "Rust", "Zig", "Python"]


@pytest.mark.parametrize("lost", ["task_id", "prompt", "name", "test_list"])
def test_a_problem_of_no_format_is_named_with_what_it_lacks(lost: str, tmp_path: Path) -> None:
    whole = next(row for row in (HUMANEVAL, MULTIPL_E, MBPP) if lost in row)
    with pytest.raises(DataError, match=r"problem 2 lacks .* \(formats: HumanEval"):
        read(tmp_path, whole, {name: value for name, value in whole.items() if name != lost})


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ([HUMANEVAL], "it is not an object"),
        (3, "it is not an object"),
        ({**HUMANEVAL, "prompt": None}, "its prompt is not a string: None"),
        ({**HUMANEVAL, "test": ["assert True"]}, "its test is not a string"),
        ({**HUMANEVAL, "task_id": ["a"]}, r"its id \['a'\] is neither"),
        ({**HUMANEVAL, "suffix": 3}, "its suffix is not a string"),
        ({**MBPP, "test_list": "assert True"}, "its test_list is not a list"),
        ({**MULTIPL_E, "stop_tokens": "\ndef"}, "its stop_tokens is not a list"),
        ({**MULTIPL_E, "stop_tokens": [1]}, r"its stop\[0\] is not a string"),
        ({**APPS, "solutions": "[1]"}, "its reference is not a string"),
    ],
)
def test_a_field_of_another_kind_is_named(row: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"problem 2 cannot be used: {why}"):
        read(tmp_path, HUMANEVAL, row)


def test_fields_that_may_be_missing_may_be_null(tmp_path: Path) -> None:
    (problem,) = read(tmp_path, {**HUMANEVAL, "canonical_solution": None, "suffix": None})
    assert (problem.reference, problem.suffix) == ("", None)


def test_damaged_compression_is_named_and_a_byte_order_mark_is_not_content(tmp_path: Path) -> None:
    marked, damaged = tmp_path / "marked.jsonl", tmp_path / "damaged.jsonl.gz"
    marked.write_bytes(b"\xef\xbb\xbf" + json.dumps(HUMANEVAL).encode())
    assert len(read_problems(str(marked))) == 1
    whole = gzip.compress(json.dumps(HUMANEVAL).encode() * 9)
    damaged.write_bytes(whole[:12] + b"\xff" * 8 + whole[20:])
    with pytest.raises(ConfigError, match=r"damaged.jsonl.gz cannot be read: .*decompressing"):
        read_problems(str(damaged))


def test_files_without_problems_or_references_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read_problems(str(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="has no problems"):
        read(tmp_path)
    read(tmp_path, MULTIPL_E)
    with pytest.raises(DataError, match=r"val_problems=.* has no reference solutions"):
        read_references(str(tmp_path / "problems.jsonl.gz"), "data.val_problems")
