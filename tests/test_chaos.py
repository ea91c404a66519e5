"""The short forms of `make chaos`, one random kill and one random signal on forked processes, and of its self-test."""

from collections import Counter
from pathlib import Path

import pytest
from support.runs import Runs
from tools.chaos import Chaos, Fault, kill, send_signal
from tools.chaos_selftest import MUTATIONS, PACKAGE, Mutation


@pytest.fixture(scope="module")
def chaos(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, tiny_tokenizer: Path) -> Chaos:
    runs = Runs(tmp_path_factory.mktemp("chaos"), tiny_corpus, tiny_tokenizer)
    return Chaos(runs, seed=0, start=Runs.start_clippy)


@pytest.mark.processes
@pytest.mark.timeout(600)
@pytest.mark.parametrize("fault", [kill, send_signal])
def test_a_run_with_random_faults_equals_the_uninterrupted_run(chaos: Chaos, fault: Fault) -> None:
    chaos.counts = Counter()
    counts = chaos.campaign(fault, trials=1)
    assert counts["trials"] == counts["runs compared"] == 1


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.module)
def test_the_protections_that_the_self_test_removes_are_where_it_looks(mutation: Mutation) -> None:
    assert (PACKAGE / mutation.module).read_text().count(mutation.text) == 1
