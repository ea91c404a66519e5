"""A corpus build on several processes: the same bytes for any number of them and after any interruption."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from support import corpus_build, processes
from support.corpus_build import SMALL
from support.small_corpus import write_sources

from clippy_train.config import CorpusConfig, DedupConfig, SourceConfig
from clippy_train.corpus.build import build_corpus
from clippy_train.corpus.slurm import submit_corpus
from clippy_train.corpus.stages import STAGES, Sizes
from clippy_train.errors import ConfigError, DataError, Interrupted
from clippy_train.shards.format import SPLITS
from clippy_train.shards.sources import open_corpus

Content = dict[str, bytes]


def content(folder: Path) -> Content:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def command(*arguments: object) -> list[str]:
    return [sys.executable, corpus_build.__file__, *map(str, arguments)]


def wait_for(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 packages, each with an exact copy and a similar copy of every file in another package."""
    root = write_sources(tmp_path_factory.mktemp("scale") / "code")
    for path in sorted(root.rglob("*.py")):
        for suffix, change in (("same", ""), ("similar", "\nimport os\nimport sys\n")):
            copy = root / f"{path.parent.name}_{suffix}" / path.name
            copy.parent.mkdir(exist_ok=True)
            copy.write_text(path.read_text() + change)
    return root


@pytest.fixture(scope="module")
def expected(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Content:
    """What one process builds without an interruption."""
    out = tmp_path_factory.mktemp("expected") / "out"
    manifest = build_corpus(corpus_build.settings(sources, out), SMALL)
    assert min(len(files) for files in manifest["files"].values()) >= 2
    assert min(manifest["rejected"][rule] for rule in ("exact_duplicate", "near_duplicate")) >= 20
    return content(out)


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_gives_the_same_bytes(
    sources: Path, tmp_path: Path, expected: Content, workers: int
) -> None:
    subprocess.run(command(sources, tmp_path / "out", workers), check=True, timeout=120)
    assert content(tmp_path / "out") == expected
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("moment", [*(stage.name for stage in STAGES), "move", "clean"])
def test_a_build_that_is_killed_in_any_stage_goes_on_to_the_same_bytes(
    sources: Path, tmp_path: Path, expected: Content, moment: str
) -> None:
    killed = subprocess.run(command(sources, tmp_path / "out", 1, moment), timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "out").exists() == (moment == "clean")
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / ".out.unfinished").glob("*/0*")}
    done = [stage.name for stage in STAGES if any(path.parent.name == stage.name for path in finished)]
    names = [stage.name for stage in STAGES]
    assert done == names[: names.index(moment)] if moment in names else done == names
    build_corpus(corpus_build.settings(sources, tmp_path / "out"), SMALL)
    assert content(tmp_path / "out") == expected
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


@pytest.mark.processes
@pytest.mark.slow
def test_a_build_on_two_workers_that_is_killed_again_and_again_ends_with_the_same_bytes(
    sources: Path, tmp_path: Path, expected: Content
) -> None:
    rng = random.Random(0)
    code = -signal.SIGKILL
    while code == -signal.SIGKILL:
        code = killed_after(rng.randint(3, 15), command(sources, tmp_path / "out", 2), tmp_path / ".out.unfinished")
    assert code == 0
    assert content(tmp_path / "out") == expected
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def killed_after(tasks: int, arguments: list[str], results: Path) -> int:
    """The exit code of a command that is killed when it has performed so many more tasks, unless it ends before."""
    goal = number_of_results(results) + tasks
    build = processes.start(arguments)
    wait_for(lambda: build.poll() is not None or number_of_results(results) >= goal)
    workers = psutil.Process(build.pid).children(recursive=True) if build.poll() is None else []
    build.kill()
    psutil.wait_procs(workers, 10)
    assert not [worker for worker in workers if worker.is_running()]
    return build.wait()


def number_of_results(results: Path) -> int:
    try:
        return len(list(results.glob("*/0*")))
    except FileNotFoundError:  # the build is removing them
        return 0


def test_a_finished_task_is_not_repeated(unfinished: CorpusConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clippy_train.corpus.tasks.perform", _interrupt)
    build_corpus(unfinished, SMALL)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def unfinished(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CorpusConfig:
    """The settings of a build that was interrupted."""
    settings = corpus_build.settings(sources, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("clippy_train.corpus.build.publish", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            build_corpus(settings, SMALL)
    return settings


def test_an_interrupted_build_does_not_go_on_with_other_settings(unfinished: CorpusConfig) -> None:
    unfinished.seed, unfinished.dedup = 7, DedupConfig()
    with pytest.raises(ConfigError, match=r"out=.*another dedup, seed is in .*\.out\.unfinished.*remove the folder"):
        build_corpus(unfinished, SMALL)


@pytest.mark.slow
def test_results_of_other_settings_survive_the_refusal(unfinished: CorpusConfig, expected: Content) -> None:
    other = corpus_build.settings(Path(unfinished.src[0]), Path(unfinished.out))
    other.seed = 7
    with pytest.raises(ConfigError, match="seed"):
        build_corpus(other, SMALL)
    build_corpus(unfinished, SMALL)
    assert content(Path(unfinished.out)) == expected


def test_the_number_of_workers_may_change(unfinished: CorpusConfig, expected: Content) -> None:
    unfinished.workers = 2
    build_corpus(unfinished, SMALL)
    assert content(Path(unfinished.out)) == expected


@pytest.mark.processes
@pytest.mark.slow
def test_one_command_at_a_time_builds_a_corpus(sources: Path, tmp_path: Path, expected: Content) -> None:
    out = tmp_path / "out"
    build = processes.start(command(sources, out, 1))
    wait_for(lambda: (tmp_path / ".out.unfinished" / "settings.json").exists())
    build.send_signal(signal.SIGSTOP)
    with pytest.raises(ConfigError, match="another command builds it"):
        build_corpus(corpus_build.settings(sources, out), SMALL)
    build.send_signal(signal.SIGCONT)
    assert build.wait(60) == 0
    assert content(out) == expected


def clippy_corpus(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "clippy_train.cli", "corpus", *arguments]


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    """Sources that take a while to read: hard links to one file, whose near duplicates are looked for."""
    for package in ("one", "two", "three"):
        (tmp_path / "code" / package).mkdir(parents=True)
        (tmp_path / "code" / package / "a.py").write_text(f"import {package}\n" * 20)
    rng = random.Random(0)
    (tmp_path / "code" / "one" / "a.py").write_text(" ".join(f"name_{rng.randrange(9)}" for _ in range(8000)))
    for number in range(20_000):
        (tmp_path / "code" / "one" / f"{number}.py").hardlink_to(tmp_path / "code" / "one" / "a.py")
    return tmp_path / "code"


def workers_of(process: "subprocess.Popen[Any]") -> list[psutil.Process]:
    """The processes of a command that have used a second of a core."""
    found = psutil.Process(process.pid).children(recursive=True)
    return [each for each in found if each.cpu_times().user > 1]


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "TERM"])
def test_an_interrupted_command_stops_at_once_and_says_how_to_go_on(
    slow: Path, tmp_path: Path, number: int, code: int
) -> None:
    arguments = [str(slow), f"out={tmp_path / 'out'}", "dedup.exact=false", "workers=2"]
    build = processes.start(clippy_corpus(*arguments), stderr=subprocess.PIPE, text=True)
    workers = wait_for(lambda: len(found := workers_of(build)) == 2 and found)
    build.send_signal(number)
    _, log = build.communicate(timeout=30)
    assert build.returncode == code
    assert "interrupted: the same command continues" in log
    assert not [worker for worker in workers if worker.is_running()]
    assert not (tmp_path / "out").exists()


@pytest.mark.processes
@pytest.mark.slow
def test_a_killed_worker_ends_the_command_with_a_message(slow: Path, tmp_path: Path) -> None:
    arguments = [str(slow), f"out={tmp_path / 'out'}", "dedup.exact=false", "workers=2"]
    build = processes.start(clippy_corpus(*arguments), stderr=subprocess.PIPE, text=True)
    wait_for(lambda: workers_of(build))[0].kill()
    _, log = build.communicate(timeout=30)
    assert build.returncode == Interrupted.exit_code
    assert "a worker was killed" in log
    assert (tmp_path / ".out.unfinished").exists()


def test_an_error_that_a_repetition_cannot_mend_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "code" / "one").mkdir(parents=True)
    (tmp_path / "code" / "one" / "a.py").write_text("import this\n" * 20)
    with pytest.raises(DataError, match="1 repositories"):
        build_corpus(corpus_build.settings(tmp_path / "code", tmp_path / "out"), SMALL)
    assert list(tmp_path.iterdir()) == [tmp_path / "code"]


@pytest.mark.slow
def test_how_the_work_is_divided_changes_neither_documents_nor_their_order(sources: Path, tmp_path: Path) -> None:
    texts = []
    for number, sizes in enumerate((SMALL, Sizes(), Sizes(files=20, part=1, table=9000, range=20_000))):
        settings = corpus_build.settings(sources, tmp_path / str(number))
        build_corpus(settings, sizes)
        corpora = [open_corpus(SourceConfig(path=settings.out), split) for split in SPLITS]
        texts.append([list(corpus.texts()) for corpus in corpora])
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize(
    ("sbatch", "message"), [(None, "no sbatch on the PATH"), ("/usr/bin/true", r"pip install 'clippy_train\[corpus\]'")]
)
def test_jobs_without_slurm_or_datatrove_are_refused(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sbatch: str | None, message: str
) -> None:
    monkeypatch.setattr("shutil.which", lambda _: sbatch)
    monkeypatch.setitem(sys.modules, "datatrove.executor", None)
    settings = corpus_build.settings(sources, tmp_path / "out")
    settings.slurm.partition = "main"
    with pytest.raises(ConfigError, match=rf"slurm\.partition.*{message}"):
        submit_corpus(settings)
    assert not list(tmp_path.iterdir())


@pytest.mark.processes
def test_jobs_that_slurm_refuses_name_the_key(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datatrove", reason="the extra `corpus` is not installed")
    (tmp_path / "sbatch").symlink_to("/usr/bin/false")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    settings = corpus_build.settings(sources, tmp_path / "out")
    settings.slurm.partition = "none"
    with pytest.raises(ConfigError, match=r"slurm\.partition=none: sbatch refuses the stage list"):
        submit_corpus(settings)
    assert [path.name for path in tmp_path.iterdir()] == ["sbatch"]
