"""Where shards are: the same corpus from a folder, a pattern, a server or a dataset, and the errors of each."""

import contextlib
import gc
import gzip
import io
import itertools
import json
import logging
import os
import random
import re
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zstandard

from clippy_train.config import DataConfig, FilterConfig, TrainConfig
from clippy_train.data.stream import Cursor
from clippy_train.errors import DataError
from clippy_train.run.identity import data_identity
from clippy_train.shards import format as shard_format
from clippy_train.shards import retry, sources
from clippy_train.shards.format import ShardWriter
from clippy_train.shards.retry import ATTEMPTS
from clippy_train.shards.sources import Corpus, open_corpus, require_text
from clippy_train.tokenizer import load_tokenizer
from clippy_train.train.data import DataModule

TEXTS = [f"document {number}: {random.Random(number).randbytes(37 * number % 101).hex()}" for number in range(120)]

Line = tuple[int, str | None, str]  # number, text, reason


def opened(path: Path | str, split: str = "train", **settings: Any) -> Corpus:
    return open_corpus(DataConfig(path=str(path), **settings), split)


def lines(corpus: Corpus, shard: int, *selection: int) -> list[Line]:
    """Lines of a shard; `selection` is start, stride and residue."""
    return [entry[:3] for entry in corpus.documents(shard, *selection)]


def all_lines(corpus: Corpus) -> list[list[Line]]:
    return [lines(corpus, shard) for shard in range(len(corpus.shards))]


def document(text: str, stars: int = 0) -> dict[str, Any]:
    return {"text": text, "meta": {"stars": stars, "file_name": "a.py"}}


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".jsonl": bytes,
    ".ndjson": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
}


def encoded(suffix: str, documents: list[dict[str, Any]]) -> bytes:
    """A shard in the format of its suffix; parquet in row groups of 10."""
    if suffix == ".parquet":
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(documents), sink, row_group_size=10)
        return sink.getvalue()
    return COMPRESS[Path(f"0{suffix}").suffix](b"".join(json.dumps(each).encode() + b"\n" for each in documents))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A corpus of 3 training and 1 validation shards with a manifest; shards of 40 documents."""
    root = tmp_path / "corpus"
    files = {}
    for split, texts in (("train", TEXTS), ("validation", TEXTS[:40])):
        writer = ShardWriter(root / split, shard_bytes=1 << 30)
        for number, text in enumerate(texts, 1):
            writer.write(json.dumps(document(text, stars=number)).encode())
            if number % 40 == 0:
                writer.close()
        files[split] = writer.files
    (root / "manifest.json").write_text(json.dumps({"files": files}))
    return root


# Folders and patterns


def test_shards_of_the_split_come_in_order_of_their_names(root: Path) -> None:
    (root / "train" / "notes.txt").write_text("not a shard")
    names = [Path(name).relative_to(root).as_posix() for name in opened(root, "train").shards]
    assert names == [f"train/0000{number}.jsonl.zst" for number in range(3)]


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.path=.*nowhere: no such folder.*clippy corpus"):
        opened(tmp_path / "nowhere", "train")


def test_a_split_without_shards_is_an_error(root: Path) -> None:
    shutil.rmtree(root / "validation")
    with pytest.raises(DataError, match=r"no shard with content in .*validation"):
        opened(root, "validation")


def test_a_split_of_empty_files_is_an_error(root: Path) -> None:
    for path in (root / "train").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"no shard with content"):
        opened(root, "train")


def test_the_fingerprint_depends_on_the_content_and_not_on_the_place(root: Path, tmp_path: Path) -> None:
    before = opened(root, "train").fingerprint
    shutil.copytree(root, tmp_path / "copy")
    os.utime(root / "train" / "00000.jsonl.zst", (0, 0))
    assert opened(tmp_path / "copy", "train").fingerprint == opened(root, "train").fingerprint == before


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "train/00001.jsonl.zst").write_bytes(b"another size"),
        lambda root: (root / "train/00001.jsonl.zst").rename(root / "train/00007.jsonl.zst"),
        lambda root: (root / "train/00001.jsonl.zst").unlink(),
        lambda root: (root / "manifest.json").write_text('{"seed": 1}'),
    ],
    ids=["size", "name", "number", "manifest"],
)
def test_the_fingerprint_changes_with_the_shards(root: Path, change: Callable[[Path], object]) -> None:
    before = opened(root, "train").fingerprint
    change(root)
    assert opened(root, "train").fingerprint != before


def test_splits_have_different_fingerprints(root: Path) -> None:
    assert opened(root, "train").fingerprint != opened(root, "validation").fingerprint


def test_a_split_may_have_another_name(root: Path) -> None:
    (root / "validation").rename(root / "held out")
    assert list(opened(root, "validation", validation_split="held out").texts()) == TEXTS[:40]


@pytest.mark.parametrize("pattern", ["{split}", "{split}/*", "{split}/*.jsonl.zst", "*/{split}/*.zst", "{split}-*.zst"])
def test_a_pattern_finds_the_shards_of_a_folder(root: Path, pattern: str) -> None:
    for path in list(root.glob("*/*.zst")) if pattern.startswith(("*/", "{split}-")) else []:
        other = root / ("deep/" + path.parent.name if pattern.startswith("*/") else ".")
        other.mkdir(parents=True, exist_ok=True)
        path.rename(other / (path.name if pattern.startswith("*/") else f"{path.parent.name}-{path.name}"))
    assert list(opened(root / pattern).texts()) == TEXTS
    assert list(opened(root / pattern, "validation").texts()) == TEXTS[:40]


def test_a_folder_may_have_any_name(root: Path) -> None:
    strange = root.rename(root.parent / "a[b]*? c::d")
    assert list(opened(strange).texts()) == TEXTS


def test_links_to_shards_are_followed(root: Path, tmp_path: Path) -> None:
    for path in sorted((root / "train").iterdir()):
        path.rename(tmp_path / path.name)
        path.symlink_to(tmp_path / path.name)
    assert list(opened(root).texts()) == TEXTS


def test_the_formats_hold_the_same_documents(tmp_path: Path) -> None:
    documents = [document(text) for text in TEXTS]
    for suffix in shard_format.SUFFIXES:
        (tmp_path / suffix / "train").mkdir(parents=True)
        (tmp_path / suffix / "train" / f"0{suffix}").write_bytes(encoded(suffix, documents))
        corpus = opened(tmp_path / suffix)
        for start, stride, residue in ((0, 1, 0), (25, 1, 0), (0, 7, 3), (33, 7, 2), (len(TEXTS), 1, 0)):
            wanted = [(i, t, "") for i, t in enumerate(TEXTS) if i >= start and i % stride == residue]
            assert lines(corpus, 0, start, stride, residue) == wanted, suffix


def test_formats_may_be_mixed_in_a_split(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    for number, suffix in enumerate(shard_format.SUFFIXES):
        (tmp_path / "train" / f"{number}{suffix}").write_bytes(encoded(suffix, [document(TEXTS[number])]))
    assert list(opened(tmp_path).texts()) == TEXTS[: len(shard_format.SUFFIXES)]


@pytest.mark.slow
def test_ten_thousand_shards_are_opened_in_two_seconds(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    shard = encoded(".jsonl.zst", [document("x")])
    for number in range(10_000):
        (tmp_path / "train" / f"{number:05d}.jsonl.zst").write_bytes(shard)
    started = time.process_time()
    corpus = opened(tmp_path)
    assert lines(corpus, 9_999) == [(0, "x", "")]
    assert time.process_time() - started < 2
    assert len(corpus.shards) == 10_000


# Filters and bad lines


@pytest.mark.parametrize("suffix", shard_format.SUFFIXES)
@pytest.mark.parametrize("manifest", [True, False])
def test_a_damaged_shard_counts_with_all_its_lost_documents(tmp_path: Path, suffix: str, manifest: bool) -> None:
    (tmp_path / "train").mkdir()
    names = [f"train/{number}{suffix}" for number in range(4)]
    for name in names:
        (tmp_path / name).write_bytes(encoded(suffix, [document(text) for text in TEXTS]))
    if manifest:
        files = {"train": [{"name": name, "documents": len(TEXTS), "bytes": 0} for name in names]}
        (tmp_path / "manifest.json").write_text(json.dumps({"files": files}))
    for name in (names[0], names[2]):
        size = (tmp_path / name).stat().st_size
        (tmp_path / name).write_bytes(b"\xff" * (size - 1) + b"\n")  # unreadable from the first byte on
    corpus = opened(tmp_path)
    lost = [sum(entry.documents for entry in corpus.documents(shard) if entry.reason) for shard in range(4)]
    unreadable = len(TEXTS) if not suffix.endswith(shard_format.LINES) else 1  # plain text has no damage, but bad lines
    assert lost == [unreadable, 0, unreadable, 0]


def test_a_damaged_shard_counts_without_what_was_read_of_it(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    data = encoded(".parquet", [document(text) for text in TEXTS])
    (tmp_path / "train" / "0.parquet").write_bytes(data)
    lines = [json.dumps(document(text)).encode() + b"\n" for text in TEXTS]
    cut = zstandard.compress(b"".join(lines[:30])) + zstandard.compress(b"".join(lines[30:]))[:-9]
    (tmp_path / "train" / "1.jsonl.zst").write_bytes(cut)
    files = {"train": [{"name": "train/1.jsonl.zst", "documents": len(TEXTS), "bytes": 0}]}
    (tmp_path / "manifest.json").write_text(json.dumps({"files": files}))
    entries = list(opened(tmp_path).documents(1))
    assert sum(entry.documents for entry in entries) == len(TEXTS)
    assert entries[-1].documents == len(TEXTS) - len(entries) + 1


@pytest.mark.parametrize("suffix", shard_format.SUFFIXES)
def test_excluded_documents_are_counted_by_rule(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "train").mkdir()
    documents = [document("a", stars=1), document("b", stars=5), document("a longer text", stars=9)]
    (tmp_path / "train" / f"0{suffix}").write_bytes(encoded(suffix, documents))
    found = all_lines(opened(tmp_path, filter=FilterConfig(min_stars=5, max_bytes=5)))
    assert found == [[(0, None, "filtered/few_stars"), (1, "b", ""), (2, None, "filtered/too_large")]]


@pytest.mark.parametrize("suffix", [".jsonl.zst", ".parquet"])
def test_documents_of_others_are_cleaned_as_they_are_read(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "opted_out.txt").write_text("octo/cat\n")
    documents = [
        {"text": text, "meta": {"repo_name": name}} for text, name in (("by jo@example.org", "a/b"), ("b", "octo/cat"))
    ]
    (tmp_path / "train" / f"0{suffix}").write_bytes(encoded(suffix, documents))
    rules = FilterConfig(opt_out=str(tmp_path / "opted_out.txt"), redact=["emails"])
    assert all_lines(opened(tmp_path, filter=rules)) == [[(0, "by <EMAIL>", ""), (1, None, "filtered/opted_out")]]


def test_the_identity_of_the_data_includes_the_rules(train_config: Callable[..., TrainConfig]) -> None:
    identities = [data_identity(train_config(*rules), []) for rules in ([], ["data.filter.min_stars=5"])]
    assert identities[0] != identities[1]


def test_rejections_are_logged_once_per_shard_without_content(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = root / "train/00001.jsonl.zst"
    lines = [b'{"text": 1, "secret": 2}', b"secret", b'{"text": "good", "meta": {"stars": 0}}', b"secret"]
    path.write_bytes(zstandard.compress(b"\n".join(lines)))
    caplog.set_level(logging.INFO, "clippy_train")
    assert list(opened(root, filter=FilterConfig(min_stars=1)).texts()) == TEXTS[:40] + TEXTS[80:]
    assert [record.message for record in caplog.records] == [f"{path}: lines skipped: not_json 2, no_text 1"]


def test_a_damaged_shard_is_a_warning(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = root / "train/00001.jsonl.zst"
    path.write_bytes(path.read_bytes()[:-1])
    assert len(list(opened(root).texts())) >= 80
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("WARNING", f"{path}: lines skipped: damaged_shard 1")
    ]


def test_a_corpus_without_a_usable_line_is_refused(root: Path) -> None:
    require_text(opened(root))
    for settings, reason in (
        ({"text_column": "code"}, r"no_text 120.*data\.text_column=code$"),
        ({"filter": FilterConfig(min_stars=1000)}, r"filtered/few_stars 120.*data\.filter"),
    ):
        with pytest.raises(DataError, match=reason):
            require_text(opened(root, **settings))


# Servers


@dataclass
class Server:
    """An HTTP server of a folder. `answer(path, number)` returns the fault of the n-th GET, "" for none."""

    folder: Path
    ranges: bool = True
    heads: bool = True
    answer: Callable[[str, int], str] = lambda path, number: ""
    gets: list[tuple[str, str | None]] = field(default_factory=list)
    url: str = ""


class Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, server: Server, *args: Any) -> None:
        self.settings = server
        super().__init__(*args, directory=str(server.folder))

    def do_HEAD(self) -> None:
        super().do_HEAD() if self.settings.heads else self.send_error(503)

    def do_GET(self) -> None:
        settings, wanted = self.settings, self.headers.get("Range")
        settings.gets.append((self.path, wanted))
        fault = settings.answer(self.path, len(settings.gets))
        path = Path(self.translate_path(self.path))
        if fault == "error":
            self.send_error(503)
        elif fault == "reset":
            self.close_connection = True
        elif not path.is_file():
            super().do_GET()
        else:
            self.send_file(path.read_bytes(), wanted, fault == "cut")

    def send_file(self, content: bytes, wanted: str | None, cut: bool) -> None:
        ranged = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted or "") if self.settings.ranges else None
        begin, end = (int(ranged[1]), int(ranged[2]) + 1) if ranged else (0, len(content))
        body = content[begin:end]
        self.send_response(206 if ranged else 200)
        if ranged:
            self.send_header("Content-Range", f"bytes {begin}-{begin + len(body) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = cut

    def end_headers(self) -> None:
        self.send_header("Accept-Ranges", "bytes" if self.settings.ranges else "none")
        super().end_headers()

    def log_message(self, *args: Any) -> None: ...


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    running = []

    def start(folder: Path, **settings: Any) -> Server:
        server = Server(folder, **settings)
        listener = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, server))
        server.url = f"http://127.0.0.1:{listener.server_port}"
        threading.Thread(target=listener.serve_forever, args=(0.01,), daemon=True).start()
        running.append(listener)
        return server

    yield start
    for listener in running:
        listener.shutdown()
        listener.server_close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses between attempts, and requests of 1000 bytes: several for each shard."""
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(shard_format, "READ_BYTES", 1000)


def every(number: int, fault: str) -> Callable[[str, int], str]:
    return lambda path, count: fault if count % number == 0 else ""


def delay(seconds: float, part: str = "") -> Callable[[str, int], str]:
    """Answer late where `part` is in the path."""

    def answer(path: str, number: int) -> str:
        if part in path:
            time.sleep(seconds)
        return ""

    return answer


@pytest.mark.slow
def test_a_server_has_the_same_corpus_as_its_folder(root: Path, serve: Callable[..., Server], quick: None) -> None:
    server = serve(root)
    local, remote = opened(root), opened(server.url)
    assert [name.removeprefix(server.url) for name in remote.shards] == [
        name.removeprefix(str(root)) for name in local.shards
    ]
    assert remote.fingerprint == local.fingerprint
    assert server.gets == [("/manifest.json", None)]
    assert all_lines(remote) == all_lines(local)
    assert sum(wanted is not None for _, wanted in server.gets) > len(remote.shards)


@pytest.mark.parametrize("pattern", ["", "/{split}", "/{split}/*.jsonl.zst"])
def test_without_a_manifest_the_listing_of_the_server_is_used(
    root: Path, serve: Callable[..., Server], pattern: str
) -> None:
    (root / "manifest.json").unlink()
    server = serve(root)
    remote = opened(server.url + pattern)
    assert remote.fingerprint == opened(root).fingerprint
    assert list(remote.texts()) == TEXTS


@pytest.mark.slow
@pytest.mark.parametrize("suffix", shard_format.SUFFIXES)
@pytest.mark.parametrize("fault", ["error", "reset", "cut"])
def test_failed_requests_are_retried(
    tmp_path: Path, serve: Callable[..., Server], quick: None, suffix: str, fault: str
) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / f"0{suffix}").write_bytes(encoded(suffix, [document(text) for text in TEXTS]))
    server = serve(tmp_path, answer=every(3, fault))
    assert list(opened(server.url).texts()) == TEXTS
    assert len(server.gets) > 6


@pytest.mark.slow
def test_a_slow_server_is_not_a_failure(root: Path, serve: Callable[..., Server], quick: None) -> None:
    server = serve(root, answer=delay(0.02))
    assert list(opened(server.url).texts()) == TEXTS


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["error", "reset"])
def test_a_shard_that_cannot_be_opened_at_once_is_not_taken_for_a_missing_one(
    root: Path, serve: Callable[..., Server], quick: None, fault: str
) -> None:
    failed: set[str] = set()

    def fail_once(path: str, number: int) -> str:
        new = path.endswith(".zst") and path not in failed
        failed.add(path)
        return fault if new else ""

    server = serve(root, heads=False, answer=fail_once)
    assert list(opened(server.url).texts()) == TEXTS
    (root / "train/00001.jsonl.zst").unlink()
    with pytest.raises(DataError, match=r"00001\.jsonl\.zst no longer exists"):
        list(opened(server.url).texts())


@pytest.mark.slow
def test_a_server_that_never_answers_is_an_error(
    root: Path, serve: Callable[..., Server], quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "REQUEST_SECONDS", 0.05)
    server = serve(root, answer=delay(0.3, "0000"))
    with pytest.raises(DataError, match=r"00000\.jsonl\.zst cannot be read: .*[Tt]imeout"):
        list(opened(server.url).texts())


def test_a_server_that_keeps_failing_is_an_error_after_bounded_attempts(
    root: Path, serve: Callable[..., Server], quick: None, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve(root, answer=lambda path, number: "error" if "00001" in path else "")
    with pytest.raises(DataError, match=rf"data\.path={server.url}/train: .*/00001\.jsonl\.zst cannot be read: .*503"):
        list(opened(server.url).texts())
    assert sum("00001" in path for path, _ in server.gets) == ATTEMPTS
    assert sum("next attempt in" in record.message for record in caplog.records) == ATTEMPTS - 1


def test_the_pauses_are_bounded() -> None:
    pauses = [retry.FIRST_PAUSE * 2**number + retry.FIRST_PAUSE for number in range(ATTEMPTS - 1)]
    assert sum(pauses) < 30


def test_a_missing_shard_is_an_error_at_once(root: Path, serve: Callable[..., Server]) -> None:
    server = serve(root)
    remote = opened(server.url)
    (root / "train" / "00001.jsonl.zst").unlink()
    with pytest.raises(DataError, match=r"00001\.jsonl\.zst no longer exists"):
        list(remote.texts())
    with pytest.raises(DataError, match=r"no shard with content in .*/nowhere/train"):
        opened(f"{server.url}/nowhere")


def test_a_shard_that_became_shorter_is_an_error(tmp_path: Path, serve: Callable[..., Server], quick: None) -> None:
    path = tmp_path / "train" / "0.jsonl"
    path.parent.mkdir()
    path.write_bytes(encoded(".jsonl", [document(text) for text in TEXTS]))
    reading = opened(serve(tmp_path).url).documents(0)
    next(reading)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"train/0\.jsonl cannot be read: .*ended after 2000 of"):
        list(reading)


def test_a_server_without_ranges_can_be_read_from_the_start(
    root: Path, serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_format, "READ_BYTES", 1000)
    assert list(opened(serve(root, ranges=False).url).texts()) == TEXTS


@pytest.mark.slow
def test_a_server_without_ranges_that_fails_in_the_middle_is_an_error(
    tmp_path: Path, serve: Callable[..., Server], quick: None
) -> None:
    (tmp_path / "train").mkdir()
    documents = [document(random.Random(number).randbytes(50_000).hex()) for number in range(100)]
    (tmp_path / "train" / "0.jsonl").write_bytes(encoded(".jsonl", documents))
    server = serve(tmp_path, ranges=False, answer=lambda path, number: "cut" if "jsonl" in path else "")
    with pytest.raises(DataError, match=r"train/0\.jsonl cannot be read: "):
        list(opened(server.url).texts())


def test_a_host_that_does_not_exist_is_an_error(quick: None) -> None:
    with pytest.raises(DataError, match=r"data\.path=http://127\.0\.0\.1:1: .*cannot be read: ClientConnector"):
        opened("http://127.0.0.1:1")


@pytest.mark.parametrize(
    ("path", "reason"), [("nosuch://corpus", "Protocol not known: nosuch"), ("smb://host/corpus", "smbprotocol")]
)
def test_a_protocol_that_cannot_be_used_is_an_error(path: str, reason: str) -> None:
    with pytest.raises(DataError, match=rf"data\.path={path} cannot be opened: .*{reason}"):
        opened(path)


@pytest.mark.parametrize("url", ["hf://datasets/org/name/{split}/*.parquet", "https://host/{split}"])
def test_files_at_a_url_are_named_by_url(url: str) -> None:
    assert sources._path_or_url(retry.filesystem(url), url).partition("://")[::2] == url.partition("://")[::2]


@pytest.mark.processes
@pytest.mark.parametrize("workers", [0, 1])
def test_a_server_failure_during_training_is_a_one_line_error(
    train_config: Callable[..., TrainConfig],
    tiny_corpus: Path,
    tiny_tokenizer: Path,
    serve: Callable[..., Server],
    quick: None,
    workers: int,
) -> None:
    server = serve(tiny_corpus, answer=lambda path, number: "error" if "jsonl" in path else "")
    with pytest.raises(DataError, match=r"^data\.path=.*jsonl\.zst cannot be read: .*503") as caught:
        first_batches(train_config(f"data.path={server.url}", f"data.num_workers={workers}"), tiny_tokenizer)
    assert len(str(caught.value).splitlines()) == 1


def test_other_file_systems_are_read_in_the_same_way(root: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(root), "/corpus", recursive=True)
    assert opened("memory://corpus").fingerprint == opened(root).fingerprint
    assert list(opened("memory://corpus/{split}/*.zst").texts()) == TEXTS


def first_batches(config: TrainConfig, tokenizer: Path) -> torch.Tensor:
    config.data.seq_len, config.data.streams = 32, 4
    config.trainer.global_batch_size, config.trainer.devices = 8, 1
    cursors = np.zeros((4, len(Cursor._fields)), dtype=np.int64)
    batches = DataModule(config, load_tokenizer(tokenizer), 0, cursors).train_dataloader()
    return torch.cat([batch["input_ids"] for batch in itertools.islice(batches, 8)])


@pytest.mark.processes
@pytest.mark.parametrize("workers", [0, 2])
def test_training_on_a_failing_server_gets_the_local_batches(
    train_config: Callable[..., TrainConfig],
    tiny_corpus: Path,
    tiny_tokenizer: Path,
    serve: Callable[..., Server],
    quick: None,
    workers: int,
) -> None:
    server = serve(tiny_corpus, answer=every(4, "reset"))
    local, remote = (
        first_batches(train_config(f"data.path={path}", f"data.num_workers={workers}"), tiny_tokenizer)
        for path in (tiny_corpus, server.url)
    )
    assert torch.equal(local, remote)
    assert len(server.gets) > 8


# Datasets


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A dataset of 3 training and 1 test files, as `datasets` reads it from a folder."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    for number in range(3):
        documents = [document(text, stars) for stars, text in enumerate(TEXTS[40 * number :][:40])]
        (folder / f"train-{number}.parquet").write_bytes(encoded(".parquet", documents))
    (folder / "test-0.parquet").write_bytes(encoded(".parquet", [document(text) for text in TEXTS[:40]]))
    return folder


def hub(name: Path | str, split: str = "train", **settings: Any) -> Corpus:
    return open_corpus(DataConfig(hub=str(name), **settings), split)


def test_a_dataset_is_read_shard_by_shard(dataset: Path) -> None:
    corpus = hub(dataset)
    assert [Path(name).name for name in corpus.shards] == [f"train-{number}.parquet" for number in range(3)]
    assert [[text for _, text, _ in shard] for shard in all_lines(corpus)] == [TEXTS[:40], TEXTS[40:80], TEXTS[80:]]
    for start, stride, residue in ((0, 1, 0), (25, 1, 0), (0, 7, 3), (33, 7, 2), (40, 1, 0)):
        wanted = [(i, t, "") for i, t in enumerate(TEXTS[40:80]) if i >= start and i % stride == residue]
        assert lines(corpus, 1, start, stride, residue) == wanted


def test_a_dataset_is_filtered(dataset: Path) -> None:
    assert list(hub(dataset, filter=FilterConfig(min_stars=39)).texts()) == [TEXTS[39], TEXTS[79], TEXTS[119]]


def test_a_split_that_a_dataset_does_not_have_can_be_named(dataset: Path) -> None:
    with pytest.raises(DataError, match=r"no split validation \(it has train, test\).*data\.validation_split"):
        hub(dataset, "validation")
    assert list(hub(dataset, "validation", validation_split="test").texts()) == TEXTS[:40]


def test_a_column_that_a_dataset_does_not_have_is_named(dataset: Path) -> None:
    with pytest.raises(DataError, match=r"no column data\.text_column=code; it has text, meta"):
        hub(dataset, text_column="code")


@pytest.mark.parametrize("name", ["nowhere/at-all", "./nowhere"])
def test_a_dataset_that_cannot_be_found_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=rf"data\.hub={name} cannot be opened"):
        hub(name)


def test_the_fingerprint_of_a_dataset_changes_with_its_files(dataset: Path) -> None:
    before = hub(dataset).fingerprint
    assert hub(dataset).fingerprint == before
    assert hub(dataset, "validation", validation_split="test").fingerprint != before
    (dataset / "train-1.parquet").write_bytes(encoded(".parquet", [document("other")]))
    assert hub(dataset).fingerprint != before


@pytest.mark.processes
@pytest.mark.parametrize("workers", [0, 2])
def test_training_on_a_dataset_gets_the_batches_of_its_files(
    train_config: Callable[..., TrainConfig], dataset: Path, tiny_tokenizer: Path, tmp_path: Path, workers: int
) -> None:
    (tmp_path / "files" / "train").mkdir(parents=True)
    for path in dataset.glob("train-*"):
        shutil.copy(path, tmp_path / "files" / "train")
    seen = [
        first_batches(train_config(*source, f"data.num_workers={workers}"), tiny_tokenizer)
        for source in ([f"data.path={tmp_path}/files"], ["data.path=null", f"data.hub={dataset}"])
    ]
    assert torch.equal(*seen)


def test_damage_in_a_dataset_ends_its_shard(tmp_path: Path) -> None:
    for number, end in enumerate(("", "broken")):
        lines = b"".join(json.dumps(document(text)).encode() + b"\n" for text in TEXTS)
        (tmp_path / f"train-{number}.jsonl").write_bytes(lines + end.encode())
    intact, damaged = all_lines(hub(tmp_path))
    assert [text for _, text, _ in intact] == TEXTS
    assert damaged[-1] == (len(damaged) - 1, None, "damaged_shard")
    assert [text for _, text, _ in damaged[:-1]] == TEXTS[: len(damaged) - 1]


def test_a_missing_file_keeps_nothing_of_its_callers_alive() -> None:
    """Such as the loader processes of a rank, which would outlive it until the garbage collector runs."""

    class Held: ...

    def caller() -> "weakref.ref[Held]":
        held = Held()
        with contextlib.suppress(FileNotFoundError):
            retry.retried(Path("/nowhere").read_bytes, what="a manifest")
        return weakref.ref(held)

    gc.disable()
    try:
        assert caller()() is None
    finally:
        gc.enable()
