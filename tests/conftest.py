"""What tests of several rooms share: a small corpus, a small tokenizer and a valid configuration of the two."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from clippy_train.compose import compose
from clippy_train.config import CorpusConfig, DataConfig, TrainConfig
from clippy_train.corpus.build import build_corpus
from clippy_train.sources import open_corpus
from clippy_train.tokenizer import add_whitespace_tokens, train_bpe

WHITESPACE_TOKENS = ["\t\t", "  ", "    ", "        "]
NAMES = ["value", "total", "index", "name", "path", "line", "count", "node", "item", "text", "left", "right", "size"]


SLOWEST = ("test_parity.py", "test_train.py", "test_import_flax.py")  # minutes each: started first, one on each worker


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: SLOWEST.index(item.path.name) if item.path.name in SLOWEST else len(SLOWEST))


@pytest.fixture(scope="session")
def source_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 packages of a few Python files each; do not write to it."""
    root = tmp_path_factory.mktemp("sources") / "code"
    rng = random.Random(0)
    for package in range(12):
        folder = root / f"package_{package:02d}"
        folder.mkdir(parents=True)
        for module in range(rng.randint(2, 6)):
            functions = "\n\n".join(_function(rng, number) for number in range(rng.randint(1, 12)))
            (folder / f"module_{module}.py").write_text(f'"""Module {module}."""\n\nimport os\n\n\n{functions}')
    return root


@pytest.fixture(scope="session")
def tiny_corpus(source_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus folder with several training shards; do not write to it."""
    out = tmp_path_factory.mktemp("corpus") / "tiny"
    build_corpus(CorpusConfig(src=[str(source_tree)], out=str(out), shard_bytes=8000))
    return out


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a byte-level BPE with 512 tokens and the four white-space tokens."""
    texts = open_corpus(DataConfig(path=str(tiny_corpus)), "train").texts()
    tokenizer = train_bpe(texts, vocab_size=512, model_max_length=256)
    add_whitespace_tokens(tokenizer, WHITESPACE_TOKENS, "longest")
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def train_config(tiny_corpus: Path, tiny_tokenizer: Path) -> Callable[..., TrainConfig]:
    """`train_config("data.streams=4", ...)`: the demo's configuration on the tiny corpus, with overrides."""
    paths = [f"data.path={tiny_corpus}", f"tokenizer.base={tiny_tokenizer}"]
    return lambda *overrides: compose(TrainConfig, ["experiment=demo", *paths, *overrides])


def _function(rng: random.Random, number: int) -> str:
    first, second = rng.sample(NAMES, 2)
    lines = [f"def {first}_{number}({second}, limit={rng.randint(0, 99)}):", f"    {first} = {second}"]
    for _ in range(rng.randint(1, 6)):
        lines.append(f"    for {rng.choice(NAMES)} in range({rng.randint(2, 50)}):")
        lines.append(f"        {first} += {rng.choice(NAMES)} * {json.dumps(rng.choice(NAMES))}")
    return "\n".join([*lines, f"    return {first}", ""])
