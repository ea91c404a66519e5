"""Mixtures: which stream reads which source, and that every promise about the order of the data holds for them."""

import json
import os
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations_with_replacement, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from support import oracle
from support.runs import Runs, rank_pids
from transformers import PreTrainedTokenizerFast

from clippy_train.cli import main
from clippy_train.compose import compose
from clippy_train.config import ExportConfig, FilterConfig, MixtureSource, TrainConfig, from_values, load, save, values
from clippy_train.data.mixture import open_sources, source_names
from clippy_train.data.order import deal, spread
from clippy_train.data.stream import COUNTS
from clippy_train.errors import ConfigError, DataError
from clippy_train.hf.export import write_card
from clippy_train.plan import make_plan, plan_rows
from clippy_train.run.changes import changes
from clippy_train.run.checkpoint import read_checkpoint
from clippy_train.run.folder import CONFIG, LEDGER, METRICS, checkpoint_folders, checkpoint_step
from clippy_train.run.identity import data_identity
from clippy_train.run.rows import read_rows
from clippy_train.sweep.trials import Trial, differences, settings_that_matter
from clippy_train.tokenizer import load_tokenizer
from clippy_train.train.callbacks.progress import Progress, fresh_cursors
from clippy_train.train.data import DataModule

SHORT = 1500  # bytes of the longest document of the source `short`
STREAMS = {"all": 4, "short": 3, "made-up": 1}  # of 8, by the weights below


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of one shard in each split, without a manifest."""
    folder = tmp_path_factory.mktemp("made") / "made-up"
    for split, count in (("train", 12), ("validation", 6)):
        (folder / split).mkdir(parents=True)
        texts = [f"def made_up_{number}(x):\n    return x + {number}  # {'more ' * 20}\n" for number in range(count)]
        lines = "".join(json.dumps({"text": text, "meta": {"repo_language": "Lua"}}) + "\n" for text in texts)
        (folder / split / "0.jsonl").write_text(lines)
    return folder


@pytest.fixture(scope="module")
def sources(tiny_corpus: Path, made_up: Path) -> str:
    """Three sources as an override: a corpus, its short documents, and a small one."""
    return (
        f"data.sources=[{{path:{tiny_corpus},weight:8,name:all}},"
        f"{{path:{tiny_corpus},weight:6,name:short,filter:{{max_bytes:{SHORT}}}}},{{path:{made_up},weight:2}}]"
    )


@pytest.fixture(scope="module")
def config(tiny_tokenizer: Path, sources: str) -> Callable[..., TrainConfig]:
    def build(ranks: int = 1, workers: int = 0, *overrides: str) -> TrainConfig:
        return compose(
            TrainConfig,
            [
                "experiment=demo", "data.path=null", sources, f"tokenizer.base={tiny_tokenizer}", "data.seq_len=32",
                "data.streams=8", "data.window=8", f"data.num_workers={workers}", "trainer.global_batch_size=16",
                "trainer.micro_batch_size=2", f"trainer.devices={ranks}", "trainer.eval_micro_batch_size=2", *overrides,
            ],
        )  # fmt: skip

    return build


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Path) -> PreTrainedTokenizerFast:
    loaded: PreTrainedTokenizerFast = load_tokenizer(tiny_tokenizer)
    return loaded


# Streams are dealt to sources


@given(st.integers(1, 8), st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_streams_are_dealt_as_near_to_the_weights_as_whole_numbers_allow(count: int, weights: list[int]) -> None:
    def error(dealt: list[int]) -> int:
        """Squared, times the square of the sum of the weights."""
        return sum((each * sum(weights) - count * weight) ** 2 for each, weight in zip(dealt, weights, strict=True))

    every = combinations_with_replacement(range(len(weights)), count)
    best = min(error([chosen.count(index) for index in range(len(weights))]) for chosen in every)
    dealt = deal(count, weights)
    assert sum(dealt) == count
    assert error(dealt) == best
    for first in range(len(weights)):
        for second in range(first):
            assert weights[first] != weights[second] or dealt[second] >= dealt[first]


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=5), st.floats(1e-3, 1e3))
def test_only_the_ratios_of_weights_matter(weights: list[float], factor: float) -> None:
    assume(all(weight * factor * 2**60 != float("inf") for weight in weights))
    assert deal(64, weights) == deal(64, [weight * 2**20 for weight in weights])
    assert deal(10, [0.1, 0.2, 0.3, 0.4]) == [1, 2, 3, 4]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=5))
def test_every_stretch_of_streams_has_nearly_the_shares_of_all(counts: list[int]) -> None:
    """So ranks, and the loader processes of a rank, have as much to do as the others."""
    dealt = spread(counts)
    assert Counter(dealt) == dict(enumerate(counts))
    for begin in range(len(dealt)):
        for end in range(begin + 1, len(dealt) + 1):
            for index, count in enumerate(counts):
                exact = count * (end - begin) / len(dealt)
                assert abs(dealt[begin:end].count(index) - exact) < 2


# The order


class Sequence(NamedTuple):
    stream: int
    cursor: tuple[int, ...]
    ids: tuple[int, ...]


class Step(NamedTuple):
    sequences: list[Sequence]
    spans: list[oracle.Span]


def train(
    config: TrainConfig, tokenizer: PreTrainedTokenizerFast, count: int, cursors: np.ndarray | None = None
) -> list[Step]:
    """The next steps, rank by rank."""
    done = [Step([], []) for _ in range(count)]
    starts = fresh_cursors(config.data.streams) if cursors is None else cursors
    for rank in range(config.world_size):
        batches = iter(DataModule(config, tokenizer, rank, starts).train_dataloader())
        for step in done:
            for batch in islice(batches, config.micro_steps):
                for (stream, *cursor), ids in zip(batch["cursor"].tolist(), batch["input_ids"].tolist(), strict=True):
                    step.sequences.append(Sequence(stream, tuple(cursor), tuple(ids)))
                step.spans.extend(batch["spans"].tolist())
    return done


def committed(config: TrainConfig, trained: list[Step]) -> np.ndarray:
    cursors = fresh_cursors(config.data.streams)
    for step in trained:
        for sequence in step.sequences:
            cursors[sequence.stream] = sequence.cursor
    return cursors


@pytest.mark.slow
def test_a_stream_reads_its_source_as_a_run_on_that_source_alone_would(
    config: Callable[..., TrainConfig], tokenizer: PreTrainedTokenizerFast
) -> None:
    mixed = config()
    trained = [each for step in train(mixed, tokenizer, 4) for each in step.sequences]
    found = open_sources(mixed.data, "train")
    assert {source.name: len(source.streams) for source in found} == STREAMS
    for source in found:
        place, rules = source.settings.path, source.settings.filter
        alone = replace(mixed.data, sources=[], streams=len(source.streams), path=place, filter=rules)
        batch = replace(mixed.trainer, global_batch_size=2 * len(source.streams), micro_batch_size=1)
        expected = train(replace(mixed, data=alone, trainer=batch), tokenizer, 4)
        shown = [
            each._replace(stream=source.streams.index(each.stream)) for each in trained if each.stream in source.streams
        ]
        assert sorted(shown) == sorted(each for step in expected for each in step.sequences)


@pytest.mark.processes
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_mixtures_steps_are_the_same_for_any_ranks_loaders_and_restarts(
    config: Callable[..., TrainConfig], tokenizer: PreTrainedTokenizerFast, ranks: int, workers: int
) -> None:
    expected = train(config(), tokenizer, 6)
    first = train(config(ranks, workers), tokenizer, 3)
    restarted = train(config(ranks, workers), tokenizer, 4, committed(config(), first[:2]))
    for trained in (first, [*first[:2], *restarted]):
        assert [sorted(step.sequences) for step in trained] == [
            sorted(step.sequences) for step in expected[: len(trained)]
        ]


@pytest.mark.slow
def test_every_document_of_each_sources_epochs_is_trained_once_and_shares_are_those_of_the_streams(
    config: Callable[..., TrainConfig], tokenizer: PreTrainedTokenizerFast, tiny_corpus: Path, made_up: Path
) -> None:
    """Over attempts with other ranks, each of which loses its last step."""
    trained: list[Step] = []
    sources = open_sources(config().data, "train")

    def spans_of(name: str) -> list[oracle.Span]:
        (streams,) = (source.streams for source in sources if source.name == name)
        return [span for step in trained for span in step.spans if span[0] in streams]

    for ranks in (1, 4, 2, 8, 1, 2, 4, 1, 2, 4, 8, 1):
        trained += train(config(ranks), tokenizer, 25, committed(config(), trained))[:-1]
        epochs = {name: oracle.completed_epochs(spans_of(name)) if trained else 0 for name in STREAMS}
        if min(epochs.values()) >= 1:
            break

    def encode(text: str) -> list[int]:
        return [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]

    every = oracle.read_documents(tiny_corpus / "train", encode)
    sizes = oracle.read_documents(tiny_corpus / "train", lambda text: [0] * len(text.encode()))
    lines = (made_up / "train" / "0.jsonl").read_text().splitlines()
    documents = {
        "all": every,
        "short": {place: ids for place, ids in every.items() if len(sizes[place]) <= SHORT},
        "made-up": {(0, line): encode(json.loads(text)["text"]) for line, text in enumerate(lines)},
    }
    assert 0 < len(documents["short"]) < len(documents["all"])
    assert len(set(epochs.values())) > 1
    for name, of_source in documents.items():
        assert epochs[name] >= 1
        for epoch in range(epochs[name]):
            assert oracle.lost_and_repeated(of_source, spans_of(name), epoch) == (0, 0)
        assert oracle.lost_and_repeated(of_source, spans_of(name), epochs[name])[1] == 0
        tokens = sum(end - first for *_, first, end in spans_of(name))
        assert tokens * 8 == STREAMS[name] * len(trained) * 16 * 32


def test_settings_of_a_sweeps_trial_are_those_of_its_file(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """What a sweep composes, and what a run wrote: compared to tell whether results are of other settings."""
    mixed = config()
    save(mixed, tmp_path / CONFIG)
    composed = cast(DictConfig, OmegaConf.structured(mixed))
    recorded = cast(DictConfig, OmegaConf.load(tmp_path / CONFIG))
    now = settings_that_matter(composed)
    assert differences(settings_that_matter(recorded), now) == ""
    assert json.loads(json.dumps(now))["data.sources"][1]["filter"]["max_bytes"] == SHORT
    trial = Trial({}, [], tmp_path, 10, now, code=0)
    assert not trial.done
    assert Trial({}, [], tmp_path, 10, {**now, "trainer.max_epochs": 1}, code=0).done


def test_the_help_shows_a_mixture_and_the_keys_of_a_source(capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "experiment=demo", "data.path=null", "data.sources=[{path:A,weight:3},{path:B}]", "--help"])
    shown = capsys.readouterr().out
    assert '{"path": "A"' in shown
    assert "data.sources[].weight: null" in shown


def test_lines_that_cannot_be_used_are_counted_by_the_shard_of_their_source(
    config: Callable[..., TrainConfig], tokenizer: PreTrainedTokenizerFast, made_up: Path, sources: str, tmp_path: Path
) -> None:
    bad = tmp_path / "bad" / "train" / "0.jsonl"
    bad.parent.mkdir(parents=True)
    bad.write_text('{"text": 1}\n' * 50 + (made_up / "train" / "0.jsonl").read_text())
    mixed = config(1, 0, sources.replace(str(made_up), f"{tmp_path}/bad"))
    start = fresh_cursors(8)
    found = open_sources(mixed.data, "train")
    progress = Progress(mixed, start, np.zeros(len(COUNTS), dtype=np.int64), found)
    unused: Any = None  # the callback does not read the module
    trainer: Any = SimpleNamespace(global_step=0)
    for batch in islice(DataModule(mixed, tokenizer, 0, start).train_dataloader(), 16):
        progress.on_train_batch_end(trainer, unused, None, batch, 0)
    (epoch,) = progress.cursors[list(found[2].streams), 0]
    assert progress.rejected == {str(bad): 50 * (1 + epoch)}


# What is refused


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("[{path:A},{path:B,hub:b}]", "data.sources[1].path=B and data.sources[1].hub=b: set exactly one of them"),
        ("[{weight:1}]", "data.sources[0].path=null and data.sources[0].hub=null: set exactly one"),
        ("[{path:A},{pth:B}]", "data.sources[1]: unknown key 'pth'; did you mean path?"),
        ("[{path:A,filter:{langs:[C]}}]", "data.sources[0]: unknown key 'filter.langs'; did you mean filter.languages"),
        ("[{path:A,weight:much}]", "data.sources[0].weight: must be a number or null"),
        ("[{path:A,weight:0},{path:B,weight:-1}]", "data.sources[1].weight=-1.0: must be above 0"),
        ("[{path:A,filter:{languages:C}}]", "data.sources[0].filter.languages: must be a list of texts"),
        ("[{path:A,weight:inf}]", "data.sources[0].weight=inf: must be a finite number"),
        ("[{path:A,name:x},{path:B,name:x}]", "data.sources: 2 sources have the name x"),
        ("[{path:A,name:a/b}]", "data.sources[0].name=a/b: must be letters"),
        ("[{path:A,filter:{min_stars:-1}}]", "data.sources[0].filter.min_stars=-1: must be at least 0"),
        ("[{path:A,hub_config:x}]", "data.sources[0].hub_config=x needs data.sources[0].hub"),
        ("[A,B]", "must be a list such as [{path:A,weight:3},{path:B}]"),
        ("{path:A}", "must be a list such as [{path:A,weight:3},{path:B}]"),
    ],
)
def test_a_wrong_source_is_named_with_the_key_at_fault(value: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        compose(TrainConfig, ["experiment=demo", "data.path=null", f"data.sources={value}"])
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.path=C"], "data.path=C and data.sources are both set, but each source has its own path: set data.path"),
        (["data.filter.min_stars=3"], "each source has its own filter.min_stars: set data.filter.min_stars=null"),
        (["data.prompt_column=text"], "data.prompt_column=text is also data.sources[0].text_column: name two fields"),
        (["data.text_column=code"], "each source has its own text_column: set data.text_column=text"),
        (
            ["data.source_temperature=2"],
            "data.sources[0].weight=3.0 and data.source_temperature=2.0: weights or a temperature",
        ),
        (
            ["data.sources=[]", "data.path=A", "data.source_temperature=2"],
            "data.source_temperature=2.0 needs data.sources",
        ),
    ],
)
def test_what_contradicts_a_mixture_is_refused(overrides: list[str], said: str) -> None:
    given = ["experiment=demo", "data.path=null", "data.sources=[{path:A,weight:3},{path:B}]", *overrides]
    with pytest.raises(ConfigError) as refused:
        compose(TrainConfig, given)
    assert said in str(refused.value)


@pytest.mark.slow
def test_a_source_without_streams_or_folder_is_refused(config: Callable[..., TrainConfig], tiny_corpus: Path) -> None:
    few = config(1, 0, f"data.sources=[{{path:{tiny_corpus},weight:20}},{{path:{tiny_corpus}}}]")
    with pytest.raises(ConfigError, match=r"data\.sources\[1\] gets none of the data\.streams=8, .*data\.streams=21 "):
        open_sources(few.data, "train")
    enough = config(1, 0, f"data.sources=[{{path:{tiny_corpus},weight:20}},{{path:{tiny_corpus}}}]", "data.streams=24",
                    "trainer.global_batch_size=24")  # fmt: skip
    assert [len(source.streams) for source in open_sources(enough.data, "train")] == [23, 1]
    missing = config(1, 0, f"data.sources=[{{path:{tiny_corpus}}},{{path:/nowhere}}]")
    with pytest.raises(DataError, match=r"data\.sources\[1\]\.path=/nowhere: no such folder"):
        open_sources(missing.data, "train")


# Names, sizes, identity


def test_names_are_the_given_ones_or_derived_and_all_different() -> None:
    listed = "[{path:/a/code},{path:/b/code},{path:'/c/{split}/*.zst',name:code-2},{hub:org/the-stack@v1},{path:C++}]"
    data = compose(TrainConfig, ["experiment=demo", "data.path=null", f"data.sources={listed}"]).data
    assert source_names(data) == ["code", "code-3", "code-2", "the-stack", "C++"]


def test_a_mixture_survives_the_files_of_a_run(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    mixed = config()
    mixed.data.sources[0] = MixtureSource(path="${HOME}", weight=3.0, filter=FilterConfig(languages=["C++"]))
    save(mixed, tmp_path / CONFIG)
    assert load(tmp_path / CONFIG) == mixed
    assert from_values(json.loads(json.dumps(values(mixed)))) == mixed


def sized(folder: Path, corpus: Path, size: int) -> Path:
    """A corpus whose manifest says that its training split has `size` bytes of text."""
    (folder / "train").mkdir(parents=True)
    (folder / "train" / "0.jsonl").write_text('{"text": "x"}\n')
    manifest = json.loads((corpus / "manifest.json").read_text())
    manifest["splits"]["train"]["text_bytes"] = size
    manifest["languages"] = {"C": {"text_bytes": 300}, "Python": {"text_bytes": 100}}
    manifest["text_bytes"] = 400
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize(("temperature", "streams"), [(1, [64, 16, 48]), (2, [52, 26, 45]), (1e9, [43, 42, 43])])
def test_a_temperature_weighs_sources_by_their_sizes(
    config: Callable[..., TrainConfig], tiny_corpus: Path, tmp_path: Path, temperature: float, streams: list[int]
) -> None:
    first, second = (sized(tmp_path / str(size), tiny_corpus, size) for size in (4000, 1000))
    listed = f"data.sources=[{{path:{first}}},{{path:{second}}},{{path:{first},filter:{{languages:[c]}}}}]"
    shape = [f"data.streams={sum(streams)}", f"trainer.global_batch_size={2 * sum(streams)}"]
    found = open_sources(config(1, 0, listed, f"data.source_temperature={temperature}", *shape).data, "train")
    weights = [size ** (1 / temperature) for size in (4000, 1000, 3000)]
    assert [len(source.streams) for source in found] == deal(sum(streams), weights) == streams


@pytest.mark.parametrize("filtered", [True, False])
def test_a_temperature_needs_every_size(
    config: Callable[..., TrainConfig], tiny_corpus: Path, made_up: Path, filtered: bool
) -> None:
    unknown = f"{{path:{tiny_corpus},filter:{{min_bytes:9}}}}" if filtered else f"{{path:{made_up}}}"
    data = config(1, 0, f"data.sources=[{{path:{tiny_corpus}}},{unknown}]", "data.source_temperature=2").data
    with pytest.raises(ConfigError, match=r"needs the size of each source: data\.sources\[1\]\.path=.* weight instead"):
        open_sources(data, "train")


@pytest.mark.slow
def test_a_mixture_may_be_moved_and_renamed_but_not_mixed_otherwise(
    config: Callable[..., TrainConfig], sources: str, made_up: Path, tmp_path: Path
) -> None:
    (tmp_path / "moved").symlink_to(made_up)
    before = config()

    def identity(override: str) -> dict[str, object]:
        changed = config(1, 0, override)
        return data_identity(changed, open_sources(changed.data, "train"))

    then = data_identity(before, open_sources(before.data, "train"))
    moved = sources.replace(str(made_up), f"{tmp_path}/moved").replace("weight:8", "weight:8.0")
    assert identity(moved) == then
    for old, new in [("weight:2", "weight:4"), (f"max_bytes:{SHORT}", "max_bytes:900"), ("name:all", "text_column:x")]:
        differences = {name for name, value in identity(sources.replace(old, new)).items() if then[name] != value}
        assert differences
        assert all(name.startswith("data.sources[") for name in differences)

    save(before, tmp_path / CONFIG)
    (said,) = changes(tmp_path, config(1, 0, moved), 7)
    assert said.startswith("data.sources was [{")
    assert said.endswith("applied from step 8 on, where the content is the same")


# Real runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, tiny_tokenizer: Path, sources: str) -> Runs:
    made = Runs(tmp_path_factory.mktemp("mixtures"), tiny_corpus, tiny_tokenizer)
    made.settings += [
        "data.path=null", sources, "data.streams=8", "trainer.global_batch_size=16", "trainer.precision=fp32",
        "trainer.audit=true", "trainer.val_samples=8",
    ]  # fmt: skip
    return made


@pytest.fixture(scope="module")
def reference(runs: Runs) -> str:
    """A run on one rank from the first step to the last."""
    runs.train("reference", "strategy=single", "trainer.devices=1")
    return "reference"


def test_a_mixture_that_is_killed_and_resharded_trains_on_the_same_data(runs: Runs, reference: str) -> None:
    two_ranks = ["data.num_workers=2", "strategy=zero1", "trainer.max_steps=4"]
    process = runs.start("moved", *two_ranks)
    runs.wait_for_step("moved", 2, process)
    os.kill(rank_pids(runs.folder("moved"))[0], signal.SIGKILL)
    process.communicate(timeout=60)
    runs.train("moved", *two_ranks)
    said = runs.train("moved", "data.num_workers=0", "strategy=ddp", "trainer.devices=4").stdout
    assert "resharding: " in said
    expected, found = runs.rows(reference), runs.rows("moved")
    assert [row["step"] for row in found] == [row["step"] for row in expected] == list(range(1, 7))
    for name in ("data/digest", *(f"data/{kind}/{source}" for kind in ("tokens", "epoch") for source in STREAMS)):
        assert [row[name] for row in found] == [row[name] for row in expected]
    losses = [[row["train/loss"] for row in rows] for rows in (expected, found)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    ledgers = [list(read_rows(runs.folder(name) / LEDGER)) for name in (reference, "moved")]
    assert [sorted(row["spans"]) for row in ledgers[0]] == [sorted(row["spans"]) for row in ledgers[1]]


def test_reported_tokens_are_those_of_the_ledger(runs: Runs, reference: str) -> None:
    tokens: Counter[str] = Counter()
    reader = dict(enumerate(spread(list(STREAMS.values()))))
    for row, spans in zip(runs.rows(reference), read_rows(runs.folder(reference) / LEDGER), strict=True):
        for stream, *_, first, end in spans["spans"]:
            tokens[list(STREAMS)[reader[stream]]] += end - first
        assert {name: row[f"data/tokens/{name}"] for name in STREAMS} == tokens
    assert sum(tokens.values()) == row["tokens"]


def test_a_validation_is_scored_in_all_and_by_source(runs: Runs, reference: str) -> None:
    for row in runs.rows(reference, "val/loss"):
        by_source = [row[f"val/sources/loss/{name}"] for name in STREAMS]  # of 4, 3 and 1 blocks
        assert row["val/loss"] == pytest.approx(np.average(by_source, weights=[4, 3, 1]), rel=1e-6)
        assert row["val/loss/Lua"] == row["val/sources/loss/made-up"]
        assert row["val/sources/bits_per_byte/short"] > 0


def test_a_run_of_one_epoch_ends_with_the_first_source(runs: Runs, tiny_corpus: Path) -> None:
    settings = ["trainer.max_epochs=1", "trainer.max_steps=50", "trainer.log_every_steps=7", "trainer.audit=false"]
    said = runs.train("once", *settings).stdout
    assert f"data.sources[1].path={tiny_corpus}/train: the run ends (trainer.max_epochs=1)" in said
    (last,) = runs.rows("once")[-1:]
    assert 1 < last["step"] < 50
    assert runs.rows("once", "val/loss")[-1]["step"] == last["step"]
    (newest, *_) = checkpoint_folders(runs.folder("once"))
    cursors = read_checkpoint(newest).manifest.cursors
    assert checkpoint_step(newest) == last["step"]
    reader = spread(list(STREAMS.values()))
    epochs = [[epoch for stream, (epoch, *_) in enumerate(cursors) if reader[stream] == source] for source in range(3)]
    assert [min(of_source) for of_source in epochs] == [0, 1, 0]
    assert "finished" in runs.train("once", *settings).stdout

    path = runs.folder("once") / METRICS  # as if it had been killed before its last validation
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "val/loss" not in line))
    runs.train("once", *settings)
    assert [row["step"] for row in runs.rows("once", "val/loss")] == [last["step"]]
    assert runs.rows("once")[-1] == last

    steps = f"trainer.max_steps={last['step'] + 1}"
    assert "trainer.max_epochs was 1, is null: applied" in runs.train("once", *settings[2:], steps).stdout
    assert runs.rows("once")[-1]["data/epoch/short"] == 1


def test_another_mixture_is_refused_on_resume(runs: Runs, reference: str, sources: str) -> None:
    changed = sources.replace("weight:2", "weight:6")
    said = runs.train(reference, "strategy=single", "trainer.devices=1", changed, "trainer.max_steps=9", code=4).stderr
    assert "data.sources[0] streams was 4, is 3" in said


def test_the_card_names_each_source_with_its_share_and_no_folder(
    runs: Runs, reference: str, tiny_corpus: Path, tmp_path: Path
) -> None:
    checkpoint = read_checkpoint(checkpoint_folders(runs.folder(reference))[0])
    write_card(ExportConfig(out=str(tmp_path)), runs.folder(reference), checkpoint, [], tmp_path)
    text = (tmp_path / "README.md").read_text()
    for line in (
        "A mixture of 3 sources.",
        "| all | 8 | 50.00% | 1,536 | 0 |",
        "| short | 6 | 37.50% | 1,152 | 0 |",
        "| made-up | 2 | 12.50% | 384 | 0 |",
        "`made-up` has no record of how it was made",
        "| source | bits per byte at the end |",
    ):
        assert line in text
    assert "all + short + made-up" in text
    assert str(tiny_corpus.parent) not in text


def test_the_plan_says_streams_tokens_and_epochs_of_each_source(
    config: Callable[..., TrainConfig], tiny_corpus: Path
) -> None:
    planned = config(1, 0, "trainer.max_steps=100")
    plan = make_plan(planned)
    rows = dict(plan_rows(planned, plan))
    text = json.loads((tiny_corpus / "manifest.json").read_text())["splits"]["train"]["text_bytes"]
    assert [(each.name, each.streams, each.tokens, each.text_bytes) for each in plan.sources] == [
        ("all", 4, 25_600, text), ("short", 3, 19_200, None), ("made-up", 1, 6_400, None),
    ]  # fmt: skip
    assert plan.sources[0].epochs == pytest.approx(25_600 * 3 / text)
    assert rows["source all"].startswith("4 of 8 streams = 50.00%: 2.56e-05 B tokens, about ")
    assert rows["source short"].endswith("an unknown number of epochs")
