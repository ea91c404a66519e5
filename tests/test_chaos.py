"""The short forms of `make chaos` (one random kill and one random signal, on forked processes) and of its self-test."""

import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from support.runs import Runs, rank_pids
from tools.chaos import Chaos, Fault, Run, kill, send_signal
from tools.chaos_selftest import MUTATIONS, PACKAGE, Mutation


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, tiny_tokenizer: Path) -> Runs:
    return Runs(tmp_path_factory.mktemp("chaos"), tiny_corpus, tiny_tokenizer)


@pytest.fixture(scope="module")
def chaos(runs: Runs) -> Chaos:
    return Chaos(runs, seed=0, start=Runs.start_clippy)


@pytest.mark.processes
@pytest.mark.timeout(600)
@pytest.mark.parametrize("fault", [kill, send_signal])
def test_a_run_with_random_faults_equals_the_uninterrupted_run(chaos: Chaos, fault: Fault) -> None:
    chaos.counts = Counter()
    counts = chaos.campaign(fault, trials=1)
    assert counts["trials"] == counts["runs compared"] == 1


@pytest.mark.processes
def test_the_ranks_and_the_loaders_of_a_forked_run_are_found(runs: Runs) -> None:
    process = runs.start("found", "trainer.max_steps=100000")
    runs.wait_for_step("found", 2, process)
    run = Run(runs.folder("found"), process)
    assert (len(run.ranks()), len(run.loaders())) == (2, 2)
    assert [each for rank in (0, 1) for each in rank_pids(run.folder, rank)[:1]] == run.ranks()
    loaders = run.loaders()
    for pid in (process.pid, *loaders):
        os.kill(pid, signal.SIGSTOP)
    for pid in run.ranks():
        os.kill(pid, signal.SIGKILL)
    while run.ranks():
        time.sleep(0.01)
    assert rank_pids(run.folder) == loaders  # without their ranks too
    for pid in (process.pid, *loaders):
        os.kill(pid, signal.SIGCONT)
    process.communicate(timeout=60)
    while rank_pids(run.folder):
        time.sleep(0.01)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.module)
def test_the_protections_that_the_self_test_removes_are_where_it_looks(mutation: Mutation) -> None:
    assert (PACKAGE / mutation.module).read_text().count(mutation.text) == 1
