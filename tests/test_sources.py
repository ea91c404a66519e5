"""Where shards lie: the same corpus from a folder, a pattern, a server or a dataset, and failures that are told."""

import os
import shutil
from pathlib import Path

import pytest

from clippy_train.config import DataConfig
from clippy_train.errors import DataError
from clippy_train.shards import ShardWriter, encode
from clippy_train.sources import Corpus, open_corpus


def opened(path: Path | str, split: str = "train", **settings) -> Corpus:
    return open_corpus(DataConfig(path=str(path), **settings), split)


@pytest.fixture
def root(tmp_path) -> Path:
    root = tmp_path / "corpus"
    for split in ("train", "validation"):
        writer = ShardWriter(root / split, shard_bytes=1)
        for text in ("a", "b", "c"):
            writer.write(encode({"text": f"{split} {text}"}))
    (root / "manifest.json").write_text("{}")
    return root


def test_shards_of_the_split_come_in_order_of_their_names(root) -> None:
    (root / "train" / "notes.txt").write_text("no shard")
    names = [Path(name).relative_to(root).as_posix() for name in opened(root, "train").shards]
    assert names == [f"train/0000{number}.jsonl.zst" for number in range(3)]


def test_a_folder_that_does_not_exist_is_named(tmp_path) -> None:
    with pytest.raises(DataError, match=r"data\.path=.*nowhere: no such folder"):
        opened(tmp_path / "nowhere", "train")


def test_a_split_without_shards_is_an_error(root) -> None:
    with pytest.raises(DataError, match=r"no shard with content in .*test"):
        opened(root, "test")


def test_a_split_of_empty_files_is_an_error(root) -> None:
    for path in (root / "train").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"no shard with content"):
        opened(root, "train")


def test_the_fingerprint_belongs_to_the_content_and_not_to_the_place(root, tmp_path) -> None:
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
def test_the_fingerprint_changes_with_the_shards(root, change) -> None:
    before = opened(root, "train").fingerprint
    change(root)
    assert opened(root, "train").fingerprint != before


def test_splits_have_different_fingerprints(root) -> None:
    assert opened(root, "train").fingerprint != opened(root, "validation").fingerprint
