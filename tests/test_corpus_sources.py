"""The sources of a corpus: git repositories, plain folders, datasets; their names, licences, and flaws."""

import gzip
import json
import mimetypes
import os
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from identify.vendor.licenses import LICENSES

from clippy_train.config import CorpusConfig, FilterConfig
from clippy_train.corpus.document import Document, Rejected
from clippy_train.corpus.folders import file_documents, mime_type, source_files
from clippy_train.corpus.hub import UNNAMED_REPOSITORIES, dataset_shards, hub_documents
from clippy_train.corpus.licences import folder_licence, header_licence
from clippy_train.corpus.repository import origin_name
from clippy_train.errors import DataError
from clippy_train.shards.filters import META_COLUMNS

CODE = "def answer():\n    return 42\n"
LICENCE_TEXTS = dict(LICENSES)


def found(*sources: Path, **settings: Any) -> list[Document]:
    settings = {"rules": FilterConfig(), "out": Path.home(), **settings}
    return list(file_documents(source_files(list(sources), settings["out"]), settings["rules"]))


def documents_of(config: CorpusConfig) -> list[Document]:
    shards: Sequence[str | None] = dataset_shards(config) or [None]
    return [document for shard in shards for document in hub_documents(config, shard)]


def read_meta(document: Document) -> dict[str, Any]:
    return document.read()[1]


def read_text(document: Document) -> str:
    return document.read()[0]


def licence_of(folder: Path) -> str | None:
    return folder_licence(folder, [path.name for path in folder.iterdir()])


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", "-C", folder, *arguments], check=True, capture_output=True, timeout=30)


def clone(folder: Path, address: str | None = None, spdx: str | None = None) -> Path:
    """A repository with one file, and an origin and a licence on request."""
    (folder / "src").mkdir(parents=True)
    (folder / "src" / "a.py").write_text(CODE)
    git(folder, "init", "--quiet")
    if address:
        git(folder, "remote", "add", "origin", address)
    if spdx:
        (folder / "LICENSE").write_text(f"Copyright (c) 2020 Somebody\n{LICENCE_TEXTS[spdx]}")
    return folder


@pytest.mark.processes
def test_git_repositories_are_found_at_any_depth(tmp_path: Path) -> None:
    clone(tmp_path / "octo" / "cat", "https://token@github.com/octo/cat.git", "MIT")
    clone(tmp_path / "deep" / "er" / "still")
    clone(tmp_path / "octo" / "cat" / "vendored" / "dog", "git@github.com:octo/dog.git", "Apache-2.0")
    (tmp_path / "loose.py").write_text(CODE)
    metas = [read_meta(each) for each in found(tmp_path) if each.key.endswith(".py")]
    assert [(meta["repo_name"], meta["file_name"], meta["license"]) for meta in metas] == [
        ("loose", f"{tmp_path.name}/loose.py", None),
        ("deep/er/still", "src/a.py", None),
        ("octo/cat", "src/a.py", "MIT"),
        ("octo/dog", "src/a.py", "Apache-2.0"),
    ]
    assert "token" not in json.dumps([metas, [document[:2] for document in found(tmp_path)]])


@pytest.mark.processes
def test_a_git_repository_among_other_sources_is_one_repository(tmp_path: Path) -> None:
    cat = clone(tmp_path / "cat", spdx="MIT")
    assert {document.repository for document in found(cat, clone(tmp_path / "dog"))} == {"cat", "dog"}
    alone = {document.key: document for document in found(cat)}
    assert alone["cat/src/a.py"].repository == "src"
    assert read_meta(alone["cat/src/a.py"])["license"] == "MIT"


def test_packages_have_their_own_licence_or_that_of_their_folder(tmp_path: Path) -> None:
    for package in ("one", "two"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "a.py").write_text(CODE)
    (tmp_path / "LICENSE.txt").write_text(LICENCE_TEXTS["ISC"])
    (tmp_path / "two" / "COPYING").write_text(LICENCE_TEXTS["GPL-3.0"])
    code = [document for document in found(tmp_path) if document.key.endswith(("py", "txt"))]
    licences = {document.repository: read_meta(document)["license"] for document in code}
    assert licences == {"LICENSE": "ISC", "one": "ISC", "two": "GPL-3.0"}


@pytest.mark.processes
@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("https://github.com/octo/cat", "octo/cat"),
        ("https://github.com/octo/cat.git/", "octo/cat"),
        ("https://user:secret@example.org/group/octo/cat.git", "octo/cat"),
        ("git@github.com:octo/cat.git", "octo/cat"),
        ("ssh://git@example.org:2222/octo/c.a.t.git", "octo/c.a.t"),
        ("/srv/octo/cat.git", "octo/cat"),
        ("https://user:secret@example.org", None),
        ("cat", None),
    ],
)
def test_a_repository_is_named_after_the_end_of_its_address(tmp_path: Path, address: str, name: str | None) -> None:
    assert origin_name(clone(tmp_path / "x", address)) == name


@pytest.mark.processes
@pytest.mark.parametrize(
    "pointer", ["../.git/modules/inner", "{outer}/.git/modules/inner"], ids=["submodule", "absolute"]
)
def test_a_repository_with_its_git_folder_elsewhere_is_named_after_its_own_address(
    tmp_path: Path, pointer: str
) -> None:
    outer = clone(tmp_path / "outer", "https://example.org/a/outer")
    inner = clone(outer / "inner", "https://example.org/a/inner")
    (outer / ".git" / "modules").mkdir()
    (inner / ".git").rename(outer / ".git" / "modules" / "inner")
    (inner / ".git").write_text(f"gitdir: {pointer.format(outer=outer)}\n")
    git(inner, "rev-parse", "--git-dir")  # git accepts it
    assert origin_name(inner) == "a/inner"


@pytest.mark.processes
@pytest.mark.parametrize("address", [None, "https://example.org/octo/cat"])
def test_a_worktree_is_its_repository(tmp_path: Path, address: str | None) -> None:
    main = clone(tmp_path / "code" / "main", address)
    git(main, "add", ".")
    git(main, "-c", "user.name=a", "-c", "user.email=a@example.org", "commit", "--quiet", "--message=x")
    git(main, "worktree", "add", str(tmp_path / "code" / "other" / "tree"))
    documents = found(tmp_path / "code")
    assert [document.key for document in documents] == ["code/main/src/a.py", "code/other/tree/src/a.py"]
    assert {document.repository for document in documents} == {"octo/cat" if address else "main"}


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["--bare", "--mirror"])
def test_a_clone_without_files_is_skipped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    git(tmp_path, "clone", "--quiet", kind, str(clone(tmp_path / "main")), str(tmp_path / "code" / "copy.git"))
    assert found(tmp_path / "code") == []
    assert "copy.git is a bare repository" in caplog.text


@pytest.mark.parametrize(
    "content", [None, b"", b"junk", b"\xff\xfe[remote", b'[remote "origin"]\n', b"[core]\n[core]\n"]
)
def test_a_repository_with_a_strange_configuration_has_no_origin(tmp_path: Path, content: bytes | None) -> None:
    (tmp_path / ".git").mkdir()
    if content is not None:
        (tmp_path / ".git" / "config").write_bytes(content)
    assert origin_name(tmp_path) is None


@pytest.mark.parametrize("spdx", ["MIT", "Apache-2.0", "BSD-3-Clause", "GPL-2.0", "MPL-2.0", "Unlicense"])
def test_a_licence_is_recognised_with_small_changes(tmp_path: Path, spdx: str) -> None:
    (tmp_path / "licence.md").write_text(LICENCE_TEXTS[spdx].replace("software", "Software ", 3) + "\nThe authors\n")
    assert licence_of(tmp_path) == spdx


def test_several_licences_must_all_be_accepted(tmp_path: Path) -> None:
    for spdx in ("MIT", "Apache-2.0"):
        (tmp_path / f"LICENSE-{spdx}").write_text(LICENCE_TEXTS[spdx])
    assert licence_of(tmp_path) == "Apache-2.0 AND MIT"


@pytest.mark.parametrize("name", ["MIT-LICENSE", "MIT-LICENSE.txt", "License-MIT", "COPYING.mit", "LICENCE"])
def test_a_licence_is_recognised_between_other_texts(tmp_path: Path, name: str) -> None:
    terms = LICENCE_TEXTS["MIT"].partition("[fullname]")[2]
    (tmp_path / name).write_text(f"Our project\n\nCopyright A\nCopyright B\n{terms}\n{'Thanks to all. ' * 50}")
    assert licence_of(tmp_path) == "MIT"


@pytest.mark.parametrize(
    ("name", "content", "expression"),
    [
        ("package.json", '{"license": "(mit OR Apache-2.0)"}', "(MIT OR Apache-2.0)"),
        ("package.json", '{"license": {"type": "ISC"}}', "ISC"),
        ("package.json", '{"licenses": [{"type": "MIT"}]}', "MIT"),
        ("package.json", '{"license": "SEE LICENSE IN x"}', None),
        ("package.json", "[" * 100_000, None),
        ("package.json", "[]", None),
        ("pyproject.toml", "[project]\nlicense = 'BSD-3-Clause'", "BSD-3-Clause"),
        ("pyproject.toml", "[project]\nlicense = {text = 'MIT'}", "MIT"),
        ("pyproject.toml", "[tool.poetry]\nlicense = 'MIT'", "MIT"),
        ("pyproject.toml", "project = 3", None),
        ("Cargo.toml", "[package]\nlicense = 'MIT/Apache-2.0'", "MIT OR Apache-2.0"),
        ("other.json", '{"license": "MIT"}', None),
    ],
)
def test_metadata_state_the_licence_of_a_package(
    tmp_path: Path, name: str, content: str, expression: str | None
) -> None:
    (tmp_path / name).write_text(content)
    assert licence_of(tmp_path) == expression


def test_the_texts_of_a_folder_count_before_its_metadata(tmp_path: Path) -> None:
    (tmp_path / "package.json").write_text('{"license": "MIT"}')
    (tmp_path / "LICENSE").write_text(LICENCE_TEXTS["GPL-3.0"])
    (tmp_path / "LICENSES").mkdir()
    (tmp_path / "LICENSES" / "CC0-1.0.txt").touch()
    (tmp_path / "LICENSES" / "notes.txt").touch()
    assert licence_of(tmp_path) == "CC0-1.0 AND GPL-3.0"


@pytest.mark.parametrize(
    ("head", "expression"),
    [
        ("#!/bin/sh\n# SPDX-License-Identifier: gpl-2.0-only\n", "GPL-2.0-only"),
        (
            "/* SPDX-License-Identifier: (GPL-2.0 WITH Linux-syscall-note) OR MIT */",
            "(GPL-2.0 WITH Linux-syscall-note) OR MIT",
        ),
        ("<!-- SPDX-License-Identifier: MIT -->\r\n", "MIT"),
        ("// SPDX-License-Identifier: whatever\n", None),
        ("// no header\n", None),
    ],
)
def test_a_file_may_state_its_licence(head: str, expression: str | None) -> None:
    assert header_licence(head) == expression


def test_a_file_has_its_own_licence_or_the_nearest_upward(tmp_path: Path) -> None:
    for folder in ("lib/src", "lib/vendor/gnu/deep"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.py").write_text(CODE)
    (tmp_path / "lib" / "src" / "own.py").write_text(f"# SPDX-License-Identifier: ISC\n{CODE}")
    (tmp_path / "lib" / "LICENSE").write_text(LICENCE_TEXTS["MIT"])
    (tmp_path / "lib" / "vendor" / "gnu" / "COPYING").write_text(LICENCE_TEXTS["GPL-2.0"])
    code = [read_meta(document) for document in found(tmp_path) if document.key.endswith("py")]
    assert {meta["file_name"].partition("/lib/")[2]: meta["license"] for meta in code} == {
        "src/a.py": "MIT",
        "src/own.py": "ISC",
        "vendor/gnu/deep/a.py": "GPL-2.0",
    }


def test_other_files_are_not_taken_for_licences(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text(LICENCE_TEXTS["MIT"])
    (tmp_path / "LICENSE").symlink_to("elsewhere")
    (tmp_path / "COPYING").write_bytes(b"\xff\xfe")
    (tmp_path / "LICENSE.md").mkdir()
    with (tmp_path / "UNLICENSE").open("wb") as file:
        file.truncate(1 << 40)  # a hole: reading it would take all memory
    (tmp_path / "licensed.py").write_text(LICENCE_TEXTS["MIT"])
    os.mkfifo(tmp_path / "LICENCE")
    assert licence_of(tmp_path) is None


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "windows-1252"])
def test_a_file_is_decoded_without_its_mark(tmp_path: Path, encoding: str) -> None:
    text = "# Größe: 3 €, ça coûte\r\nx = 1\n"
    (tmp_path / "a.py").write_bytes(text.encode(encoding))
    assert list(map(read_text, found(tmp_path))) == [text]


def test_mime_types_do_not_depend_on_the_machine() -> None:
    mimetypes.add_type("text/of-this-machine", ".rs")
    try:
        assert mime_type("a.rs") == "text/plain"
    finally:
        del mimetypes.types_map[".rs"]


def test_pipes_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.py")
    (tmp_path / "b.py").write_text(CODE)
    assert [read_text(document) for document in found(tmp_path)] == [CODE]


@pytest.mark.processes
def test_folders_may_be_nested_beyond_the_recursion_limit(tmp_path: Path) -> None:
    folder = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=folder)
        folder, outer = os.open("d", os.O_RDONLY, dir_fd=folder), folder
        os.close(outer)
    os.close(os.open("a.py", os.O_CREAT | os.O_WRONLY, dir_fd=folder))
    os.close(folder)
    texts = [read_text(document) for document in found(tmp_path)]
    subprocess.run(["rm", "-r", tmp_path / "d"], check=True)  # pytest's own removal is recursive
    assert texts == [""]


def test_a_file_above_the_maximum_size_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "huge.py").open("wb") as file:
        file.truncate(1 << 40)  # a hole: reading it would take all memory
    (document,) = found(tmp_path)
    with pytest.raises(Rejected, match="too_large"):
        document.read()


def test_the_output_folder_is_not_a_source(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.py").write_text(CODE)
    (tmp_path / "b.py").write_text(CODE)
    assert [document.repository for document in found(tmp_path, out=tmp_path / "out")] == ["b"]


ROWS = [
    {"code": CODE * (number + 3), "repo_name": f"octo/{number % 4}", "path": f"a/{number}.go", "stars": number}
    for number in range(10)
]


def dataset(folder: Path, rows: list[dict[str, Any]], kind: str) -> CorpusConfig:
    folder.mkdir()
    if kind == "jsonl":
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet", row_group_size=3)
    return CorpusConfig(hub=str(folder), text_column="code", out="")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_of_a_dataset_are_documents_in_the_same_order(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached: list[Any] = []
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: reached.append(address))
    documents = documents_of(dataset(tmp_path / "data", ROWS, kind))
    assert [read_text(document) for document in documents] == [row["code"] for row in ROWS]
    assert [document.repository for document in documents] == [row["repo_name"] for row in ROWS]
    assert read_meta(documents[3]) == {
        "repo_name": "octo/3",
        "stars": 3,
        "repo_language": "Go",
        "file_name": "a/3.go",
        "mime_type": "text/plain",
        "license": None,
    }
    assert not reached


def test_a_dataset_in_the_code_clippy_format_keeps_its_meta(tmp_path: Path) -> None:
    meta = {name: f"{name} of it" for name in META_COLUMNS} | {"stars": 7}
    (document,) = documents_of(dataset(tmp_path / "data", [{"code": CODE, "meta": meta}], "jsonl"))
    assert read_meta(document) == meta


@pytest.mark.slow
def test_rows_without_a_repository_are_spread_over_a_bounded_number_of_them(tmp_path: Path) -> None:
    rows = [{"code": f"{number}"} for number in range(UNNAMED_REPOSITORIES + 3)]
    repositories = [document.repository for document in documents_of(dataset(tmp_path / "data", rows, "parquet"))]
    assert len(set(repositories)) == UNNAMED_REPOSITORIES
    assert len(set(repositories[:UNNAMED_REPOSITORIES])) == UNNAMED_REPOSITORIES


def test_rows_without_a_text_are_rejected(tmp_path: Path) -> None:
    config = dataset(tmp_path / "data", [{"code": text} for text in (CODE, None, "")], "parquet")
    first, *others = documents_of(config)
    assert read_text(first) == CODE
    for document in others:
        with pytest.raises(Rejected, match="no_text"):
            document.read()


def test_a_dataset_without_the_column_names_the_key(tmp_path: Path) -> None:
    config = dataset(tmp_path / "data", ROWS, "parquet")
    config.text_column = "text"
    with pytest.raises(DataError, match=r"hub=.*data: no document can be read .*no_text 10.* text_column=text"):
        documents_of(config)


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("z.jsonl", b'{"code": "password-1', "not_json"),
        ("z.jsonl", b'{"code": 7}', "no_text"),
        ("z.jsonl.zst", zstandard.compress(b'{"code": "password-1"}')[:-4], "damaged_shard"),
        ("z.json.gz", gzip.compress(b'{"code": "password-1"}')[:-4], "damaged_shard"),
        ("z.parquet", b"password-1", "damaged_shard"),
    ],
    ids=["cut line", "number", "cut zstd", "cut gzip", "not parquet"],
)
def test_a_bad_row_of_a_local_dataset_is_counted_without_its_content(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, data: bytes, reason: str
) -> None:
    config = dataset(tmp_path / "data", ROWS, "jsonl")
    (tmp_path / "data" / name).write_bytes(data)
    *good, bad = documents_of(config)
    assert list(map(read_text, good)) == [row["code"] for row in ROWS]
    with pytest.raises(Rejected, match=reason):
        bad.read()
    assert "password" not in capfd.readouterr().err


def test_a_column_may_change_its_type_between_shards(tmp_path: Path) -> None:
    config = dataset(tmp_path / "data", ROWS, "jsonl")
    for name, licence in (("y.jsonl", '"MIT"'), ("z.ndjson", "[1, {}]")):
        (tmp_path / "data" / name).write_text(f'{{"code": "x", "license": {licence}}}\n')
    assert [read_meta(each)["license"] for each in documents_of(config)] == [None] * len(ROWS) + ["MIT", None]


def test_a_long_window_of_zstd_is_read(tmp_path: Path) -> None:
    config = dataset(tmp_path / "data", [], "jsonl")
    long = zstandard.ZstdCompressionParameters(window_log=30)
    compressor = zstandard.ZstdCompressor(compression_params=long).compressobj()
    data = compressor.compress(b'{"code": "x"}\n') + compressor.flush()
    (tmp_path / "data" / "a.jsonl.zst").write_bytes(data)
    assert list(map(read_text, documents_of(config))) == ["x"]


@pytest.mark.parametrize(
    ("split", "names"),
    [("train", ["data/train-0.jsonl"]), ("test", ["data/test-0.jsonl", "test/a.jsonl"]), ("validation", [])],
)
def test_a_local_dataset_has_the_splits_that_its_names_say(tmp_path: Path, split: str, names: list[str]) -> None:
    for name in ("data/train-0.jsonl", "data/test-0.jsonl", "test/a.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"code": name}) + "\n")
    config = CorpusConfig(hub=str(tmp_path), text_column="code", hub_split=split, out="")
    if names:
        assert list(map(read_text, documents_of(config))) == names
    else:
        with pytest.raises(DataError, match="cannot be opened"):
            documents_of(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hub_split": "none"}, "cannot be opened: .*train"),
        ({"hub_config": "none"}, "cannot be opened: .*default"),
        ({"hub": "./none"}, "no such folder"),
    ],
    ids=str,
)
def test_a_dataset_that_cannot_be_opened_says_why(tmp_path: Path, change: dict[str, str], message: str) -> None:
    config = dataset(tmp_path / "data", ROWS, "jsonl")
    for key, value in change.items():
        setattr(config, key, value)
    with pytest.raises(DataError, match=rf"hub=.*{message}"):
        documents_of(config)


def test_an_error_of_the_library_without_a_message_is_still_one_of_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(DataError, match="hub=me/code cannot be opened"):
        list(hub_documents(CorpusConfig(hub="me/code", out="")))


def test_a_rule_on_extensions_can_accept_unknown_languages(tmp_path: Path) -> None:
    (tmp_path / "a.strange").write_text(CODE)
    with pytest.raises(Rejected, match="no_language"):
        found(tmp_path)[0].read()
    rules = FilterConfig(extensions=[".strange"])
    assert read_text(found(tmp_path, rules=rules)[0]) == CODE
