"""Scores of text: in training's validation and in `clippy evaluate`, against sums taken token by token."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from clippy_train.config import DataConfig, TrainConfig
from clippy_train.data.module import DataModule, encoder
from clippy_train.data.rows import Groups, block_rows, first_blocks, language, window_rows
from clippy_train.data.stream import Stream
from clippy_train.model.score import add_scores, measures, new_sums
from clippy_train.sources import open_corpus
from clippy_train.tokenizer import load_tokenizer

LANGUAGES = ["Python", "C", None, "C++"]


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Path) -> Any:
    return load_tokenizer(tiny_tokenizer)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 validation documents in 3 shards, in four languages and eight repositories; one line is not a document."""
    folder = tmp_path_factory.mktemp("mixed")
    rng = np.random.default_rng(0)
    lines = []
    for number in range(40):
        words = rng.choice(["def", "return", "    ", "\t\t", "x", "é", "(", ")", "\n"], size=rng.integers(1, 60))
        meta = {"repo_name": f"repo{number % 8}", "repo_language": LANGUAGES[number % 4], "stars": None}
        lines.append(json.dumps({"text": " ".join(words), "meta": meta}))
    lines.insert(17, "no document")
    for split in ("train", "validation"):
        (folder / split).mkdir()
        for shard, part in enumerate((lines[:5], lines[5:30], lines[30:])):
            content = zstandard.compress("\n".join(part).encode())
            (folder / split / f"{shard}.jsonl.zst").write_bytes(content)
    return folder


def documents(corpus: Path) -> list[dict]:
    paths = sorted((corpus / "validation").iterdir())
    lines = [line for path in paths for line in zstandard.decompress(path.read_bytes()).decode().split("\n")]
    return [json.loads(line) for line in lines if line.startswith("{")]


# Rows


@pytest.mark.parametrize("seq_len", [2, 7, 32])
def test_every_token_of_a_block_has_the_language_of_its_document(corpus: Path, tokenizer: Any, seq_len: int) -> None:
    data = DataConfig(path=str(corpus))
    stream = Stream(
        open_corpus(data, "validation"), encoder(tokenizer), seq_len, eos=tokenizer.eos_token_id, shuffle=False
    )
    groups: Groups[str] = Groups()
    described = open_corpus(data, "validation", described=True)
    rows = list(block_rows(first_blocks(stream), described, language, groups))
    names = {number: name for name, number in groups.items()}
    expected = [
        (token, each["meta"]["repo_language"] or "unknown")
        for each in documents(corpus)
        for token in [*tokenizer(each["text"])["input_ids"], tokenizer.eos_token_id]
    ]
    shown = [(int(t), names[int(g)]) for row in rows for t, g in zip(row.tokens, row.group, strict=True)]
    assert shown == expected[: len(expected) // seq_len * seq_len]


@settings(deadline=None, max_examples=50)
@given(seq_len=st.integers(2, 40), data=st.data())
def test_windows_score_every_token_of_every_document_once_and_in_its_context(
    corpus: Path, tokenizer: Any, seq_len: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, seq_len - 1))
    described = open_corpus(DataConfig(path=str(corpus)), "validation", described=True)
    start = tokenizer.eos_token_id
    groups: Groups[str] = Groups()
    rows = list(window_rows(described, encoder(tokenizer), start, seq_len, stride, language, groups))
    scored = [(int(t), int(g)) for row in rows for t, g in zip(row.tokens, row.group, strict=True) if g]
    assert scored == [
        (token, groups[each["meta"]["repo_language"] or "unknown"])
        for each in documents(corpus)
        for token in tokenizer(each["text"])["input_ids"]
    ]
    assert not any(row.group[0] for row in rows)  # a row's first token is never a target
    for row in rows:
        first = int(np.flatnonzero(row.group)[0])
        assert first == 1 or first >= seq_len - stride  # the first window, or enough context


# Sums


def test_sums_by_group_are_those_taken_one_target_at_a_time() -> None:
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(5, 11, generator=generator)
    ids, group = (torch.randint(top, (5, 12), generator=generator) for top in (30, 4))
    num_bytes = torch.randint(9, (30,), generator=generator)
    expected = np.zeros((4, 3))
    for row in range(5):
        for position in range(11):
            target = ids[row, position + 1]
            expected[group[row, position + 1]] += [losses[row, position], 1, num_bytes[target]]
    sums = new_sums(3)
    for half in (slice(0, 2), slice(2, 5)):
        add_scores(sums, losses[half], ids[half], group[half], num_bytes)
    assert sums.numpy() == pytest.approx(expected, rel=1e-12)
    nats, targets, total = expected[1:].sum(axis=0)
    total_measures = measures(sums.numpy()[1:].sum(axis=0))
    assert total_measures["loss"] == pytest.approx(nats / targets)
    assert total_measures["perplexity"] == pytest.approx(math.exp(nats / targets))
    assert total_measures["bits_per_byte"] == pytest.approx(nats / total / math.log(2))


@pytest.mark.parametrize("world_size", [1, 3])
def test_validation_knows_the_languages_of_its_rows_on_every_rank(
    train_config: Any, tokenizer: Any, corpus: Path, world_size: int
) -> None:
    config: TrainConfig = train_config(
        f"data.path={corpus}", "data.seq_len=16", "data.streams=6", f"trainer.devices={world_size}",
        "trainer.global_batch_size=6", "trainer.micro_batch_size=1", "trainer.eval_micro_batch_size=4",
        "trainer.val_samples=9",
    )  # fmt: skip
    counted: Counter[str] = Counter()
    for rank in range(world_size):
        module = DataModule(config, tokenizer, rank, np.zeros((6, 5), dtype=np.int64))
        for batch in module.val_dataloader():
            counted.update(module.languages[number - 1] for number in batch["group"].flatten().tolist() if number)
    expected = [
        each["meta"]["repo_language"] or "unknown"
        for each in documents(corpus)
        for _ in [*tokenizer(each["text"])["input_ids"], tokenizer.eos_token_id]
    ]
    assert counted == Counter(expected[: 9 * 16])
    assert len(counted) > 1
