"""`clippy demo`: the whole pipeline on the source code of this Python, on two CPU processes, in minutes.

A step whose result exists is skipped, so a second call continues, or reports that everything is done.
"""

import json
import time
from pathlib import Path

from clippy_train.compose import compose
from clippy_train.config import (
    CorpusConfig,
    DataConfig,
    DemoConfig,
    ExportConfig,
    GenerateConfig,
    TokenizerConfig,
    TrainConfig,
)
from clippy_train.corpus.build import build_corpus
from clippy_train.files import new_folder
from clippy_train.generate import generate
from clippy_train.hf.export import export_run
from clippy_train.launch.start import train
from clippy_train.model.flops import count_parameters
from clippy_train.report import print_table
from clippy_train.run.folder import HF_FOLDER, METRICS
from clippy_train.run.rows import read_rows
from clippy_train.shards.sources import MANIFEST, open_corpus
from clippy_train.tokenizer import add_whitespace_tokens, load_tokenizer, train_bpe

EXTENSIONS = [".py", ".c", ".h"]


def demo(config: DemoConfig) -> int:
    """Run all steps and print a table of results; return the exit code."""
    started = time.monotonic()
    root = Path(config.root)
    corpus, tokenizer = root / "corpus", root / "tokenizer"
    run = compose(
        TrainConfig,
        ["experiment=demo", f"run.name={root.resolve().name}", f"data.path={corpus}", f"tokenizer.base={tokenizer}"],
    )
    if not corpus.exists():
        _announce("corpus", corpus)
        extensions = "[" + ",".join(EXTENSIONS) + "]"
        build_corpus(compose(CorpusConfig, [f"out={corpus}", f"filter.extensions={extensions}"]))
    if not tokenizer.exists():
        _announce("tokenizer", tokenizer)
        make_tokenizer(corpus, tokenizer, config.vocab_size, run.tokenizer, run.model.max_position_embeddings)
    _announce("training", run.run_dir)
    code = train(run)
    if code:
        return code
    model = run.run_dir / "model"
    if not model.exists():
        _announce("export", model)
        export_run(compose(ExportConfig, [f"run={run.run_dir}", f"out={model}"]))
    prompt = config.prompt
    completion = generate(GenerateConfig(model=str(model), prompt=prompt, max_new_tokens=64, temperature=0.7), prompt)[
        0
    ]
    print_table("clippy demo", [*results(run, corpus), ("seconds (this call)", f"{time.monotonic() - started:.0f}")])
    print(f"{prompt}{completion}")
    return 0


def make_tokenizer(corpus: Path, out: Path, vocab_size: int, settings: TokenizerConfig, max_length: int) -> None:
    """Train a byte-level BPE on the training split and add the whitespace tokens, as `clippy extend` does."""
    texts = open_corpus(DataConfig(path=str(corpus)), "train").texts()
    with new_folder(out, "root") as folder:
        tokenizer = train_bpe(texts, vocab_size, max_length)
        add_whitespace_tokens(tokenizer, settings.whitespace_tokens, settings.matching)
        tokenizer.save_pretrained(folder)


def results(run: TrainConfig, corpus: Path) -> list[tuple[str, str]]:
    """Rows of the table: what a finished run achieved, from its metrics."""
    manifest = json.loads((corpus / MANIFEST).read_text())
    rows = list(read_rows(run.run_dir / METRICS))
    training = [row for row in rows if "train/loss" in row]
    validation = [row for row in rows if "val/loss" in row]
    speeds = sorted(row["throughput/tokens_per_sec"] for row in training)
    first, last = validation[0], validation[-1]
    fall = 1 - last["val/bits_per_byte"] / first["val/bits_per_byte"]
    return [
        ("corpus", f"{manifest['documents']:,} files, {manifest['text_bytes'] / 1e6:.1f} MB"),
        ("parameters", f"{count_parameters(run, len(load_tokenizer(run.run_dir / HF_FOLDER))):,}"),
        ("steps", f"{last['step']}, {training[-1]['tokens']:,} tokens"),
        ("train loss", f"{training[0]['train/loss']:.3f} -> {training[-1]['train/loss']:.3f}"),
        ("validation loss", f"{first['val/loss']:.3f} -> {last['val/loss']:.3f}"),
        ("bits per byte", f"{first['val/bits_per_byte']:.3f} -> {last['val/bits_per_byte']:.3f} ({fall:.0%} less)"),
        ("tokens/s (median)", f"{speeds[len(speeds) // 2]:,.0f}"),
        ("run folder", str(run.run_dir)),
        ("watch it", f"tensorboard --logdir {run.run_dir}"),
    ]


def _announce(stage: str, where: Path) -> None:
    print(f"== {stage}: {where}", flush=True)
