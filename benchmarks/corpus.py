"""Building a corpus in figures: speed per core and with two workers, memory, and two other ways to the same end.

    python benchmarks/corpus.py [SRC...]     `make bench-corpus`: a quarter of an hour. CLIPPY_BENCH_MB=N: megabytes of
                                             text, 60 without; SRC without: the packages beside this Python's library

Every program reads the same JSON lines, drops near duplicates by MinHash, and writes what is left. `clippy corpus` also
drops exact ones, compares candidates directly, splits and shuffles; the others do not. datatrove gets our words, since
its own tokenizer is slower. Each prints one JSON object per row; the table, with date and versions, is written to
`benchmarks/corpus.md`. Seconds are those of the wall, and of all cores together; memory is the largest process, and all
of them, read every 50 ms. The programs take turns, so ratios hold on a machine that is not quite idle.
"""

import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from clippy_train.config import CorpusConfig, DedupConfig, FilterConfig
from clippy_train.corpus.build import build_corpus
from clippy_train.corpus.document import Rejected
from clippy_train.corpus.folders import file_documents, source_files

MEGABYTES = int(os.environ.get("CLIPPY_BENCH_MB", "60"))
SHARDS = 8
ROUNDS = 2
PERMUTATIONS, SHINGLE, THRESHOLD = 112, 5, 0.7  # datatrove's 14 buckets of 8
POLL_SECONDS = 0.05
_WORD = re.compile(r"\w+")

Row = dict[str, Any]


def ours(data: Path, out: Path, workers: int, near: bool) -> None:
    dedup = DedupConfig(near=near, permutations=PERMUTATIONS, threshold=THRESHOLD)
    build_corpus(CorpusConfig(hub=str(data), out=str(out), workers=workers, dedup=dedup, filter=FilterConfig()))


def datatrove(data: Path, out: Path, workers: int) -> None:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter
    from datatrove.pipeline.dedup import MinhashDedupSignature as Signature
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Words(WordTokenizer):  # type: ignore[misc]
        def word_tokenize(self, text: str) -> list[str]:
            return _WORD.findall(text)

        def sent_tokenize(self, text: str) -> list[str]:
            return [text]

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            return [match.span() for match in _WORD.finditer(text)]

    def run(name: str, tasks: int, *steps: Any) -> None:
        LocalPipelineExecutor(
            list(steps), tasks, workers, str(out / "logs" / name), start_method="fork"
        ).run()  # a class of this function cannot be sent to a forkserver

    signatures, buckets, removed = (str(out / name) for name in ("signatures", "buckets", "removed"))
    run("signatures", SHARDS, JsonlReader(str(data)), Signature(signatures, language=Words()))
    run("buckets", 14, MinhashDedupBuckets(signatures, buckets))
    run("cluster", 1, MinhashDedupCluster(buckets, removed))
    run("filter", SHARDS, JsonlReader(str(data)), MinhashDedupFilter(removed), JsonlWriter(str(out / "kept")))


def datasets_and_datasketch(data: Path, out: Path, workers: int) -> None:
    import datasets
    from datasketch import MinHash, MinHashLSH

    datasets.disable_progress_bars()

    def signature(row: Row) -> Row:
        words = _WORD.findall(row["text"])
        sketch = MinHash(PERMUTATIONS)
        sketch.update_batch(
            {" ".join(words[i : i + SHINGLE]).encode() for i in range(max(1, len(words) - SHINGLE + 1))}
        )
        return {"hashes": sketch.hashvalues}

    rows = datasets.load_dataset("json", data_files=str(data / "*.jsonl"), split="train", cache_dir=str(out / "cache"))
    rows = rows.map(signature, num_proc=workers)
    index, kept = MinHashLSH(THRESHOLD, PERMUTATIONS), []
    for number, hashes in enumerate(rows["hashes"]):
        sketch = MinHash(hashvalues=hashes, scheme="affine32")
        if not index.query(sketch):
            index.insert(number, sketch)
            kept.append(number)
    rows.select(kept).remove_columns("hashes").to_json(out / "kept.jsonl", num_proc=workers)


PROGRAMS: dict[str, Any] = {
    "clippy corpus, exact, 1 worker": lambda data, out: ours(data, out, 1, near=False),
    "clippy corpus, exact, 2 workers": lambda data, out: ours(data, out, 2, near=False),
    "clippy corpus, near, 1 worker": lambda data, out: ours(data, out, 1, near=True),
    "clippy corpus, near, 2 workers": lambda data, out: ours(data, out, 2, near=True),
    "datatrove MinHash, 2 workers": lambda data, out: datatrove(data, out, 2),
    "datasets.map and datasketch, 2 processes": lambda data, out: datasets_and_datasketch(data, out, 2),
}


@dataclass
class Usage:
    """What the processes of a program take."""

    seconds: float = 0.0
    core_seconds: dict[int, float] = field(default_factory=dict)
    largest: int = 0
    together: int = 0

    def look(self, program: psutil.Process) -> None:
        sizes = []
        for process in [program, *program.children(recursive=True)]:
            try:
                times = process.cpu_times()
                sizes.append(process.memory_info().rss)
                self.core_seconds[process.pid] = times.user + times.system
            except psutil.Error:
                continue
        self.largest, self.together = max(self.largest, *sizes, 0), max(self.together, sum(sizes))


def measured(name: str, data: Path, work: Path) -> Usage:
    """Run a program in a process of its own."""
    with tempfile.TemporaryDirectory(dir=work) as out:
        command = [sys.executable, __file__, "--program", name, str(data), str(Path(out, "out"))]
        usage, begin = Usage(), time.perf_counter()
        with (work / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as started:
            while started.poll() is None:
                try:
                    usage.look(psutil.Process(started.pid))
                except psutil.Error:
                    continue
                time.sleep(POLL_SECONDS)
        if started.returncode:
            raise SystemExit(f"{name} failed:\n{(work / 'log').read_text()[-3000:]}")
        usage.seconds = time.perf_counter() - begin
    return usage


def save_texts(sources: list[Path], data: Path) -> int:
    """Write the first `MEGABYTES` of text as `SHARDS` shards of JSON lines; returns the bytes of text."""
    data.mkdir()
    size, files = 0, [(data / f"{number}.jsonl").open("w") for number in range(SHARDS)]
    for number, (repository, text) in enumerate(texts(sources)):
        print(json.dumps({"text": text, "repo_name": repository, "id": str(number)}), file=files[number % SHARDS])
        size += len(text.encode())
        if size >= MEGABYTES * 1e6:
            break
    for file in files:
        file.close()
    return size


def texts(sources: list[Path]) -> Iterator[tuple[str, str]]:
    rules = FilterConfig(min_bytes=64, max_bytes=1_000_000)
    for document in file_documents(source_files(sources, Path.home()), rules):
        try:
            yield document.repository, document.read()[0]
        except Rejected:
            continue


def main(sources: list[Path]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        size = save_texts(sources, work / "data")
        runs: dict[str, list[Usage]] = {name: [] for name in PROGRAMS}
        for _ in range(ROUNDS):
            for name, usages in runs.items():
                usages.append(measured(name, work / "data", work))
    rows = [row(name, usages, size) for name, usages in runs.items()]
    for each in rows:
        print(json.dumps(each))
    Path(__file__).with_suffix(".md").write_text(table(rows, size))


def row(name: str, usages: list[Usage], size: int) -> Row:
    cores = median(sum(usage.core_seconds.values()) for usage in usages)
    return {
        "what": name,
        "seconds": round(median(usage.seconds for usage in usages), 1),
        "core seconds": round(cores, 1),
        "MB/s per core": round(size / 1e6 / cores, 2),
        "largest process, MB": round(max(usage.largest for usage in usages) / 1e6),
        "all processes, MB": round(max(usage.together for usage in usages) / 1e6),
    }


def table(rows: list[Row], size: int) -> str:
    packages = ("datatrove", "datasets", "datasketch", "numpy")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
    cells: list[list[Any]] = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    lines = "\n".join(f"| {' | '.join(map(str, row))} |" for row in cells)
    return (
        f"# Building a corpus\n\n`make bench-corpus`, {date.today()}, {os.cpu_count()} x86-64 cores, {versions}: "
        f"{size / 1e6:.0f} MB of text, medians of {ROUNDS} rounds that took turns, memory the most of them.\n\n"
        f"{lines}\n"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--program"]:
        PROGRAMS[sys.argv[2]](*map(Path, sys.argv[3:]))
    else:
        main([Path(each) for each in sys.argv[1:]] or [Path(sysconfig.get_path("purelib"))])
