"""HumanEval: samples are generated, resumed and scored, and canned solutions get their exact scores."""

import gzip
import json
import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import base_folder, small_bpe

from clippy_train.cli import main
from clippy_train.evaluate.humaneval import pass_at_k

PROBLEMS = [
    {
        "task_id": f"Test/{number}",
        "prompt": f"def add_{number}(x):\n",
        "entry_point": f"add_{number}",
        "canonical_solution": f"    return x + {number}\n",
        "test": f"def check(candidate):\n    assert candidate(2) == {2 + number}\n",
    }
    for number in range(3)
]
WRONG = "    return None\n"


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    path = tmp_path / "problems.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(each) + "\n" for each in PROBLEMS).encode()))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("model"), small_bpe(), seed=2)  # its completions contain letters


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def canned(right: list[int], n: int) -> list[dict[str, Any]]:
    """`n` samples of each problem, interleaved, of which `right` are correct."""
    return [
        {"task_id": each["task_id"], "completion": each["canonical_solution"] if turn < count else WRONG, "mine": turn}
        for turn in range(n)
        for each, count in zip(PROBLEMS, right, strict=True)
    ]


def evaluate(problems: Path, samples: Path, *arguments: str, code: int = 0) -> None:
    assert main(["evaluate", "task=humaneval", f"problems={problems}", f"samples={samples}", *arguments]) == code


@pytest.mark.processes
def test_canned_solutions_get_their_exact_scores(problems: Path, tmp_path: Path) -> None:
    n, right = 5, [5, 2, 0]
    samples = write(tmp_path / "samples.jsonl", canned(right, n))
    evaluate(problems, samples, "allow_code_execution=true", "ks=[1,3,10]", f"out={tmp_path / 'out.json'}")
    found = json.loads((tmp_path / "out.json").read_text())
    assert found.pop("about")["task"] == "humaneval"
    # Chen et al. 2021: the product form, problem by problem
    expected = {
        f"pass@{k}": np.mean([1 - np.prod(1 - k / np.arange(n - c + 1, n + 1)) if n - c >= k else 1 for c in right])
        for k in (1, 3)
    }
    assert found == pytest.approx(expected)
    results = [json.loads(line) for line in (tmp_path / "samples.jsonl_results.jsonl").read_text().splitlines()]
    assert [{key: row[key] for key in ("task_id", "completion", "mine")} for row in results] == canned(right, n)
    assert [row["passed"] for row in results] == [row["completion"] != WRONG for row in canned(right, n)]
    assert {row["result"] for row in results} == {"passed", "failed: AssertionError:"}


@settings(max_examples=60)
@given(n=st.integers(1, 9), data=st.data())
def test_the_estimate_is_the_share_of_draws_with_a_correct_sample(n: int, data: st.DataObject) -> None:
    right, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    draws = list(combinations([True] * right + [False] * (n - right), k))
    assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_an_interrupted_generation_ends_with_the_same_file(model: Path, problems: Path, tmp_path: Path) -> None:
    settings = [f"model={model}", "n=3", "temperature=1", "max_new_tokens=6", "batch_size=2"]
    full, cut = tmp_path / "full.jsonl", tmp_path / "cut.jsonl"
    evaluate(problems, full, *settings)
    rows = [json.loads(line) for line in full.read_text().splitlines()]
    assert [row["task_id"] for row in rows] == [each["task_id"] for each in PROBLEMS] * 3
    assert {frozenset(row) for row in rows} == {frozenset(["task_id", "completion"])}
    assert rows[0]["completion"] != rows[6]["completion"]  # the same place in another batch
    evaluate(problems, cut, *settings)
    assert cut.read_bytes() == full.read_bytes()
    for length in (0, 5, full.stat().st_size // 2, full.stat().st_size - 1):
        cut.write_bytes(full.read_bytes()[:length])
        evaluate(problems, cut, *settings)
        assert cut.read_bytes() == full.read_bytes()
    before = cut.stat().st_mtime_ns
    evaluate(problems, cut, *settings)
    assert cut.stat().st_mtime_ns == before  # nothing was missing


def test_samples_of_other_settings_are_not_mixed(
    model: Path, problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = tmp_path / "samples.jsonl"
    evaluate(problems, samples, f"model={model}", "max_new_tokens=2")
    content = samples.read_bytes()
    evaluate(problems, samples, f"model={model}", "max_new_tokens=3", code=2)
    assert "max_new_tokens was 2, is 3" in capsys.readouterr().err
    write(tmp_path / "theirs.jsonl", canned([1, 1, 1], 1))
    evaluate(problems, tmp_path / "theirs.jsonl", f"model={model}", code=2)
    assert samples.read_bytes() == content


def test_nothing_runs_unless_it_is_allowed(
    model: Path, problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    witness = tmp_path / "ran"
    rows = [{**row, "completion": f"    open({str(witness)!r}, 'w')\n"} for row in canned([1, 1, 1], 1)]
    samples = write(tmp_path / "samples.jsonl", rows)
    evaluate(problems, samples, code=2)
    assert "allow_code_execution=true" in capsys.readouterr().err
    evaluate(problems, tmp_path / "new.jsonl", f"model={model}", "max_new_tokens=2", f"out={tmp_path / 'out.json'}")
    assert "not scored" in capsys.readouterr().out
    assert [path.name for path in tmp_path.glob("*results*")] == []
    assert not witness.exists()


def test_completions_end_at_the_stop_sequences(model: Path, problems: Path, tmp_path: Path) -> None:
    def completions(name: str, *settings: str) -> list[str]:
        evaluate(problems, tmp_path / name, f"model={model}", "max_new_tokens=30", "batch_size=3", *settings)
        return [json.loads(line)["completion"] for line in (tmp_path / name).read_text().splitlines()]

    free = completions("free.jsonl", "stop=[]")
    stop = re.findall("[A-Za-z]{2}", "\n".join(free))[0]
    cut = completions("cut.jsonl", f"stop=[{stop}]")
    assert cut == [text.split(stop)[0] for text in free]


@pytest.mark.parametrize(
    ("rows", "code", "expected"),
    [
        (canned([1, 1, 1], 1)[:2], 3, "['Test/2'] have no samples"),
        ([*canned([1, 1, 1], 1), {"task_id": "Test/9", "completion": ""}], 3, "['Test/9'] are not among them"),
        ([{"task_id": "Test/0"}], 3, "line 1 has no task_id"),
        ([{"task_id": "Test/0", "completion": None}], 3, "line 1 has no task_id"),
    ],
)
def test_samples_that_do_not_match_the_problems_are_refused(
    rows: list[dict[str, Any]],
    code: int,
    expected: str,
    problems: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    evaluate(problems, write(tmp_path / "samples.jsonl", rows), "allow_code_execution=true", code=code)
    assert expected in capsys.readouterr().err


def test_problems_must_be_a_file_in_the_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(tmp_path / "none.jsonl", tmp_path / "x", "allow_code_execution=true", code=2)
    assert "no such file" in capsys.readouterr().err
    other = write(tmp_path / "other.jsonl", [{"task_id": "a", "prompt": ""}])
    evaluate(other, tmp_path / "x", "allow_code_execution=true", code=3)
    assert "task_id, prompt, test, entry_point" in capsys.readouterr().err
    evaluate(write(tmp_path / "empty.jsonl", []), tmp_path / "x", "allow_code_execution=true", code=3)
    assert "has no problems" in capsys.readouterr().err
    short = tmp_path / "short.jsonl.gz"
    short.write_bytes(gzip.compress(other.read_bytes())[:-9])
    evaluate(short, tmp_path / "x", "allow_code_execution=true", code=2)
    assert f"problems={short} cannot be read" in capsys.readouterr().err
