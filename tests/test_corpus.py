"""Building a corpus: the same bytes for the same files, no repository in two splits, every left-out file counted."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import zstandard

from clippy_train.config import CorpusConfig, DedupConfig, FilterConfig
from clippy_train.corpus.build import build_corpus, split_repositories
from clippy_train.corpus.document import Document, Unusable
from clippy_train.corpus.folders import folder_documents
from clippy_train.corpus.manifest import Tally
from clippy_train.errors import ConfigError, DataError
from clippy_train.shards import SPLITS

CODE = "print('enough text for a file that passes the rule of the smallest size')\n"


def build(src: Path, out: Path, **settings: Any) -> dict[str, Any]:
    """A corpus whose documents may be equal, unless `dedup` says otherwise."""
    settings = {"dedup": DedupConfig(exact=False), **settings}
    return build_corpus(CorpusConfig(src=[str(src)], out=str(out), **settings))


def found(*sources: Path) -> list[Document]:
    return list(folder_documents(list(sources), False, None, Path.home()))


def names(*sources: Path) -> list[str]:
    return [document.key for document in found(*sources)]


def content(corpus: Path) -> dict[str, bytes]:
    return {str(path.relative_to(corpus)): path.read_bytes() for path in corpus.rglob("*") if path.is_file()}


def split(corpus: Path, name: str) -> list[dict[str, Any]]:
    shards = sorted((corpus / name).glob("*.jsonl.zst"))
    lines = b"".join(zstandard.decompress(shard.read_bytes()) for shard in shards).splitlines()
    return [json.loads(line) for line in lines]


def everything(corpus: Path) -> list[dict[str, Any]]:
    return [document for name in SPLITS for document in split(corpus, name)]


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """Three packages of one good file each, to add files to."""
    for name in ("one", "two", "three"):
        (tmp_path / "code" / name).mkdir(parents=True)
        (tmp_path / "code" / name / "good.py").write_text(CODE)
    return tmp_path / "code"


def test_the_same_files_give_the_same_bytes(source_tree, tmp_path) -> None:
    copy = tmp_path / "elsewhere" / source_tree.name
    for path in sorted(source_tree.rglob("*.py"), reverse=True):  # another order of creation, and other times
        target = copy / path.relative_to(source_tree)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        os.utime(target, (0, 0))
    build(source_tree, tmp_path / "first", shard_bytes=5000)
    build(copy, tmp_path / "second", shard_bytes=5000)
    assert content(tmp_path / "first") == content(tmp_path / "second")


def test_another_seed_gives_another_split_and_order(source_tree, tmp_path) -> None:
    for seed in (1, 2):
        build(source_tree, tmp_path / str(seed), seed=seed)
    first, second = ([d["meta"]["file_name"] for d in everything(tmp_path / str(seed))] for seed in (1, 2))
    assert sorted(first) == sorted(second)
    assert first != second
    assert split(tmp_path / "1", "test") != split(tmp_path / "2", "test")


@pytest.mark.parametrize("seed", range(3))
def test_no_repository_is_in_two_splits(source_tree, tmp_path, seed) -> None:
    build(source_tree, tmp_path / "out", seed=seed, validation_fraction=0.3, test_fraction=0.2)
    repositories = [{d["meta"]["repo_name"] for d in split(tmp_path / "out", name)} for name in SPLITS]
    assert [len(names) for names in repositories] == [6, 4, 2]
    assert set.union(*repositories) == {f"package_{number:02d}" for number in range(12)}


def test_every_file_is_one_document_with_its_text(source_tree, tmp_path) -> None:
    build(source_tree, tmp_path / "out")
    expected = {f"code/{path.relative_to(source_tree)}": path.read_text() for path in source_tree.rglob("*.py")}
    documents = everything(tmp_path / "out")
    assert {document["meta"]["file_name"]: document["text"] for document in documents} == expected
    assert len(documents) == len(expected)


def test_files_of_a_repository_do_not_stay_together(tiny_corpus) -> None:
    names = [document["meta"]["repo_name"] for document in split(tiny_corpus, "train")]
    changes = sum(before != after for before, after in pairwise(names))
    assert changes > len(set(names))


def test_a_document_has_the_fields_of_the_code_clippy_format(packages, tmp_path) -> None:
    build(packages, tmp_path / "out")
    (document,) = [d for d in everything(tmp_path / "out") if d["meta"]["repo_name"] == "two"]
    assert document == {
        "text": CODE,
        "meta": {
            "repo_name": "two",
            "stars": None,
            "repo_language": "Python",
            "file_name": "code/two/good.py",
            "mime_type": "text/x-python",
            "license": None,
        },
    }


def test_text_is_kept_byte_for_byte(packages, tmp_path) -> None:
    text = "\ufeff# \N{GRINNING FACE}\u2028\r\n\tif x:\r\n" + CODE + "\0\n\n"
    (packages / "one" / "odd.py").write_bytes(text.encode())
    build(packages, tmp_path / "out")
    assert text in [document["text"] for document in everything(tmp_path / "out")]


@pytest.mark.parametrize(
    ("name", "data", "rule"),
    [
        ("x.unknown", CODE.encode(), "no_language"),
        ("Makefile.in", CODE.encode(), "no_language"),
        ("x.py", b"a" * 63, "too_small"),
        ("x.py", b"a" * 201, "too_large"),
        ("x.py", CODE.encode() + "café".encode("latin-1"), "not_utf8"),
        ("x.py", bytes(range(256))[:200], "not_utf8"),
    ],
    ids=["extension", "no language", "too small", "too large", "latin-1", "binary"],
)
def test_a_file_is_left_out_and_counted_by_the_rule_that_it_breaks(packages, tmp_path, name, data, rule) -> None:
    (packages / "one" / name).write_bytes(data)
    manifest = build(packages, tmp_path / "out", filter=FilterConfig(min_bytes=64, max_bytes=200))
    assert manifest["rejected"] == {rule: 1}
    assert manifest["documents"] == len(everything(tmp_path / "out")) == 3


@pytest.mark.parametrize("size", [64, 200])
def test_files_of_the_smallest_and_the_largest_size_are_kept(packages, tmp_path, size) -> None:
    (packages / "one" / "x.py").write_bytes(b"a" * size)
    assert build(packages, tmp_path / "out", filter=FilterConfig(min_bytes=64, max_bytes=200))["rejected"] == {}


def test_a_file_that_is_gone_when_its_turn_comes_is_left_out(packages) -> None:
    documents = found(packages)
    (packages / "one" / "good.py").unlink()
    with pytest.raises(Unusable, match="unreadable"):
        documents[0].read()
    assert documents[1].read() == CODE


def test_a_folder_that_is_gone_when_its_turn_comes_is_named(packages, caplog) -> None:
    documents = folder_documents([packages], False, None, Path.home())
    assert next(documents).repository == "one"
    shutil.rmtree(packages / "three")
    assert [document.repository for document in documents] == ["two"]
    assert "three cannot be listed" in caplog.text


def test_only_the_named_extensions_are_kept(packages, tmp_path) -> None:
    for package in packages.iterdir():
        (package / "x.c").write_text(CODE)
        (package / "x.unknown").write_text(CODE)
    manifest = build(packages, tmp_path / "out", filter=FilterConfig(extensions=[".c", ".unknown"]))
    assert {name: counts["documents"] for name, counts in manifest["languages"].items()} == {"C": 3, "Text": 3}
    assert manifest["rejected"] == {"extension": 3}


def recounted(named: Iterable[tuple[str, dict[str, Any]]]) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    for name, document in named:
        count = counts.setdefault(name, {"documents": 0, "text_bytes": 0})
        count["documents"] += 1
        count["text_bytes"] += len(document["text"].encode())
    return counts


def test_the_sums_of_the_manifest_are_right(source_tree, tmp_path) -> None:
    manifest = build(source_tree, tmp_path / "out", shard_bytes=5000)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == manifest
    documents = everything(tmp_path / "out")
    assert manifest["documents"] == len(documents)
    assert manifest["text_bytes"] == sum(path.stat().st_size for path in source_tree.rglob("*.py"))
    for heading, key in (("languages", "repo_language"), ("licences", "license")):
        assert manifest[heading] == recounted((d["meta"][key] or "unknown", d) for d in documents)
    assert manifest["splits"] == recounted((name, d) for name in SPLITS for d in split(tmp_path / "out", name))
    assert manifest["repositories"] == {
        name: len({d["meta"]["repo_name"] for d in split(tmp_path / "out", name)}) for name in SPLITS
    }
    listed = {file["name"]: file for name in SPLITS for file in manifest["files"][name]}
    shards = {name: data for name, data in content(tmp_path / "out").items() if name != "manifest.json"}
    assert {name: file["sha256"] for name, file in listed.items()} == {
        name: hashlib.sha256(data).hexdigest() for name, data in shards.items()
    }
    assert {name: file["bytes"] for name, file in listed.items()} == {name: len(data) for name, data in shards.items()}
    assert {name: file["documents"] for name, file in listed.items()} == {
        name: zstandard.decompress(data).count(b"\n") for name, data in shards.items()
    }
    assert len(manifest["files"]["train"]) > 2


def test_other_peoples_code_links_and_caches_are_not_looked_at(packages) -> None:
    for folder in (".git", "node_modules", "__pycache__", "site-packages"):
        (packages / "one" / folder).mkdir()
        (packages / "one" / folder / "x.py").write_text(CODE)
    (packages / "one" / "link.py").symlink_to(packages / "two" / "good.py")
    (packages / "linked").symlink_to(packages / "two")
    (packages / "one" / "loop").symlink_to(packages)
    (packages / "one" / "itself").symlink_to(packages / "one" / "itself")
    assert names(packages) == ["code/one/good.py", "code/three/good.py", "code/two/good.py"]


def test_a_module_and_the_package_of_its_name_are_one_repository(packages) -> None:
    (packages / "two.py").write_text(CODE)
    assert [document.repository for document in found(packages) if "two" in document.key] == ["two", "two"]


def test_a_file_name_that_is_not_utf8_is_made_readable(packages, tmp_path) -> None:
    for folder in (b"", b"caf\xe9"):
        path = os.path.join(os.fsencode(packages), folder, b"na\xefve.py")  # noqa: PTH118
        os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120
        Path(os.fsdecode(path)).write_text(CODE)
    build(packages, tmp_path / "out")
    names = {document["meta"]["file_name"] for document in everything(tmp_path / "out")}
    assert {"code/na\ufffdve.py", "code/caf\ufffd/na\ufffdve.py"} < names


def test_a_file_of_overlapping_folders_is_taken_once(packages) -> None:
    inside = [packages / "one", packages / "two"]
    assert names(packages, *inside, packages) == names(packages)
    assert names(*inside, packages) == ["one/good.py", "two/good.py", "code/three/good.py"]


def test_a_source_folder_that_does_not_exist_is_named(tmp_path) -> None:
    with pytest.raises(DataError, match=r"src: no such folder: .*nowhere"):
        build(tmp_path / "nowhere", tmp_path / "out")


@pytest.mark.parametrize("left", [[], ["one"], ["one", "two"]], ids=len)
def test_too_few_repositories_are_an_error_that_leaves_nothing_behind(packages, tmp_path, left) -> None:
    for package in packages.iterdir():
        if package.name not in left:
            (package / "good.py").write_text("too small")
    with pytest.raises(DataError, match=rf"src=.*code.*: {len(left)} repositories .*{', '.join(left)}.*'too_small': "):
        build(packages, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [packages]


def test_fractions_that_leave_no_repository_to_train_on_are_an_error(packages, tmp_path) -> None:
    with pytest.raises(DataError, match="change validation_fraction or test_fraction"):
        build(packages, tmp_path / "out", validation_fraction=0.6, test_fraction=0.3)
    assert list(tmp_path.iterdir()) == [packages]


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (1.0, 0.0), (0.7, 0.6)], ids=str)
def test_fractions_that_leave_nothing_to_train_on_are_refused(packages, tmp_path, fractions) -> None:
    with pytest.raises(ConfigError, match=r"validation_fraction \+ test_fraction = .*nothing is left"):
        build(packages, tmp_path / "out", validation_fraction=fractions[0], test_fraction=fractions[1])
    assert list(tmp_path.iterdir()) == [packages]


def test_a_folder_with_content_is_not_overwritten(packages, tmp_path) -> None:
    with pytest.raises(ConfigError, match="exists and is not empty"):
        build(packages, packages)
    assert sorted(path.name for path in packages.iterdir()) == ["one", "three", "two"]


def test_at_least_one_repository_is_held_out_for_each_purpose() -> None:
    names = ["a", "b", "c"]
    splits = split_repositories(names, Tally(), CorpusConfig(out="", validation_fraction=0, test_fraction=0))
    assert sorted(splits.values()) == sorted(SPLITS)
