"""A small corpus of made-up Python packages, and a tokenizer trained on it."""

import json
import random
from pathlib import Path

from clippy_train.config import WHITESPACE_TOKENS, CorpusConfig, DataConfig
from clippy_train.corpus.build import build_corpus
from clippy_train.shards.sources import open_corpus
from clippy_train.tokenizer import add_whitespace_tokens, train_bpe

NAMES = ["value", "total", "index", "name", "path", "line", "count", "node", "item", "text", "left", "right", "size"]


def write_sources(root: Path) -> Path:
    """12 packages of a few Python files each."""
    rng = random.Random(0)
    for package in range(12):
        folder = root / f"package_{package:02d}"
        folder.mkdir(parents=True)
        for module in range(rng.randint(2, 6)):
            functions = "\n\n".join(_function(rng, number) for number in range(rng.randint(1, 12)))
            (folder / f"module_{module}.py").write_text(f'"""Module {module}."""\n\nimport os\n\n\n{functions}')
    return root


def make_corpus(root: Path) -> Path:
    """A corpus folder with several training shards."""
    sources, out = write_sources(root / "code"), root / "tiny"
    build_corpus(CorpusConfig(src=[str(sources)], out=str(out), shard_bytes=8000))
    return out


def make_tokenizer(corpus: Path, folder: Path) -> Path:
    """The folder of a byte-level BPE with 512 tokens and the four whitespace tokens."""
    texts = open_corpus(DataConfig(path=str(corpus)), "train").texts()
    tokenizer = train_bpe(texts, vocab_size=512, model_max_length=256)
    add_whitespace_tokens(tokenizer, WHITESPACE_TOKENS, "longest")
    tokenizer.save_pretrained(folder)
    return folder


def _function(rng: random.Random, number: int) -> str:
    first, second = rng.sample(NAMES, 2)
    lines = [f"def {first}_{number}({second}, limit={rng.randint(0, 99)}):", f"    {first} = {second}"]
    for _ in range(rng.randint(1, 6)):
        lines.append(f"    for {rng.choice(NAMES)} in range({rng.randint(2, 50)}):")
        lines.append(f"        {first} += {rng.choice(NAMES)} * {json.dumps(rng.choice(NAMES))}")
    return "\n".join([*lines, f"    return {first}", ""])
