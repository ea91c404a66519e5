"""Building a corpus: the same bytes for the same files, no repository in two splits, every rejected file counted."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from support.formats import APPS

from clippy_train.cli import main
from clippy_train.config import CorpusConfig, DedupConfig, FilterConfig
from clippy_train.corpus.build import build_corpus
from clippy_train.corpus.document import Document, Rejected
from clippy_train.corpus.folders import file_documents, source_files
from clippy_train.corpus.manifest import Tally
from clippy_train.corpus.stages import held_out_repositories
from clippy_train.errors import ConfigError, DataError
from clippy_train.shards.format import SPLITS

CODE = "print('enough text for a file that passes the rule of the smallest size')\n"


def build(src: Path, out: Path, **settings: Any) -> dict[str, Any]:
    """A corpus whose documents may be equal, unless `dedup` says otherwise."""
    settings = {"dedup": DedupConfig(exact=False), **settings}
    return build_corpus(CorpusConfig(src=[str(src)], out=str(out), **settings))


def found(*sources: Path) -> list[Document]:
    return list(file_documents(source_files(list(sources), Path.home()), FilterConfig()))


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
    """Three packages of one good file each; tests add files to them."""
    for name in ("one", "two", "three"):
        (tmp_path / "code" / name).mkdir(parents=True)
        (tmp_path / "code" / name / "good.py").write_text(CODE)
    return tmp_path / "code"


def test_the_same_files_give_the_same_bytes(source_tree: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / source_tree.name
    for path in sorted(source_tree.rglob("*.py"), reverse=True):  # another order of creation, and other timestamps
        target = copy / path.relative_to(source_tree)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        os.utime(target, (0, 0))
    build(source_tree, tmp_path / "first", shard_bytes=5000)
    build(copy, tmp_path / "second", shard_bytes=5000)
    assert content(tmp_path / "first") == content(tmp_path / "second")


def test_another_seed_gives_another_split_and_order(source_tree: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        build(source_tree, tmp_path / str(seed), seed=seed)
    first, second = ([d["meta"]["file_name"] for d in everything(tmp_path / str(seed))] for seed in (1, 2))
    assert sorted(first) == sorted(second)
    assert first != second
    assert split(tmp_path / "1", "test") != split(tmp_path / "2", "test")


@pytest.mark.parametrize("seed", range(3))
def test_no_repository_is_in_two_splits(source_tree: Path, tmp_path: Path, seed: int) -> None:
    build(source_tree, tmp_path / "out", seed=seed, validation_fraction=0.3, test_fraction=0.2)
    repositories = [{d["meta"]["repo_name"] for d in split(tmp_path / "out", name)} for name in SPLITS]
    assert [len(names) for names in repositories] == [6, 4, 2]
    assert set.union(*repositories) == {f"package_{number:02d}" for number in range(12)}


def test_every_file_is_one_document_with_its_text(source_tree: Path, tmp_path: Path) -> None:
    build(source_tree, tmp_path / "out")
    expected = {f"code/{path.relative_to(source_tree)}": path.read_text() for path in source_tree.rglob("*.py")}
    documents = everything(tmp_path / "out")
    assert {document["meta"]["file_name"]: document["text"] for document in documents} == expected
    assert len(documents) == len(expected)


def test_files_of_a_repository_are_spread_out(tiny_corpus: Path) -> None:
    names = [document["meta"]["repo_name"] for document in split(tiny_corpus, "train")]
    changes = sum(before != after for before, after in pairwise(names))
    assert changes > len(set(names))


def test_a_document_has_the_fields_of_the_code_clippy_format(packages: Path, tmp_path: Path) -> None:
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


def test_text_is_kept_byte_for_byte(packages: Path, tmp_path: Path) -> None:
    text = "# \N{GRINNING FACE}\u2028\r\n\tif x:\r\n" + CODE + "\0\n\n"
    (packages / "one" / "odd.py").write_bytes(text.encode())
    build(packages, tmp_path / "out")
    assert text in [document["text"] for document in everything(tmp_path / "out")]


@pytest.mark.parametrize(
    ("name", "data", "rule"),
    [
        ("x.unknown", CODE.encode(), "no_language"),
        ("strange", CODE.encode(), "no_language"),
        ("x.py", b"a" * 63, "too_small"),
        ("x.py", b"a" * 201, "too_large"),
        ("x.py", CODE.encode() + "привет".encode("koi8-r"), "not_utf8"),
        ("x.py", b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 9000000\n", "lfs_pointer"),
        ("x.py", bytes(range(256))[:200], "not_utf8"),
    ],
    ids=["extension", "no language", "too small", "too large", "Cyrillic 8-bit", "LFS pointer", "binary"],
)
def test_a_file_is_rejected_and_counted_by_the_rule_that_it_breaks(
    packages: Path, tmp_path: Path, name: str, data: bytes, rule: str
) -> None:
    (packages / "one" / name).write_bytes(data)
    manifest = build(packages, tmp_path / "out", filter=FilterConfig(min_bytes=64, max_bytes=200))
    assert manifest["rejected"] == {rule: 1}
    assert manifest["documents"] == len(everything(tmp_path / "out")) == 3


@pytest.mark.parametrize("size", [64, 200])
def test_files_of_the_smallest_and_the_largest_size_are_kept(packages: Path, tmp_path: Path, size: int) -> None:
    (packages / "one" / "x.py").write_bytes(b"a" * size)
    assert build(packages, tmp_path / "out", filter=FilterConfig(min_bytes=64, max_bytes=200))["rejected"] == {}


def test_a_file_that_disappears_is_rejected(packages: Path) -> None:
    documents = found(packages)
    (packages / "one" / "good.py").unlink()
    with pytest.raises(Rejected, match="unreadable"):
        documents[0].read()
    assert documents[1].read()[0] == CODE


def test_a_folder_that_disappears_is_skipped_with_a_warning(packages: Path, caplog: pytest.LogCaptureFixture) -> None:
    documents = file_documents(source_files([packages], Path.home()), FilterConfig())
    assert next(documents).repository == "one"
    shutil.rmtree(packages / "three")
    assert [document.repository for document in documents] == ["two"]
    assert "three cannot be listed" in caplog.text


def test_only_the_named_extensions_are_kept(packages: Path, tmp_path: Path) -> None:
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


def test_the_counts_and_checksums_of_the_manifest_are_right(source_tree: Path, tmp_path: Path) -> None:
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


def test_third_party_code_links_and_caches_are_skipped(packages: Path) -> None:
    for folder in (".git", "node_modules", "__pycache__", "site-packages"):
        (packages / "one" / folder).mkdir()
        (packages / "one" / folder / "x.py").write_text(CODE)
    (packages / "one" / "link.py").symlink_to(packages / "two" / "good.py")
    (packages / "linked").symlink_to(packages / "two")
    (packages / "one" / "loop").symlink_to(packages)
    (packages / "one" / "itself").symlink_to(packages / "one" / "itself")
    assert names(packages) == ["code/one/good.py", "code/three/good.py", "code/two/good.py"]


def test_a_module_and_the_package_of_its_name_are_one_repository(packages: Path) -> None:
    (packages / "two.py").write_text(CODE)
    assert [document.repository for document in found(packages) if "two" in document.key] == ["two", "two"]


def test_a_file_name_that_is_not_utf8_is_made_valid(packages: Path, tmp_path: Path) -> None:
    for folder in (b"", b"caf\xe9"):
        path = os.path.join(os.fsencode(packages), folder, b"na\xefve.py")  # noqa: PTH118
        os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120
        Path(os.fsdecode(path)).write_text(CODE)
    build(packages, tmp_path / "out")
    names = {document["meta"]["file_name"] for document in everything(tmp_path / "out")}
    assert {"code/na\ufffdve.py", "code/caf\ufffd/na\ufffdve.py"} < names


def test_a_file_in_overlapping_folders_is_read_once(packages: Path) -> None:
    inside = [packages / "one", packages / "two"]
    assert names(packages, *inside, packages) == names(packages)
    assert names(*inside, packages) == ["one/good.py", "two/good.py", "code/three/good.py"]


def test_a_source_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"src: no such folder: .*nowhere"):
        build(tmp_path / "nowhere", tmp_path / "out")


def test_a_source_without_files_is_an_error_that_counts_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"src=.*empty.*: 0 repositories .*rejected: none"):
        build(tmp_path / "empty", tmp_path / "out")


@pytest.mark.parametrize("left", [[], ["one"], ["one", "two"]], ids=len)
def test_too_few_repositories_are_an_error_that_leaves_no_files(
    packages: Path, tmp_path: Path, left: list[str]
) -> None:
    for package in packages.iterdir():
        if package.name not in left:
            (package / "good.py").write_text("too small")
    names = ", ".join(left)
    with pytest.raises(DataError, match=rf"src=.*code.*: {len(left)} repositories .*{names}.*rejected: .* too_small"):
        build(packages, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [packages]


def test_fractions_that_leave_no_training_repository_are_an_error(packages: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="change validation_fraction or test_fraction"):
        build(packages, tmp_path / "out", validation_fraction=0.6, test_fraction=0.3)
    assert list(tmp_path.iterdir()) == [packages]


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (1.0, 0.0), (0.7, 0.6)], ids=str)
def test_fractions_that_leave_nothing_to_train_on_are_refused(
    packages: Path, tmp_path: Path, fractions: tuple[float, float]
) -> None:
    with pytest.raises(ConfigError, match=r"validation_fraction \+ test_fraction = .*nothing is left"):
        build(packages, tmp_path / "out", validation_fraction=fractions[0], test_fraction=fractions[1])
    assert list(tmp_path.iterdir()) == [packages]


def test_a_folder_with_content_is_not_overwritten(packages: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exists and is not empty"):
        build(packages, packages)
    assert sorted(path.name for path in packages.iterdir()) == ["one", "three", "two"]


def test_validation_and_test_get_at_least_one_repository_each() -> None:
    config = CorpusConfig(out="", validation_fraction=0, test_fraction=0)
    assert held_out_repositories(3, [], Tally(), config) == (1, 1)


GROWTH = """
import re, sys
from pathlib import Path
from clippy_train.config import CorpusConfig, DedupConfig
from clippy_train.corpus.build import build_corpus
from clippy_train.corpus.stages import Sizes
sizes = Sizes(files=20, part=1_000_000, table=10_000, range=1_000_000)
for src in sys.argv[1:]:
    settings = dict(dedup=DedupConfig(near=True, permutations=16, threshold=0.5), shard_bytes=1_000_000)
    size = build_corpus(CorpusConfig(src=[src], out=src + ".out", **settings), sizes)["text_bytes"]
    peak = re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())
    print(size, int(peak[1]) * 1024)
"""


@pytest.mark.processes
@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    """After a build that fills every part, one with ten times as much text as the memory that it may add."""
    rng = np.random.default_rng(0)
    words = np.array([f"name_{number}" for number in range(1000)])
    for name, files in (("small", 60), ("large", 220)):
        for package in range(4):
            folder = tmp_path / name / f"package_{package}"
            folder.mkdir(parents=True)
            for number in range(files):
                (folder / f"{number}.py").write_text(" ".join(rng.choice(words, 6000)))
    # Not ru_maxrss: a process inherits it from the process that started it.
    command = [sys.executable, "-c", GROWTH, str(tmp_path / "small"), str(tmp_path / "large")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=200)
    (small, before), (large, after) = (map(int, line.split()) for line in done.stdout.splitlines())
    assert large - small > 30_000_000
    assert after - before < (large - small) / 10


def test_the_kept_duplicate_is_the_first_one_of_the_sources(packages: Path, tmp_path: Path) -> None:
    for package in packages.iterdir():
        (package / "own.py").write_text(CODE + f"# {package.name}\n")
    manifest = build(packages, tmp_path / "out", dedup=DedupConfig())
    assert manifest["rejected"] == {"exact_duplicate": 2}
    (kept,) = [d["meta"] for d in everything(tmp_path / "out") if d["text"] == CODE]
    assert kept["file_name"] == "code/one/good.py"


def test_near_duplicates_are_counted_separately(source_tree: Path, tmp_path: Path) -> None:
    copy = tmp_path / "code"
    shutil.copytree(source_tree, copy)
    for path in copy.rglob("*.py"):
        (path.parent / f"again_{path.name}").write_text(path.read_text() + "\nimport os\nimport sys\n")
    total = sum(1 for _ in source_tree.rglob("*.py"))
    manifest = build(copy, tmp_path / "out", dedup=DedupConfig(near=True, threshold=0.6))
    assert manifest["documents"] + sum(manifest["rejected"].values()) == 2 * total
    assert manifest["rejected"]["near_duplicate"] >= 0.8 * total


def test_a_dataset_is_split_by_repository_and_shuffled_too(tmp_path: Path) -> None:
    rows = [{"content": f"{CODE}# {number}", "repo_name": f"octo/{number % 40}"} for number in range(400)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings: dict[str, Any] = {"hub": str(tmp_path / "data"), "text_column": "content"}
    for name in ("first", "second"):
        build_corpus(CorpusConfig(out=str(tmp_path / name), **settings))
    assert content(tmp_path / "first") == content(tmp_path / "second")
    documents = {name: [d["text"] for d in split(tmp_path / "first", name)] for name in SPLITS}
    repositories = [{d["meta"]["repo_name"] for d in split(tmp_path / "first", name)} for name in SPLITS]
    assert sum(map(len, repositories)) == len(set.union(*repositories)) == 40
    assert sorted(text for texts in documents.values() for text in texts) == sorted(row["content"] for row in rows)
    assert documents["train"] != sorted(documents["train"], key=[row["content"] for row in rows].index)


def test_folders_and_a_dataset_make_one_corpus(packages: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text(json.dumps({"text": "x" * 100, "license": "mit"}) + "\n")
    manifest = build(packages, tmp_path / "out", hub=str(tmp_path / "data"))
    assert manifest["documents"] == 4
    assert manifest["licences"]["mit"] == {"documents": 1, "text_bytes": 100}


@pytest.mark.slow
def test_the_report_repeats_the_summary_of_the_build_without_reading_shards(
    packages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    (packages / "one" / "x.py").write_text("too small")
    assert main(["corpus", str(packages), f"out={tmp_path / 'out'}", "dedup.exact=false"]) == 0
    summary = capsys.readouterr().out
    for expected in (
        "4 seen, 3 kept",
        "language Python",
        "3 documents",
        "licence unknown",
        "rejected: too_small",
        "1 (25.0%)",
    ):
        assert expected in summary
    for shard in (tmp_path / "out").rglob("*.zst"):
        shard.unlink()
    assert main(["corpus", "--report", f"out={tmp_path / 'out'}"]) == 0
    assert capsys.readouterr().out == summary


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (None, "is not a finished corpus: manifest.json"),
        ("{", "is damaged"),
        ('{"version": 1}', "version 2"),
        ("[]", "version 2"),
    ],
    ids=str,
)
def test_a_report_on_something_else_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], manifest: str | None, message: str
) -> None:
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    assert main(["corpus", "--report", f"out={tmp_path}"]) == 3
    assert message in capsys.readouterr().err


def test_benchmarks_opted_out_repositories_and_personal_data_are_left_out_counted_and_reported(
    packages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    described = "Read a number from the standard input and print the double of it on a line."
    (tmp_path / "apps.jsonl").write_text(json.dumps({**APPS, "question": described}))
    (tmp_path / "opted_out.txt").write_text("four\n")
    (packages / "four").mkdir()
    (packages / "four" / "own.py").write_text(CODE)
    (packages / "one" / "solved.py").write_text(f"# {described}\n{CODE}")
    (packages / "two" / "good.py").write_text(f"# jo@example.org, ann@example.org, at 8.8.8.8\n{CODE}")
    keys = [f"decontaminate=[{tmp_path}/apps.jsonl]", f"opt_out={tmp_path}/opted_out.txt", "redact=[emails,ips]"]
    out = tmp_path / "out"
    assert main(["corpus", str(packages), f"out={out}", "dedup.exact=false", *(f"filter.{key}" for key in keys)]) == 0
    summary = capsys.readouterr().out
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["rejected"] == {"benchmark": 1, "opted_out": 1}
    assert manifest["redacted"] == {"emails": 2, "ips": 1}
    assert {each["text"] for each in everything(out)} == {CODE, f"# <EMAIL>, <EMAIL>, at <IP_ADDRESS>\n{CODE}"}
    assert str(tmp_path) not in (out / "manifest.json").read_text()
    assert main(["corpus", "--report", f"out={out}"]) == 0
    assert capsys.readouterr().out == summary
    for expected in (r"checked against\W+apps\.jsonl@", r"rejected: benchmark\W+1 ", r"replaced: emails\W+2"):
        assert re.search(expected, summary)


def test_only_corpora_have_a_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--report", "model=x", "prompt=y"]) == 2
    assert "--report is for clippy corpus" in capsys.readouterr().err


def test_the_manifest_keeps_the_settings_but_no_location(packages: Path, tmp_path: Path) -> None:
    settings = build(packages, tmp_path / "out", seed=3, filter=FilterConfig(languages=["Python"]))["settings"]
    assert settings["seed"] == 3
    assert settings["filter"]["languages"] == ["Python"]
    assert str(tmp_path) not in (tmp_path / "out" / "manifest.json").read_text()
