"""HumanEval: samples are generated, resumed and scored, and canned solutions get their exact scores."""

import errno
import fcntl
import gzip
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import forks
from support.formats import INFILLING, MBPP, MBPP_PLUS, MULTIPL_E, RIGHT, WRONG
from support.models import base_folder, small_bpe
from support.runs import environment

from clippy_train.cli import main
from clippy_train.errors import ConfigError, DataError, SandboxFault
from clippy_train.evaluate import humaneval
from clippy_train.evaluate import samples as evaluated
from clippy_train.evaluate.humaneval import pass_at_k
from clippy_train.evaluate.inside import PASSED, interpreter
from clippy_train.evaluate.results import read_results, weights_hash, weights_version
from clippy_train.evaluate.samples import settings_file
from clippy_train.evaluate.sandbox import Isolation
from clippy_train.files import locked
from clippy_train.hf.sections import evaluation_section
from clippy_train.model.load import load_model_and_tokenizer
from clippy_train.model.sample import Gap, Sampling, complete_prompts
from clippy_train.shards.problems import read_problems

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
NOTHING = "    return None\n"
SCORE = ("allow_code_execution=true", "allow_weak_sandbox=true")


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
        {
            "task_id": each["task_id"],
            "completion": each["canonical_solution"] if turn < count else NOTHING,
            "mine": turn,
        }
        for turn in range(n)
        for each, count in zip(PROBLEMS, right, strict=True)
    ]


def lines(path: Path) -> list[dict[str, Any]]:
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
    return [json.loads(line) for line in text.splitlines()]


def evaluate(problems: Path, samples: Path, *arguments: str, code: int = 0) -> None:
    assert main(["evaluate", "task=humaneval", f"problems={problems}", f"samples={samples}", *arguments]) == code


@pytest.mark.processes
def test_canned_solutions_get_their_exact_scores(
    problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    n, right = 5, [5, 2, 0]
    samples = write(tmp_path / "samples.jsonl", canned(right, n))
    evaluate(problems, samples, *SCORE, "ks=[1,3,10]", f"out={tmp_path / 'out.json'}")
    assert "fewer samples: pass@10\n" in capsys.readouterr().out
    found = json.loads((tmp_path / "out.json").read_text())
    about = found.pop("about")
    assert about["task"] == "humaneval"
    assert about["models"] == {}
    assert about["samples"]["n"] == n
    assert about["samples"]["temperature"] is None  # not known of samples that are not ours
    # Chen et al. 2021: the product form, problem by problem
    expected = {
        f"pass@{k}": np.mean([1 - np.prod(1 - k / np.arange(n - c + 1, n + 1)) if n - c >= k else 1 for c in right])
        for k in (1, 3)
    }
    assert found == pytest.approx(expected)
    results = lines(tmp_path / "samples.jsonl_results.jsonl")
    assert [{key: row[key] for key in ("task_id", "completion", "mine")} for row in results] == canned(right, n)
    assert [row["passed"] for row in results] == [row["completion"] != NOTHING for row in canned(right, n)]
    assert {row["result"] for row in results} == {"passed", "failed: AssertionError:"}


@pytest.mark.processes
def test_a_gap_is_filled_and_runs_with_prompt_and_suffix(model: Path, tmp_path: Path, capsys: Any) -> None:
    extended, problems, samples = tmp_path / "extended", tmp_path / "p.jsonl", tmp_path / "s.jsonl"
    write(problems, [INFILLING])
    names = "fim_tokens=['<fim_prefix>','<fim_middle>','<fim_suffix>']"
    assert main(["extend", f"base={model}", f"out={extended}", names]) == 0
    evaluate(problems, samples, f"model={model}", "max_new_tokens=4", code=2)
    assert "no tokens for fill-in-the-middle" in capsys.readouterr().err
    assert not samples.exists()
    evaluate(problems, samples, f"model={extended}", "max_new_tokens=4")
    loaded, tokenizer = load_model_and_tokenizer(str(extended))
    gap = Gap(INFILLING["prompt"], INFILLING["suffix"])
    assert [row["completion"] for row in lines(samples)] == complete_prompts(loaded, tokenizer, [gap], Sampling(4))
    written = [INFILLING["canonical_solution"], "    doubled = x\n", RIGHT, "    if x:\n"]
    canned = [{"task_id": INFILLING["task_id"], "completion": each} for each in written]
    evaluate(problems, write(tmp_path / "canned.jsonl", canned), *SCORE)
    results = lines(tmp_path / "canned.jsonl_results.jsonl")
    assert [row["passed"] for row in results] == [True, False, True, False]


@pytest.mark.processes
@pytest.mark.skipif("CLIPPY_BENCHMARKS" not in os.environ, reason="CLIPPY_BENCHMARKS names no folder of benchmarks")
@pytest.mark.parametrize("name", ["HumanEval", "HumanEval-SingleLineInfilling", "HumanEval-RandomSpanInfillingLight"])
def test_published_reference_solutions_pass(name: str, tmp_path: Path) -> None:
    path = Path(os.environ["CLIPPY_BENCHMARKS"]) / f"{name}.jsonl.gz"
    some = [{"task_id": each.task_id, "completion": each.reference} for each in read_problems(str(path))[::40]]
    evaluate(path, write(tmp_path / "s.jsonl", some), *SCORE, "timeout=30")
    assert all(row["passed"] for row in lines(tmp_path / "s.jsonl_results.jsonl"))


@settings(max_examples=60)
@given(n=st.integers(1, 9), data=st.data())
def test_the_estimate_is_the_share_of_draws_with_a_correct_sample(n: int, data: st.DataObject) -> None:
    right, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    draws = list(combinations([True] * right + [False] * (n - right), k))
    assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.slow
def test_an_interrupted_generation_ends_with_the_same_file(model: Path, problems: Path, tmp_path: Path) -> None:
    settings = [f"model={model}", "n=3", "temperature=1", "max_new_tokens=6", "batch_size=2"]
    full, cut = tmp_path / "full.jsonl", tmp_path / "cut.jsonl"
    evaluate(problems, full, *settings)
    rows = lines(full)
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


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz"])
def test_processes_with_a_share_end_with_the_file_of_one(
    model: Path, problems: Path, tmp_path: Path, ending: str
) -> None:
    settings = [f"model={model}", "n=5", "temperature=1", "max_new_tokens=6", "batch_size=2"]  # 8 batches
    evaluate(problems, tmp_path / "one.jsonl", *settings)
    (tmp_path / "shared").mkdir()
    shared = tmp_path / "shared" / f"s.{ending}"
    for part in (2, 1):
        evaluate(problems, shared, *settings, f"share={part}/3")
    assert not shared.exists()
    first = tmp_path / "shared" / f"1-of-3-s.{ending}"
    first.write_bytes(first.read_bytes()[:-9])  # as if it had been killed
    evaluate(problems, shared, *settings, "share=3/3")
    assert not shared.exists()
    evaluate(problems, shared, *settings, "share=1/3")
    assert lines(shared) == lines(tmp_path / "one.jsonl")
    assert sorted(path.name for path in shared.parent.iterdir()) == [f"s.{ending}", f"s.{ending}_settings.json"]
    before = shared.read_bytes()
    evaluate(problems, shared, *settings, "share=2/3")
    evaluate(problems, shared, *settings)
    assert shared.read_bytes() == before
    evaluate(problems, shared, *settings, "seed=7", "share=2/3", code=2)


@pytest.mark.processes
@pytest.mark.slow
def test_a_share_is_generated_beside_others(model: Path, problems: Path, tmp_path: Path) -> None:
    settings = [f"model={model}", "n=3", "temperature=1", "max_new_tokens=6", "batch_size=2"]
    evaluate(problems, tmp_path / "one.jsonl", *settings)
    shared = tmp_path / "s.jsonl"
    arguments = ["evaluate", "task=humaneval", f"problems={problems}", f"samples={shared}", *settings]
    started = [forks.Command([*arguments, f"share={part}/2"], tmp_path, environment(tmp_path)) for part in (1, 2)]
    assert [process.wait(120) for process in started] == [0, 0]
    assert shared.read_bytes() == (tmp_path / "one.jsonl").read_bytes()


@pytest.mark.processes
def test_each_k_counts_with_its_best_temperature(problems: Path, tmp_path: Path) -> None:
    for temperature, right in ((0.2, [5, 0, 0]), (0.8, [1, 2, 1])):
        write(tmp_path / f"t{temperature}-s.jsonl", canned(right, 5))
    out = tmp_path / "out.json"
    evaluate(problems, tmp_path / "s.jsonl", *SCORE, "ks=[1,3]", "temperature=[0.2,0.8]", f"out={out}")
    found = json.loads(out.read_text())
    assert found["by_temperature"]["0.2"] == pytest.approx({"pass@1": 1 / 3, "pass@3": 1 / 3})
    assert found["by_temperature"]["0.8"] == pytest.approx({"pass@1": 4 / 15, "pass@3": (0.6 + 0.9 + 0.6) / 3})
    assert found["pass@1"] == pytest.approx(1 / 3)
    assert found["pass@3"] == pytest.approx(0.7)
    assert found["about"]["samples"]["best_temperature"] == {"pass@1": 0.2, "pass@3": 0.8}
    table = evaluation_section([found], "model")
    assert "| problems | pass@1 | 33.33 % | 5 | 0.2, the best of 0.2, 0.8 |" in table
    assert "| problems | pass@3 | 70.00 % | 5 | 0.8, the best of 0.2, 0.8 |" in table


def test_temperatures_of_different_weights_are_not_compared(problems: Path, tmp_path: Path) -> None:
    scores = {each: humaneval.Scores({}, {"models": {"m": weights}}) for each, weights in ((0.2, "a"), (0.8, "b"))}
    with pytest.raises(DataError, match="different weights"):
        humaneval.best_scores(scores)


@pytest.mark.slow
def test_several_temperatures_have_a_file_of_samples_each(model: Path, problems: Path, tmp_path: Path) -> None:
    settings = [f"model={model}", "max_new_tokens=6"]
    evaluate(problems, tmp_path / "s.jsonl", *settings, "temperature=[0.5,2]")
    for temperature in ("0.5", "2"):
        alone = tmp_path / f"alone{temperature}.jsonl"
        evaluate(problems, alone, *settings, f"temperature={temperature}")
        assert (tmp_path / f"t{temperature}-s.jsonl").read_bytes() == alone.read_bytes()


@pytest.mark.processes
@pytest.mark.parametrize("row", [MBPP, MBPP_PLUS, MULTIPL_E], ids=["MBPP", "MBPP+", "MultiPL-E"])
def test_problems_of_other_formats_are_scored(row: dict[str, Any], tmp_path: Path) -> None:
    head = "" if "tests" in row else "def double(x):\n"
    name = row.get("task_id", row.get("name"))
    samples = [{"task_id": name, "completion": head + body} for body in (RIGHT, WRONG, "    quit()\n")]
    path = write(tmp_path / "samples.jsonl", samples)
    evaluate(write(tmp_path / "problems.jsonl", [row]), path, *SCORE)
    assert [each["passed"] for each in lines(tmp_path / "samples.jsonl_results.jsonl")] == [True, False, False]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["model=m", "share=0/3"], "share=0/3: must be I/N"),
        (["model=m", "share=4/3"], "share=4/3: must be I/N"),
        (["model=m", "share=two"], "share=two: must be I/N"),
        (["model=m", "share=1/2", *SCORE], "only generates"),
        (["model=m", "temperature=[0.2,-1]"], "temperature=[0.2, -1.0]"),
        (["model=m", "temperature=[1,1]"], "each once"),
        (["model=m", "temperature=[0.2,1e-40]"], "at least 0.001"),
        (["model=m", "temperature=[]"], "temperature=[]"),
        ([*SCORE, "timeout=1e8"], "timeout=100000000.0: must be at most 3600"),
        ([*SCORE, "memory_mb=99999999999999"], "must be at most 16777216"),
    ],
)
def test_contradictory_settings_are_refused(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(Path("p.jsonl"), Path("s.jsonl"), *arguments, code=2)
    assert expected in capsys.readouterr().err


def test_only_python_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problems = write(tmp_path / "problems.jsonl", [MULTIPL_E, {**MULTIPL_E, "name": "b", "language": "rs"}])
    evaluate(problems, tmp_path / "s.jsonl", *SCORE, code=3)
    assert "problem 2 is Rust; here Python" in capsys.readouterr().err


@pytest.mark.slow
def test_samples_of_other_settings_are_not_mixed(
    model: Path, problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = tmp_path / "samples.jsonl"
    evaluate(problems, samples, f"model={model}", "max_new_tokens=2")
    content = samples.read_bytes()
    evaluate(problems, samples, f"model={model}", "max_new_tokens=3", code=2)
    assert "max_new_tokens was 2, is 3" in capsys.readouterr().err
    settings, intact = settings_file(samples), settings_file(samples).read_bytes()
    settings.write_bytes(intact[:-5])
    evaluate(problems, samples, f"model={model}", "max_new_tokens=2", code=2)
    assert f"{settings} is damaged (" in capsys.readouterr().err
    settings.write_bytes(intact)
    write(tmp_path / "theirs.jsonl", canned([1, 1, 1], 1))
    evaluate(problems, tmp_path / "theirs.jsonl", f"model={model}", code=2)
    assert samples.read_bytes() == content


@pytest.mark.slow
def test_samples_of_other_weights_are_not_mixed(
    problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, samples = tmp_path / "model", tmp_path / "samples.jsonl"
    base_folder(model, small_bpe(), seed=2)
    evaluate(problems, samples, f"model={model}", "max_new_tokens=2")
    shutil.rmtree(model)
    base_folder(model, small_bpe(), seed=3)
    evaluate(problems, samples, f"model={model}", "max_new_tokens=2", code=2)
    assert "weights was" in capsys.readouterr().err


def test_weights_in_the_older_format_have_a_hash(tmp_path: Path) -> None:
    assert weights_hash(tmp_path) is None
    (tmp_path / "pytorch_model-00001-of-00001.bin").write_bytes(b"one")
    (tmp_path / "training_args.bin").write_bytes(b"no weights")
    first = weights_hash(tmp_path)
    (tmp_path / "pytorch_model-00001-of-00001.bin").write_bytes(b"two")
    assert len({None, first, weights_hash(tmp_path)}) == 3


@pytest.mark.processes
def test_scores_name_the_weights_and_the_sampling_also_in_two_steps(
    model: Path, problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples, out = tmp_path / "samples.jsonl", tmp_path / "out.json"
    evaluate(problems, samples, f"model={model}", "max_new_tokens=2", "n=2", "temperature=0.5")
    evaluate(problems, samples, *SCORE, f"out={out}")
    about = read_results(str(out))["about"]
    assert about["models"] == {str(model): weights_hash(model)}
    assert {**about["samples"], "n": 2, "temperature": 0.5, "top_p": 0.95} == about["samples"]
    assert "n: 2, temperature: 0.5, top_p: 0.95, problems: 3 of 3" in capsys.readouterr().out


def test_a_refused_generation_leaves_no_file(
    model: Path, problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = set(tmp_path.iterdir())
    evaluate(problems, tmp_path / "new" / "samples.jsonl", f"model={model}", "max_new_tokens=9999", code=2)
    assert "this model has room for 63" in capsys.readouterr().err
    assert set(tmp_path.iterdir()) == before
    evaluate(problems, tmp_path, f"model={model}", code=2)
    assert f"samples={tmp_path} is a folder" in capsys.readouterr().err


@pytest.mark.slow
def test_the_advised_number_of_tokens_is_taken(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    growing = [{**each, "prompt": each["prompt"] + "    #\n" * 3 * turn} for turn, each in enumerate(PROBLEMS)]
    problems, samples = write(tmp_path / "p.jsonl", growing), tmp_path / "samples.jsonl"
    evaluate(problems, samples, f"model={model}", "max_new_tokens=55", code=2)
    advised = re.search(r"at most (\d+) fit", capsys.readouterr().err)
    assert advised
    evaluate(problems, samples, f"model={model}", f"max_new_tokens={advised[1]}")
    long = write(tmp_path / "long.jsonl", [{**PROBLEMS[0], "prompt": "x = 1\n" * 64}])
    evaluate(long, tmp_path / "new.jsonl", f"model={model}", "max_new_tokens=2", code=2)
    assert "the longest prompt exceeds this model's positions" in capsys.readouterr().err


@pytest.mark.slow
def test_compressed_samples_are_written_resumed_and_equal_to_plain_ones(
    model: Path, problems: Path, tmp_path: Path
) -> None:
    settings = [f"model={model}", "n=2", "temperature=1", "max_new_tokens=4", "batch_size=2"]
    plain, packed = tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"
    evaluate(problems, plain, *settings)
    evaluate(problems, packed, *settings)
    whole = packed.read_bytes()
    assert gzip.decompress(whole) == plain.read_bytes()
    for length in (0, 7, len(whole) // 2, len(whole) - 1):
        packed.write_bytes(whole[:length])
        evaluate(problems, packed, *settings)
        assert gzip.decompress(packed.read_bytes()) == plain.read_bytes()


def test_a_model_on_the_hub_is_identified_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    commit, cached = "0f" * 20, tmp_path / "models--me--tiny"
    for path, content in (("refs/main", commit), (f"snapshots/{commit}/config.json", "{}")):
        (cached / path).parent.mkdir(parents=True, exist_ok=True)
        (cached / path).write_text(content)
    assert weights_version("me/tiny") == commit
    for name in ("me/other", "not a name"):
        with pytest.raises(ConfigError, match=f"model={name} is neither a folder nor a model on the hub: "):
            weights_version(name)


def test_a_file_of_samples_has_one_command_at_a_time(
    model: Path, problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = tmp_path / "new" / "samples.jsonl"
    lock, part = samples.with_name("samples.jsonl_lock"), samples.with_name("2-of-2-samples.jsonl")
    generation = [f"model={model}", "max_new_tokens=1", "batch_size=1"]
    samples.parent.mkdir()
    with locked(lock, "held"):
        evaluate(problems, samples, *generation, code=2)
        assert f"samples={samples}: another command uses them; wait for it" in capsys.readouterr().err
        evaluate(problems, samples, *generation, "share=2/2")  # a file of its own
        assert list(samples.parent.glob("*_lock")) == [lock]
        assert part.exists()
    evaluate(problems, samples, *generation)
    with locked(lock, "held"):
        evaluate(problems, samples, *SCORE, code=2)
        assert f"samples={samples}: another command uses them; wait for it" in capsys.readouterr().err
    assert not lock.exists()
    assert not samples.with_name("samples.jsonl_results.jsonl").exists()


@pytest.mark.parametrize("name", [".", "missing/samples.jsonl"])
def test_samples_that_are_not_there_are_no_file(name: str, problems: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(problems, Path(name), *SCORE, code=2)
    assert f"samples={name}: no such file" in capsys.readouterr().err


def test_a_lock_that_its_holder_removes_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening it and locking it; a third command would make another."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: (tmp_path / "lock").unlink())
    with pytest.raises(ConfigError, match="busy"), locked(tmp_path / "lock", "busy"):
        pass


def test_samples_that_another_command_wrote_in_the_meantime_are_kept(
    model: Path, problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    samples, generation = tmp_path / "samples.jsonl", [f"model={model}", "max_new_tokens=1"]
    load = load_model_and_tokenizer

    def write_others(name: str) -> object:
        monkeypatch.setattr(evaluated, "load_model_and_tokenizer", load)
        evaluate(problems, samples, *generation, "n=2")
        return load(name)

    monkeypatch.setattr(evaluated, "load_model_and_tokenizer", write_others)
    evaluate(problems, samples, *generation, "seed=7", code=2)
    assert "seed was 42, is 7" in capsys.readouterr().err
    assert len(lines(samples)) == 2 * len(PROBLEMS)
    samples.unlink()
    monkeypatch.setattr(evaluated, "load_model_and_tokenizer", write_others)
    evaluate(problems, samples, *generation)
    assert len(lines(samples)) == 2 * len(PROBLEMS)


@pytest.mark.processes
def test_a_killed_scoring_continues(problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, results = canned([3, 1, 0], 3), tmp_path / "samples.jsonl_results.jsonl"
    judged: list[int] = []
    judge = humaneval.judge

    def counted(sample: dict[str, Any], *rest: Any) -> str:
        judged.append(sample["mine"])
        if len(judged) == 5:
            raise SandboxFault("no space left")
        return judge(sample, *rest)

    monkeypatch.setattr(humaneval, "judge", counted)
    write(tmp_path / "samples.jsonl", samples)
    evaluate(problems, tmp_path / "samples.jsonl", *SCORE, "workers=1", code=1)
    staged = tmp_path / "samples.jsonl_results.jsonl.unfinished"
    assert len(lines(staged)) == 1 + 4  # what they depend on, and results
    assert not results.exists()
    with staged.open("a") as file:
        file.write('{"task_id": "Test/')  # a line that was cut
    judged += [-1] * (10 - len(judged))  # another sample may have begun before the first command ended
    evaluate(problems, tmp_path / "samples.jsonl", *SCORE, "workers=1")
    assert len(judged) == 10 + 5
    assert [row["passed"] for row in lines(results)] == [row["completion"] != NOTHING for row in samples]
    assert not staged.exists()


@pytest.mark.processes
@pytest.mark.parametrize("damage", ["{}", "[]", "junk", '{"result": 3}'])
def test_damaged_results_are_made_again(damage: str, problems: Path, tmp_path: Path) -> None:
    samples = write(tmp_path / "samples.jsonl", canned([1, 1, 1], 1))
    staged = tmp_path / "samples.jsonl_results.jsonl.unfinished"
    found = humaneval.scorable_problems(str(problems))
    limits = {"seconds": 5.0, "memory_bytes": 1 << 30, "interpreter": interpreter()}
    staged.write_text(json.dumps({"problems": humaneval.problems_hash(found), **limits}) + f"\n{damage}\n")
    evaluate(problems, samples, *SCORE)
    assert [row["passed"] for row in lines(tmp_path / "samples.jsonl_results.jsonl")] == [True] * 3


@pytest.mark.processes
def test_results_that_cannot_be_written_end_the_scoring(
    problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    judged: list[str] = []
    monkeypatch.setattr(humaneval, "judge", lambda sample, *_: judged.append(sample["task_id"]) or PASSED)  # type: ignore[func-returns-value]
    monkeypatch.setattr(humaneval, "result_line", full)
    samples = canned([0, 0, 0], 4000)
    evaluate(problems, write(tmp_path / "samples.jsonl", samples), *SCORE, "workers=1", code=2)
    assert "No space left on device" in capsys.readouterr().err
    assert len(judged) < len(samples)


def test_problems_with_the_same_id_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twice = write(tmp_path / "p.jsonl", [*PROBLEMS, PROBLEMS[1]])
    evaluate(twice, tmp_path / "s.jsonl", *SCORE, code=3)
    assert "2 problems have the id 'Test/1'" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["timeout=9", "a sample", "a problem", "the interpreter"])
@pytest.mark.processes
def test_results_of_other_limits_samples_or_problems_are_not_continued(
    change: str, problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = write(tmp_path / "samples.jsonl", canned([1, 1, 1], 1))
    staged = tmp_path / "samples.jsonl_results.jsonl.unfinished"
    monkeypatch.setattr(humaneval, "judge", lambda *_: PASSED)
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)  # keeps the unfinished file
    evaluate(problems, samples, *SCORE)
    assert len(lines(staged)) == 4
    monkeypatch.undo()
    judged: list[str] = []
    monkeypatch.setattr(humaneval, "judge", lambda *_: judged.append(PASSED) or PASSED)  # type: ignore[func-returns-value]
    if change == "a sample":
        write(samples, [{**row, "mine": 9} for row in canned([1, 1, 1], 1)])
    if change == "the interpreter":
        monkeypatch.setattr(humaneval, "interpreter", lambda: "another")
    if change == "a problem":
        write(tmp_path / "problems.jsonl", [{**each, "test": each["test"] + "\n"} for each in PROBLEMS])
        problems = tmp_path / "problems.jsonl"
    evaluate(problems, samples, *SCORE, *([change] if "=" in change else []))
    assert len(judged) == 3


@pytest.mark.processes
def test_partial_samples_and_whole_programs_are_scored(
    problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    programs = [
        {"task_id": each["task_id"], "solution": "import os\n" + each["prompt"] + each["canonical_solution"]}
        for each in PROBLEMS[:2]
    ]
    out = tmp_path / "out.json"
    evaluate(problems, write(tmp_path / "samples.jsonl", programs), *SCORE, f"out={out}")
    assert "PARTIAL" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert (found["pass@1"], found["about"]["samples"]["problems"]) == (1.0, "2 of 3")


@pytest.mark.processes
def test_a_weak_sandbox_needs_a_second_word(
    problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = write(tmp_path / "samples.jsonl", canned([1, 1, 1], 1))
    monkeypatch.setattr(humaneval, "isolation", lambda: Isolation(namespaces=False, drop_root=True))
    monkeypatch.setattr(humaneval, "judge", lambda *_: PASSED)
    evaluate(problems, samples, "allow_code_execution=true", code=2)
    refused = capsys.readouterr().err
    assert "no namespaces" in refused
    assert "allow_weak_sandbox=true" in refused
    assert not list(tmp_path.glob("*results*"))
    evaluate(problems, samples, *SCORE)
    assert "no namespaces" in capsys.readouterr().out


@pytest.mark.slow
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


@pytest.mark.slow
def test_completions_end_at_the_stop_sequences(model: Path, problems: Path, tmp_path: Path) -> None:
    def completions(name: str, *settings: str) -> list[str]:
        evaluate(problems, tmp_path / name, f"model={model}", "max_new_tokens=30", "batch_size=3", *settings)
        return [row["completion"] for row in lines(tmp_path / name)]

    free = completions("free.jsonl", "stop=[]")
    stop = re.findall("[A-Za-z]{2}", "\n".join(free))[0]
    cut = completions("cut.jsonl", f"stop=[{stop}]")
    assert cut == [text.split(stop)[0] for text in free]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "code", "expected"),
    [
        ([], 3, "has no samples"),
        ([*canned([1, 1, 1], 1), {"task_id": 9, "completion": ""}, {"task_id": "x", "completion": ""}], 3, "[9, 'x']"),
        ([{"task_id": ["Test/0"], "completion": ""}], 3, "line 1 has no task_id"),
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
    evaluate(problems, write(tmp_path / "samples.jsonl", rows), *SCORE, code=code)
    assert expected in capsys.readouterr().err


@pytest.mark.slow
def test_problems_must_be_a_file_in_the_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(tmp_path / "none.jsonl", tmp_path / "x", *SCORE, code=2)
    assert "no such file" in capsys.readouterr().err
    other = write(tmp_path / "other.jsonl", [{"task_id": "a", "prompt": ""}])
    evaluate(other, tmp_path / "x", *SCORE, code=3)
    assert "problem 1 lacks test, entry_point" in capsys.readouterr().err
    inputs = {"task_id": "Mbpp/2", "prompt": "", "base_input": [[2]], "plus_input": []}
    evaluate(write(tmp_path / "own.jsonl", [inputs]), tmp_path / "x", *SCORE, code=3)
    assert "use the dataset evalplus/mbppplus" in capsys.readouterr().err
    evaluate(write(tmp_path / "empty.jsonl", []), tmp_path / "x", *SCORE, code=3)
    assert "has no problems" in capsys.readouterr().err
    short = tmp_path / "short.jsonl.gz"
    short.write_bytes(gzip.compress(other.read_bytes())[:-9])
    evaluate(short, tmp_path / "x", *SCORE, code=2)
    assert f"problems={short} cannot be read" in capsys.readouterr().err
