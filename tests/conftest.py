"""What tests of several rooms share: a small corpus, a small tokenizer and a valid configuration of the two.

A fixture imports what it needs of torch and transformers: pytest-xdist's controller imports this, and runs no test.
"""

import copy
import functools
import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from support import converter, processes

from clippy_train.compose import compose
from clippy_train.config import TrainConfig
from clippy_train.run import consolidate

# Started first, so that no worker has one of them at the end
SLOWEST = ("test_parity.py", "test_train.py", "test_faults.py", "test_corpus_scale.py", "test_sweep.py")

# How fast a machine is, and whether it has Hypothesis' tables of characters yet, says nothing about the code.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_collection() -> None:
    gc.disable()  # imports make no garbage


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.set_threshold(50_000)  # fewer passes over what tests make
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if {"runs", "replay"} & set(getattr(item, "fixturenames", ())):  # real training
            item.add_marker("processes")
    items.sort(key=lambda item: SLOWEST.index(item.path.name) if item.path.name in SLOWEST else len(SLOWEST))


@pytest.fixture(autouse=True, scope="session")
def _conversions_in_this_process() -> None:
    consolidate.subprocess = converter.SUBPROCESS  # type: ignore[attr-defined, assignment]  # its own import


@pytest.fixture(autouse=True)
def _no_process_outlives_its_test() -> Iterator[None]:
    yield
    processes.end_all()


@pytest.fixture(autouse=True)
def _starts_processes_only_if_marked(request: pytest.FixtureRequest) -> Iterator[None]:
    """`make check` runs the tests that are not marked, and must stay fast."""
    yield
    first = started[:1]
    started.clear()  # not before the test: what its module's fixtures start counts
    if first and not request.node.get_closest_marker("processes"):
        pytest.fail(f"starts processes ({first[0]}): mark it with pytest.mark.processes")


OF_LIBRARIES = [("uname",), ("gcc",), ("ldconfig",), ("fc-list",)]  # asked once per process or machine what it is
started: list[str] = []


def _note(event: str, arguments: tuple[object, ...]) -> None:
    if event in ("subprocess.Popen", "os.fork", "os.posix_spawn") and arguments[:1] not in OF_LIBRARIES:
        started.append(f"{event} {arguments[:1]}")


sys.addaudithook(_note)


@pytest.fixture(scope="session")
def source_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 packages of a few Python files each; do not write to it."""
    from support.small_corpus import write_sources

    return write_sources(tmp_path_factory.mktemp("sources") / "code")


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus folder with several training shards, made from such packages; do not write to it."""
    from support.small_corpus import make_corpus

    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a byte-level BPE with 512 tokens and the four white-space tokens."""
    from support.small_corpus import make_tokenizer

    return make_tokenizer(tiny_corpus, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def train_config(tiny_corpus: Path, tiny_tokenizer: Path) -> Callable[..., TrainConfig]:
    """`train_config("data.streams=4", ...)`: the demo's configuration on the tiny corpus, with overrides.

    Of the environment (devices, `./conf`) it knows what the first call with these overrides saw.
    """
    paths = [f"data.path={tiny_corpus}", f"tokenizer.base={tiny_tokenizer}"]

    @functools.cache  # Hydra takes a tenth of a second, and properties ask for the same again and again
    def composed(*overrides: str) -> TrainConfig:
        return compose(TrainConfig, ["experiment=demo", *paths, *overrides])

    return lambda *overrides: copy.deepcopy(composed(*overrides))
