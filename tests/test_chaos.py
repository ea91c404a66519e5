"""The short form of `make chaos`: one random kill and one random signal, with another seed than the full form's."""

from collections import Counter
from pathlib import Path

import pytest
from support.runs import Runs
from tools.chaos import Blow, Chaos, ask, kill

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def chaos(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, tiny_tokenizer: Path) -> Chaos:
    return Chaos(Runs(tmp_path_factory.mktemp("chaos"), tiny_corpus, tiny_tokenizer), seed=0)


@pytest.mark.parametrize("blow", [kill, ask])
def test_a_run_that_is_struck_becomes_the_run_that_nobody_touched(chaos: Chaos, blow: Blow) -> None:
    chaos.counts = Counter()
    counts = chaos.campaign(blow, trials=1)
    assert counts["trials"] == counts["runs compared"] == 1
