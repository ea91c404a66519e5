"""The input pipeline in figures: speed against its limit and other loaders, time to the first batch, mixing.

    python benchmarks/data.py speed     `make bench`: minutes. CLIPPY_GPT2_BPE=DIR uses GPT-2's own tokenizer
    python benchmarks/data.py resume    time to the first batch at deep cursors
    python benchmarks/data.py mixing    how far apart the documents of a repository are trained

Each prints one JSON object per row and writes its table, with date and versions, to `benchmarks/data-NAME.md`; all
other files are temporary. Rounds are interleaved and figures are medians, so ratios hold on a machine that is not quite
idle. Rows for one core count CPU seconds of the process with all its threads; rows with loader processes wall seconds.
"""

import os

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}

import hashlib
import json
import platform
import re
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from importlib import metadata
from itertools import chain, count, cycle, takewhile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import zstandard
from datasets import load_dataset
from tokenizers import Tokenizer
from torch.utils.data import DataLoader
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast, default_data_collator

from clippy_train.compose import compose
from clippy_train.config import WHITESPACE_TOKENS, CorpusConfig, DataConfig, TrainConfig
from clippy_train.corpus.build import build_corpus
from clippy_train.data.objectives import LeftToRight
from clippy_train.data.stream import Cursor, Stream
from clippy_train.shards.format import SUFFIX
from clippy_train.shards.sources import open_corpus
from clippy_train.tokenizer import add_fim_tokens, add_whitespace_tokens, load_tokenizer, train_bpe
from clippy_train.train.callbacks.progress import fresh_cursors
from clippy_train.train.data import DataModule

SEQ_LEN, MICRO_BATCH = 2048, 8  # the recipe's
ROUNDS = 4

Row = dict[str, Any]
Source = Iterator[int]  # tokens of each batch, endless


def speed(work: Path) -> list[Row]:
    """Documents and tokens per second from shards to batches, end to end and in parts."""
    folder = standard_library_corpus(work, shard_bytes=500_000, shards=16)
    name = save_tokenizer(work, folder)
    texts = read_texts(folder)
    core = load_tokenizer(name).backend_tokenizer
    num_tokens = sum(len(each) + 1 for each in core.encode_batch_fast(texts))

    sources = {
        "tokenizer alone, texts in memory, 16 at once": tokenizer_only(core, texts, 16),
        "tokenizer alone, texts in memory, 256 at once": tokenizer_only(core, texts, 256),
        "end to end": our_loader(folder, name, 0),
        "end to end, fill-in-the-middle": our_loader(folder, name, 0, "data.fim_rate=0.5"),
        "datasets: streaming, map(tokenize), group_texts": datasets_loader(folder, name),
        "the original's loader": original_loader(folder, name),
        "end to end, 1 loader process": our_loader(folder, name, 1),
        "end to end, 2 loader processes": our_loader(folder, name, 2),
    }
    seconds = interleaved(sources, num_tokens)
    rows: list[Row] = [
        {
            "what": what,
            "clock": "wall" if "process" in what else "cpu",
            "documents_per_s": round(len(texts) / median(taken)),
            "tokens_per_s": round(num_tokens / median(taken)),
        }
        for what, taken in seconds.items()
    ]
    alone_16, alone_256, end_to_end, fim, datasets, flax, one_loader, two_loaders = sources
    ratios = {
        "end to end / tokenizer alone, its best": (ratio(seconds, end_to_end, alone_16, alone_256), 0.85),
        "fill-in-the-middle / end to end": (ratio(seconds, fim, end_to_end), 0.97),
        "end to end / datasets": (ratio(seconds, end_to_end, datasets), 1.0),
        "end to end / the original's loader": (ratio(seconds, end_to_end, flax), None),
        "2 loader processes / 1": (ratio(seconds, two_loaders, one_loader), 1.7),
    }
    rows.append(time_reading(folder))
    rows += [{"what": what, "ratio": round(value, 3), "bar": bar} for what, (value, bar) in ratios.items()]
    return [*rows, time_opening(work / "many", texts)]


def interleaved(sources: dict[str, Source], num_tokens: int) -> dict[str, list[float]]:
    """Seconds per `num_tokens` of each source, in each round after the first."""
    taken: dict[str, list[float]] = {what: [] for what in sources}
    for number in range(ROUNDS + 1):
        for what, source in sources.items():
            clock = time.perf_counter if "process" in what else time.process_time
            if "process" in what:
                take(source, num_tokens)  # skip what was prefetched during the other sources' turns
            started = clock()
            done = take(source, num_tokens)
            if number:
                taken[what].append((clock() - started) * num_tokens / done)
    return taken


def take(source: Source, num_tokens: int) -> int:
    """Consume at least `num_tokens`; return how many."""
    done = 0
    while done < num_tokens:
        done += next(source)
    return done


def ratio(seconds: dict[str, list[float]], what: str, *others: str) -> float:
    """How many times as fast `what` is as the fastest of `others`: median over the rounds."""
    rounds = zip(seconds[what], *(seconds[other] for other in others), strict=True)
    ratios: list[float] = [min(times) / own for own, *times in rounds]
    return median(ratios)


def tokenizer_only(core: Tokenizer, texts: list[str], size: int) -> Source:
    while True:
        for begin in range(0, len(texts), size):
            encodings = core.encode_batch_fast(texts[begin : begin + size], add_special_tokens=False)
            yield sum(len(each) + 1 for each in encodings)  # + 1: the end-of-text, as in the other sources


def our_loader(folder: Path, name: str, num_workers: int, *overrides: str) -> Source:
    settings = train_config(folder, name, 16, f"data.num_workers={num_workers}", *overrides)
    tokenizer = load_tokenizer(name)
    add_fim_tokens(tokenizer, settings.fim_tokens)
    for batch in DataModule(settings, tokenizer, 0, fresh_cursors(16)).train_dataloader():
        yield batch["input_ids"].numel()


def datasets_loader(folder: Path, name: str) -> Source:
    """As in transformers' run_clm.py."""
    tokenizer = load_tokenizer(name)

    def tokenize(examples: dict[str, list[str]]) -> Any:
        return tokenizer(examples["text"])

    def group_texts(examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
        joined = {key: list(chain(*examples[key])) for key in examples}
        total = len(joined["input_ids"]) // SEQ_LEN * SEQ_LEN
        cut = {key: [ids[i : i + SEQ_LEN] for i in range(0, total, SEQ_LEN)] for key, ids in joined.items()}
        return cut | {"labels": cut["input_ids"].copy()}

    tokens = streamed(folder).map(tokenize, batched=True, remove_columns=["text", "meta"])
    blocks = tokens.map(group_texts, batched=True)
    while True:
        for batch in DataLoader(blocks, batch_size=MICRO_BATCH, collate_fn=default_data_collator):
            yield batch["input_ids"].numel()


def original_loader(folder: Path, name: str) -> Source:
    """Documents tokenised one at a time, shuffled in a buffer of 1000, joined and cut; the rest is carried over."""
    tokenizer = load_tokenizer(name)
    tokens = streamed(folder).map(lambda example: tokenizer(example["text"]), remove_columns=["text", "meta"])
    pending: list[int] = []
    size = MICRO_BATCH * SEQ_LEN
    for epoch in count():
        for example in tokens.shuffle(seed=epoch, buffer_size=1000):
            pending += example["input_ids"]
            while len(pending) >= size:
                yield np.array(pending[:size]).reshape(MICRO_BATCH, SEQ_LEN).size
                del pending[:size]


def streamed(folder: Path) -> Any:
    return load_dataset("json", data_files=str(folder / "train" / f"*{SUFFIX}"), split="train", streaming=True)


def time_reading(folder: Path) -> Row:
    started = time.process_time()
    texts = read_texts(folder)
    seconds = time.process_time() - started
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    return {
        "what": "reading alone",
        "clock": "cpu",
        "documents_per_s": round(len(texts) / seconds),
        "megabytes_per_s": round(megabytes / seconds),
    }


def time_opening(folder: Path, texts: list[str]) -> Row:
    write_shards(folder / "train", texts, 10_000, 20_000)
    started = time.perf_counter()
    open_corpus(DataConfig(path=str(folder)), "train")
    return {
        "what": "opening 10,000 shards",
        "clock": "wall",
        "seconds": round(time.perf_counter() - started, 2),
        "bar": 2,
    }


@dataclass(frozen=True)
class Setup:
    """A corpus, of which one of `ranks` reads its share."""

    shards: int
    shard_bytes: int  # of text
    streams: int
    ranks: int


def resume(work: Path) -> list[Row]:
    """Seconds from building one rank's DataModule to its first batch, without loader processes."""
    corpus = standard_library_corpus(work, shard_bytes=8_000_000, shards=4)
    name, texts = save_tokenizer(work, corpus), read_texts(corpus)
    rows = []
    for setup in (
        Setup(64, 16_000_000, streams=64, ranks=8),
        Setup(10_000, 20_000, streams=64, ranks=8),
        Setup(1, 1_000_000_000, streams=64, ranks=8),
        Setup(1, 1_000_000_000, streams=1, ranks=1),
    ):
        folder = work / f"{setup.shards}-{setup.streams}"
        lines = write_shards(folder / "train", texts, setup.shards, setup.shard_bytes)
        settings = train_config(folder, name, setup.streams, f"trainer.devices={setup.ranks}", "data.num_workers=0")
        parts_of_stream = max(1, setup.shards // setup.streams)
        deep = Cursor(part=parts_of_stream * 9 // 10, line=lines * 9 // 10)
        for place, cursor in (("start", Cursor()), ("at 90 %", deep)):
            taken = [first_batch(settings, name, cursor) for _ in range(3)]
            seconds, cpu_seconds = (round(median(each), 2) for each in zip(*taken, strict=True))
            rows.append({**asdict(setup), "place": place, "seconds": seconds, "cpu_seconds": cpu_seconds})
    return rows


def first_batch(settings: TrainConfig, name: str, cursor: Cursor) -> tuple[float, float]:
    """Wall and CPU seconds; they differ if the machine is busy or its disk is slow."""
    tokenizer = load_tokenizer(name)
    cursors = np.tile(np.array(cursor), (settings.data.streams, 1))
    started = time.perf_counter(), time.process_time()
    next(iter(DataModule(settings, tokenizer, 0, cursors).train_dataloader()))
    return time.perf_counter() - started[0], time.process_time() - started[1]


def mixing(work: Path) -> list[Row]:
    """How often files of one repository meet in an epoch: as neighbours in a stream, and as pairs in a global batch.

    5,000 repositories with a median of 7 files and a mean of 20 (log-normal); steps of 1024 files, 16 from each of 64
    streams. A pair of a batch is any two of its files.
    """
    sizes = np.maximum(1, np.random.RandomState(0).lognormal(2, 1.4, 5000)).astype(int)
    repository = np.repeat(np.arange(len(sizes)), sizes)
    texts = [f"{number} = '{hashlib.sha512(b'%d' % number).hexdigest()}'\n" for number in range(len(repository))]
    for number, text in enumerate(texts):
        path = work / "tree" / f"r{repository[number]}" / f"f{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    build_corpus(CorpusConfig(src=[str(work / "tree")], out=str(work / "corpus"), shard_bytes=250_000))
    for shards in (128, 8):
        for index, numbers in enumerate(np.array_split(np.arange(len(texts)), shards)):
            with shard_writer(work / f"{shards}" / "train" / f"{index:05d}{SUFFIX}") as writer:
                writer.write(b"".join(json_line(texts[number]) for number in numbers))

    def row(what: str, order: np.ndarray) -> Row:
        """`order`: file numbers `[stream, turn]`."""
        return {"what": what, **repository_shares(repository[order])}

    everything = np.random.RandomState(0).permutation(len(texts))
    return [
        row("uniform shuffle", everything[: len(texts) // 64 * 64].reshape(64, -1)),
        row("`clippy corpus`, window 256", epoch_of_files(work / "corpus", 256)),
        *(
            row(f"{shards} unshuffled shards, window {window}", epoch_of_files(work / f"{shards}", window))
            for shards in (8, 128)
            for window in (1, 256, 1024)
        ),
        row("128 unshuffled shards, the original's buffer", original_order(len(texts), 128)),
    ]


def epoch_of_files(folder: Path, window: int) -> np.ndarray:
    corpus = open_corpus(DataConfig(path=str(folder)), "train")
    numbers = LeftToRight(lambda texts: [[int(text.split()[0])] for text in texts])
    streams = [Stream(corpus, numbers, 1, index, 64, window=window) for index in range(64)]
    epochs = [list(takewhile(lambda block: block.spans[0].epoch == 0, stream.blocks())) for stream in streams]
    turns = min(map(len, epochs))
    return np.array([[int(block.tokens[0]) for block in blocks[:turns]] for blocks in epochs])


def original_order(num_files: int, shards: int) -> np.ndarray:
    """Shards in random order, shuffled in a buffer of 1000 files and cut into batches of 16 turns: `[64, turns]`."""
    random = np.random.RandomState(0)
    pieces = np.array_split(np.arange(num_files), shards)
    files = np.concatenate([pieces[i] for i in random.permutation(shards)])
    buffer, order = list(files[:1000]), []
    for file in files[1000:]:
        chosen = random.randint(1000)
        order.append(buffer[chosen])
        buffer[chosen] = file
    batches = np.array(order[: len(order) // 1024 * 1024]).reshape(-1, 64, 16)
    return batches.transpose(1, 0, 2).reshape(64, -1)


def repository_shares(repositories: np.ndarray) -> Row:
    """Shares of neighbours and pairs of one repository; `repositories`: `[stream, turn]`."""
    batches = [repositories[:, turn : turn + 16].ravel() for turn in range(0, repositories.shape[1] - 15, 16)]
    pairs = [(np.unique(batch, return_counts=True)[1], batch.size) for batch in batches]
    return {
        "neighbours": round(float(np.mean(repositories[:, 1:] == repositories[:, :-1])), 4),
        "pairs_of_a_batch": round(float(np.mean([(c * (c - 1)).sum() / (n * (n - 1)) for c, n in pairs])), 5),
    }


def train_config(folder: Path, tokenizer: str, streams: int, *overrides: str) -> TrainConfig:
    return compose(
        TrainConfig,
        [
            "experiment=code_clippy_125m",
            "trainer.accelerator=cpu",
            "trainer.devices=1",
            f"trainer.micro_batch_size={MICRO_BATCH}",
            f"data.path={folder}",
            f"tokenizer.base={tokenizer}",
            f"data.seq_len={SEQ_LEN}",
            f"data.streams={streams}",
            *overrides,
        ],
    )


def standard_library_corpus(work: Path, shard_bytes: int, shards: int) -> Path:
    """The first shards that `clippy corpus` makes of this Python's standard library."""
    folder = work / "corpus"
    build_corpus(CorpusConfig(src=[sysconfig.get_path("stdlib")], out=str(folder), shard_bytes=shard_bytes))
    for path in sorted((folder / "train").iterdir())[shards:]:
        path.unlink()
    return folder


def save_tokenizer(work: Path, corpus: Path) -> str:
    """GPT-2's tokenizer if its files are available, else the demo's; with the whitespace tokens."""
    source = os.environ.get("CLIPPY_GPT2_BPE")
    tokenizer: PreTrainedTokenizerFast
    if source:
        merges = Path(source, "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
        vocabulary = json.loads(Path(source, "encoder.json").read_text(encoding="utf-8"))
        pairs: Any = [tuple(merge.split(" ")) for merge in merges if merge]  # GPT2Tokenizer declares `list[str]`
        tokenizer = GPT2Tokenizer(vocab=vocabulary, merges=pairs)
    else:
        tokenizer = train_bpe(read_texts(corpus), vocab_size=4096, model_max_length=SEQ_LEN)
    tokenizer.model_max_length = 10**9  # no warning about long documents
    add_whitespace_tokens(tokenizer, WHITESPACE_TOKENS, "longest")
    tokenizer.save_pretrained(work / "tokenizer")
    return str(work / "tokenizer")


def read_texts(folder: Path) -> list[str]:
    return list(open_corpus(DataConfig(path=str(folder)), "train").texts())


def write_shards(folder: Path, texts: list[str], shards: int, shard_bytes: int) -> int:
    """Shards of about `shard_bytes` of text each, from repeated texts; return the number of lines in the last one."""
    source = cycle(texts)
    for number in range(shards):
        size = lines = 0
        with shard_writer(folder / f"{number:05d}{SUFFIX}") as writer:
            while size < shard_bytes:
                size += writer.write(json_line(next(source)))
                lines += 1
    return lines


@contextmanager
def shard_writer(path: Path) -> Iterator[Any]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file, zstandard.ZstdCompressor(level=1, write_checksum=True).stream_writer(file) as writer:
        yield writer


def json_line(text: str) -> bytes:
    return json.dumps({"text": text}).encode() + b"\n"


def report(name: str, command: str, rows: list[Row]) -> None:
    """Print the rows, and write them as a table with the environment."""
    for row in rows:
        print(json.dumps({"bench": f"data {name}", **row}))
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = [columns, ["---"] * len(columns), *([_shown(row.get(key)) for key in columns] for row in rows)]
    lines = [f"| {' | '.join(cells)} |" for cells in table]
    text = "\n".join([f"# Data: {name}", "", environment(command), "", *lines, ""])
    (Path(__file__).parent / f"data-{name}.md").write_text(text)


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def environment(command: str) -> str:
    packages = ("tokenizers", "transformers", "datasets", "zstandard", "torch")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return (
        f"`{command}`, {date.today()}; {os.cpu_count()} cores ({model[1] if model else platform.machine()}), no GPU; "
        f"Python {platform.python_version()}, {versions}; tokenizer: "
        f"{'GPT-2' if os.environ.get('CLIPPY_GPT2_BPE') else 'byte-level BPE of 4096'} with whitespace tokens."
    )


def main(name: str) -> None:
    with tempfile.TemporaryDirectory() as work:
        rows = {"speed": speed, "resume": resume, "mixing": mixing}[name](Path(work))
    report(name, f"python benchmarks/data.py {name}", rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
