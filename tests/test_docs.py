"""What the docs name exists: links, files, commands, keys, targets, tests; and the picture shows the layers."""

import re
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from clippy_train import __version__
from clippy_train.cli import VERBS
from clippy_train.compose import CONF
from clippy_train.config import TrainConfig, keys

ROOT = Path(__file__).parents[1]
README, CHANGELOG = ROOT / "README.md", ROOT / "CHANGELOG.md"
DOCS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
SCRIPTS = sorted([*ROOT.glob("launch/*"), *ROOT.glob("conf/**/*.yaml"), *ROOT.glob(".github/workflows/*")])
FOLDERS = ("clippy_train", "hydra_plugins", "tests", "benchmarks", "conf", "launch", "docs")
FILES = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# Names that belong to other software
FOREIGN = {"linear_cross_entropy", "loglikelihood_rolling", "data_processing/code_clippy.py"}

GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir())
SCHEMAS = {verb: {name for name, _ in keys(entry.schema)} for verb, entry in VERBS.items()}
KEYS = set[str]().union(*SCHEMAS.values())
SECTIONS = {name.rpartition(".")[0] for name in KEYS} - {""}
FENCE = re.compile(r"^( *)```.*?^\1```", re.MULTILINE | re.DOTALL)

every_doc = pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))


def code(path: Path) -> list[str]:
    """The code of a document: each span, and each line of a fence together with its continuations."""
    text = path.read_text()
    lines = "\n".join(match[0] for match in FENCE.finditer(text)).replace("\\\n", " ").splitlines()
    return [" ".join(each.split()) for each in [*lines, *re.findall(r"`([^`]+)`", FENCE.sub("", text))]]


def links(path: Path) -> Iterator[tuple[Path, str]]:
    """File and anchor of each link of a document that stays in the repository."""
    prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", path.read_text()))
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if not re.match(r"[a-z]+:", link):
            file, _, anchor = link.partition("#")
            yield (path.parent / file).resolve() if file else path, anchor


def anchors(path: Path) -> set[str]:
    """Those that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.*)", FENCE.sub("", path.read_text()), re.MULTILINE)
    texts = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", text).strip().replace(" ", "-") for text in texts}


@every_doc
def test_the_rows_of_a_table_have_as_many_cells_as_its_header(path: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", path.read_text()))  # code may hold a bar
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        _, separator, *_ = rows = table.splitlines()
        assert len({row.replace(r"\|", "").count("|") for row in rows}) == 1, table
        assert re.fullmatch(r"[|:\s-]+", separator), table


@every_doc
def test_links_lead_to_files_and_headings(path: Path) -> None:
    for file, anchor in links(path):
        assert file.exists(), file
        assert not anchor or anchor in anchors(file), f"{file.name}#{anchor}"


def test_every_document_is_reached_from_the_readme() -> None:
    reached, waiting = set[Path](), [README]
    while waiting:
        path = waiting.pop()
        if path not in reached:
            reached.add(path)
            waiting += [file for file, _ in links(path) if file.suffix == ".md"]
    assert set(DOCS) <= reached, set(DOCS) - reached


def is_placeholder(name: str) -> bool:
    """Whether a path ends in a word in capitals, which a reader fills in: `conf/experiment/NAME.yaml`."""
    return bool(re.search(r"(^|_)[A-Z]+(\.\w+)?$", name.rpartition("/")[2])) and not (ROOT / name).exists()


def missing_files(text: str) -> list[str]:
    """Paths in a text, from the root or from the package, that are neither there nor the end of one that is."""
    paths = re.findall(rf"(?<![\w./=-])(?:{'|'.join(FOLDERS)})/[\w./-]*\w", text)
    paths += re.findall(r"(?<![\w./=-])[\w/]+\.(?:py|md|yaml)\b", text)
    ends = [f"/{file.relative_to(ROOT)}" for file in [*FILES, *DOCS]]
    return [
        name
        for name in set(paths) - FOREIGN
        if not (ROOT / name).exists()
        and not is_placeholder(name)
        and not any(end.endswith(f"/{name}") or end.startswith(f"/clippy_train/{name}/") for end in ends)
    ]


@pytest.mark.slow
@every_doc
def test_files_that_are_named_exist(path: Path) -> None:
    in_a_run = {"config.yaml"}
    assert [name for text in code(path) for name in missing_files(text) if name not in in_a_run] == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_scripts_name_exist(path: Path) -> None:
    assert missing_files(path.read_text()) == []


@every_doc
def test_commands_have_the_verbs_and_keys_that_they_name(path: Path) -> None:
    for text in code(path):
        for verb, arguments in re.findall(r"(?:^|[\s(;&/])clippy ([a-z]+)\b([^;#|]*)", text):
            assert verb in VERBS, text
            known = SCHEMAS[verb] | (set(GROUPS) if issubclass(VERBS[verb].schema, TrainConfig) else set())
            assert set(re.findall(r"(?:^|\s)'?\+?([a-z][\w.]*)=", arguments)) <= known, text


def test_the_readme_names_every_verb() -> None:
    assert {verb for verb in VERBS if f"`clippy {verb}" in README.read_text()} == set(VERBS)


@every_doc
def test_keys_that_are_named_exist(path: Path) -> None:
    """`section.key`; a section alone, or `section.*`, stands for all of its keys."""
    sections = "|".join(map(re.escape, sorted(SECTIONS, key=len, reverse=True)))
    files = (".py", ".json", ".jsonl", ".yaml", ".safetensors", ".md", ".csv")
    for text in code(path):
        for name in re.findall(rf"(?<![\w./-])(?:{sections})\.(?:\w+|\*)(?:\.\w+|\.\*)*", text):
            assert name.removesuffix(".*") in KEYS | SECTIONS or name.endswith(files), f"{name} in {text}"


@every_doc
def test_choices_of_groups_that_are_named_exist(path: Path) -> None:
    for text in code(path):
        for group, values in re.findall(rf"(?<![\w.])({'|'.join(GROUPS)})=([a-z]\w*(?:,[a-z]\w*)*)\b(?!\()", text):
            if group not in KEYS:  # `model=` is also a key of other verbs
                for value in set(values.split(",")) - {"null"}:
                    assert (CONF / group / f"{value}.yaml").exists(), f"{group}={value} in {text}"


def makefile_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@every_doc
def test_targets_of_make_that_are_named_exist(path: Path) -> None:
    for text in code(path):
        for named in re.findall(r"(?:^|[\s&;])make ((?:[a-z][a-z-]*\s?)+)", text):
            assert set(named.split()) <= makefile_targets(), text


@pytest.mark.slow
@every_doc
def test_tests_functions_and_classes_that_are_named_exist(path: Path) -> None:
    """A code span that is one word of several parts: `test_...`, `build_strategy`, `CodeLM`."""
    sources = [file for file in [*FILES, ROOT / "Makefile"] if file.suffix in (".py", ".yaml", ".txt", ".sh", "")]
    words = set(re.findall(r"\w+", "\n".join(file.read_text() for file in sources))) | {file.stem for file in FILES}
    for text in code(path):
        if re.fullmatch(r"[A-Za-z]\w*(?:_|[a-z][A-Z])\w*", text):
            assert text in words | FOREIGN, text


def test_every_invariant_names_the_tests_that_guard_it() -> None:
    defined = {name for file in FILES if file.match("tests/test_*.py") for name in defined_tests(file)}
    items = re.split(r"\n(?=- |\n)", (ROOT / "docs" / "architecture.md").read_text())
    invariants = {match[1]: item for item in items if (match := re.match(r"- \*\*([A-Z]\d+)\*\* ", item))}
    assert len(invariants) > 15
    for number, item in invariants.items():
        named = set(re.findall(r"`(test_\w+)`", item))
        assert named, number
        assert named <= defined, number


def defined_tests(file: Path) -> list[str]:
    return re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)


@every_doc
def test_extras_that_are_named_exist(path: Path) -> None:
    named = set(re.findall(r"(?:clippy_train|'\.|\"\.)\[(\w+)\]", path.read_text()))
    assert named <= set(PROJECT["project"]["optional-dependencies"])


def test_the_changelog_begins_with_this_version() -> None:
    newest, *_ = re.findall(r"^## (\d\S*) - \d{4}-\d\d-\d\d$", CHANGELOG.read_text(), re.MULTILINE)
    assert newest == __version__


def test_workflows_run_targets_of_the_makefile_only() -> None:
    workflows = "\n".join(path.read_text() for path in ROOT.glob(".github/workflows/*"))
    commands = re.findall(r"\brun:\s*(.*)", workflows)
    assert {"make check", "make test"} <= set(commands)
    assert {command.removeprefix("make ") for command in commands} <= makefile_targets()


# The picture of the rooms

DOT = ROOT / "docs" / "pictures" / "rooms.dot"
ROOM = re.compile(r'^ *(\w+) +\[pos="[\d.]+,([\d.]+)!".*?label=<<b>(\w+)</b>', re.MULTILINE | re.DOTALL)


def heights() -> dict[str, float]:
    """How high the picture has each room."""
    found = {name: float(height) for name, height, label in ROOM.findall(DOT.read_text()) if name == label}
    assert len(found) > 10
    return found


def test_the_picture_has_every_room() -> None:
    package = ROOT / "clippy_train"
    rooms = {path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert set(heights()) == rooms - {"__init__"}


def test_the_picture_has_the_layers_that_the_linter_checks() -> None:
    (layers,) = (each["layers"] for each in PROJECT["tool"]["importlinter"]["contracts"] if each["type"] == "layers")
    rows = [[heights()[room.rpartition(".")[2]] for room in re.split(r"[|:\s]+", layer)] for layer in layers]
    for upper, lower in pairwise(rows):
        assert min(upper) > max(lower)


def test_the_picture_was_drawn_from_its_source() -> None:
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", DOT.with_suffix(".svg").read_text())
    shown = {text.replace("&#45;", "-").replace("&#160;", " ") for text in texts}
    source = DOT.read_text()
    labels = [*re.findall(r"<b>(\w[\w ]*)</b>", source), *re.findall(r'<font point-size="10">([^<]*)</font>', source)]
    labels += [line for label in re.findall(r'label="([^"]+)"', source) for line in label.split("\\n")]
    assert shown == set(labels)
