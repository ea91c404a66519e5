"""Measure each deviation from the original recipe: tokens per byte, and bits per byte after short training runs.

    python benchmarks/recipe.py tokens [CORPUS] [TOKENIZER] [GPT2]   GPT2: a folder with encoder.json and vocab.bpe
    python benchmarks/recipe.py train STEPS                          in a folder with the corpus of `clippy demo`

`docs/recipe.md` has the results. Bits per byte are measured over the full validation split, at equal steps and at equal
bytes: where each variant has read as much text as the one that reads the least (interpolated between validations).
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from clippy_train.config import WHITESPACE_TOKENS, DataConfig
from clippy_train.run.rows import read_rows
from clippy_train.shards.sources import open_corpus
from clippy_train.tokenizer import add_whitespace_tokens, encoder, gpt2_tokenizer, load_tokenizer, remove_added_tokens

PLAIN = "./demo/tokenizer-plain"  # the demo's tokenizer without whitespace tokens
WARMUP = 50  # the demo's
VAL_EVERY = 30
SETTINGS = [
    "experiment=demo",
    f"trainer.val_every_steps={VAL_EVERY}",
    f"trainer.log_every_steps={VAL_EVERY}",
    "trainer.val_samples=1000000",
    "trainer.eval_micro_batch_size=16",
    "checkpoint.every_steps=1000",
]
VARIANTS = {
    "ours": [],
    "ours-seed-1": ["seed=1"],
    "no-white-space-tokens": [f"tokenizer.base={PLAIN}", "tokenizer.whitespace_tokens=[]"],
    "first_listed": ["tokenizer.matching=first_listed"],
    "no-end-of-text": ["data.eos_between_documents=false"],
    "bf16-loss": ["model.loss_dtype=bf16"],
}


@dataclass
class Counts:
    """A split in tokens, without end-of-text between documents."""

    documents: int
    num_bytes: int
    tokens: int
    produced: dict[str, int]  # occurrences of each whitespace token

    def row(self) -> str:
        spaces = ", ".join(f"{json.dumps(token)} {count / self.tokens:.1%}" for token, count in self.produced.items())
        return (
            f"{self.tokens:>10,} tokens, {self.num_bytes / self.tokens:.3f} bytes a token, "
            f"end-of-text would be {self.documents / (self.tokens + self.documents):.3%}; {spaces}"
        )


def count(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Counts:
    ids = np.concatenate([np.array(each, dtype=np.int32) for each in encoder(tokenizer)(texts)])
    vocabulary = tokenizer.get_vocab()
    produced = {token: int((ids == vocabulary[token]).sum()) for token in WHITESPACE_TOKENS if token in vocabulary}
    return Counts(len(texts), sum(len(text.encode()) for text in texts), len(ids), produced)


def read(corpus: str, split: str) -> list[str]:
    return list(open_corpus(DataConfig(path=corpus), split).texts())


def plain_demo_tokenizer(folder: str) -> PreTrainedTokenizerFast:
    tokenizer = load_tokenizer(folder)
    remove_added_tokens(tokenizer, set(WHITESPACE_TOKENS))
    return tokenizer


def read_gpt2(folder: str) -> PreTrainedTokenizerFast:
    merges = (Path(folder) / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    vocabulary = json.loads((Path(folder) / "encoder.json").read_text(encoding="utf-8"))
    return gpt2_tokenizer(vocabulary, [merge.split(" ") for merge in merges if merge])


def tokens(corpus: str = "demo/corpus", tokenizer: str = "demo/tokenizer", gpt2: str = "") -> None:
    """Print the counts of the validation split for each tokenizer and matching."""
    texts = read(corpus, "validation")
    print(f"validation split: {len(texts)} documents, {sum(len(text.encode()) for text in texts):,} bytes")
    makers: dict[str, Callable[[], PreTrainedTokenizerFast]] = {"demo": lambda: plain_demo_tokenizer(tokenizer)}
    if gpt2:
        makers["GPT-2"] = lambda: read_gpt2(gpt2)
    for name, make in makers.items():
        print(f"{name:8}{'no tokens':14}{count(make(), texts).row()}")
        for matching in ("first_listed", "longest"):
            extended = make()
            add_whitespace_tokens(extended, WHITESPACE_TOKENS, matching)
            print(f"{name:8}{matching:14}{count(extended, texts).row()}")


def train(steps: str) -> None:
    """Train every variant for `steps` steps, unless it is finished, and print their bits per byte."""
    if not Path(PLAIN).exists():
        plain_demo_tokenizer("demo/tokenizer").save_pretrained(PLAIN)
    for name, overrides in VARIANTS.items():
        length = [f"trainer.max_steps={steps}", f"optim.decay_steps={int(steps) - WARMUP}"]
        command = [sys.executable, "-m", "clippy_train.cli", "train", *SETTINGS, f"run.name=recipe-{name}"]
        subprocess.run([*command, *length, *overrides], check=True)
    curves = {name: curve(Path("runs") / f"recipe-{name}") for name in VARIANTS}
    least = min(num_bytes[-1] for num_bytes, _ in curves.values())
    print(f"after {steps} steps, and after {least / 1e6:.2f} MB of text:")
    for name, (num_bytes, bits) in curves.items():
        print(f"{name:24}{num_bytes[-1] / 1e6:6.2f} MB {bits[-1]:8.4f} {np.interp(least, num_bytes, bits):8.4f}")


def curve(run: Path) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of text trained and bits per byte at each validation of a run."""
    tokenizer, rows = load_tokenizer(run / "hf"), list(read_rows(run / "metrics.jsonl"))
    sample = read("demo/corpus", "train")
    counted = count(tokenizer, sample)
    with_ends = "no-end-of-text" not in run.name
    bytes_per_token = counted.num_bytes / (counted.tokens + (counted.documents if with_ends else 0))
    validations = [(row["step"], row["val/bits_per_byte"]) for row in rows if "val/loss" in row]
    steps, bits = (np.array(values, dtype=float) for values in zip(*validations, strict=True))
    tokens_per_step = next(row["tokens"] / row["step"] for row in rows if "tokens" in row)
    return steps * tokens_per_step * bytes_per_token, bits


if __name__ == "__main__":
    commands: dict[str, Callable[..., None]] = {"tokens": tokens, "train": train}
    commands[sys.argv[1]](*sys.argv[2:])
