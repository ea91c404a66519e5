"""A corpus built by real job arrays: `make test-slurm`. Needs a Slurm of two nodes that share this file system."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import corpus_build
from support.corpus_build import SMALL
from support.small_corpus import write_sources

from clippy_train.corpus.build import build_corpus

pytestmark = [pytest.mark.slurm, pytest.mark.processes, pytest.mark.timeout(600)]


def run(*command: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.strip()


@pytest.fixture(autouse=True)
def _cluster() -> None:
    pytest.importorskip("datatrove", reason="the extra `corpus` is not installed")
    if not shutil.which("sbatch"):
        pytest.skip("no sbatch on the PATH")


def submit(sources: Path, out: Path) -> dict[str, str]:
    """Submit a build; returns its stages and their jobs' numbers."""
    partition = run("sinfo", "-h", "-o", "%R").split()[0]
    return dict(json.loads(run(sys.executable, corpus_build.__file__, sources, out, "slurm", partition)))


def has_ended(job: str) -> bool:
    return job not in run("squeue", "-h", "-o", "%A").split()


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_arrays_of_jobs_that_are_killed_end_with_the_bytes_of_one_process(tmp_path: Path) -> None:
    """In three stages, the first job is killed as the kernel kills for want of memory, and the command repeated."""
    sources, out = write_sources(tmp_path / "code"), tmp_path / "out"
    build_corpus(corpus_build.settings(sources, tmp_path / "expected"), SMALL)
    killed = ["read", "bands", "write"]
    pending, begun = set(killed), []
    while not out.exists():
        jobs = submit(sources, out)
        begun.append(next(iter(jobs)))
        while not has_ended(jobs["publish"]):
            kill_one(tmp_path, pending)
            time.sleep(0.1)
    assert begun == ["list", *killed]  # what is complete is not submitted again
    assert content(out) == content(tmp_path / "expected")
    assert not (tmp_path / ".out.unfinished").exists()


def kill_one(folder: Path, pending: set[str]) -> None:
    """Kill a job of one of the stages, and remove that from the set."""
    for process in Path("/proc").glob("[0-9]*"):
        if (name := stage_of(process, folder)) in pending:
            os.kill(int(process.name), signal.SIGKILL)
            pending.discard(str(name))


def stage_of(process: Path, folder: Path) -> str | None:
    """The stage that a process works on, if it is the first job of an array of a build in a folder."""
    try:
        words = (process / "cmdline").read_bytes().decode().split("\0")
        variables = (process / "environ").read_bytes().split(b"\0")
    except (OSError, UnicodeDecodeError):
        return None
    is_job = any("launch_pickled_pipeline" in word for word in words[:2]) and b"SLURM_ARRAY_TASK_ID=0" in variables
    return next((Path(word).parent.name for word in words if is_job and word.startswith(f"{folder}/out.jobs")), None)
