"""Scores of text, in training's validation and in `clippy evaluate`, against sums over single tokens."""

import json
import math
import shlex
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import gpt_neo, small_bpe
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from clippy_train.cli import main
from clippy_train.config import DataConfig, TrainConfig
from clippy_train.data.scored import Groups, first_blocks, language_label, scored_blocks, scored_windows
from clippy_train.data.stream import Stream
from clippy_train.evaluate.results import weights_hash
from clippy_train.model.score import add_scores, measures, new_sums
from clippy_train.shards.sources import open_corpus
from clippy_train.tokenizer import encoder, load_tokenizer
from clippy_train.train.data import DataModule

LANGUAGES = ["Python", "C", None, "C++"]


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Path) -> PreTrainedTokenizerFast:
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


def documents(corpus: Path) -> list[dict[str, Any]]:
    paths = sorted((corpus / "validation").iterdir())
    lines = [line for path in paths for line in zstandard.decompress(path.read_bytes()).decode().split("\n")]
    return [json.loads(line) for line in lines if line.startswith("{")]


# Rows


@pytest.mark.parametrize("seq_len", [2, 7, 32])
def test_every_token_of_a_block_has_the_language_of_its_document(
    corpus: Path, tokenizer: PreTrainedTokenizerFast, seq_len: int
) -> None:
    data = DataConfig(path=str(corpus))
    stream = Stream(
        open_corpus(data, "validation"), encoder(tokenizer), seq_len, eos=tokenizer.eos_token_id, shuffle=False
    )
    groups: Groups[str] = Groups()
    described = open_corpus(data, "validation", with_meta=True)
    rows = list(scored_blocks(first_blocks(stream), described, language_label, groups))
    names = {number: name for name, number in groups.items()}
    expected = [
        (token, each["meta"]["repo_language"] or "unknown")
        for each in documents(corpus)
        for token in [*tokenizer(each["text"])["input_ids"], tokenizer.eos_token_id]
    ]
    shown = [(int(t), names[int(g)]) for row in rows for t, g in zip(row.tokens, row.group, strict=True)]
    assert shown == expected[: len(expected) // seq_len * seq_len]


@settings(max_examples=50)
@given(seq_len=st.integers(2, 40), data=st.data())
def test_windows_score_every_token_of_every_document_once_and_in_its_context(
    corpus: Path, tokenizer: PreTrainedTokenizerFast, seq_len: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, seq_len - 1))
    described = open_corpus(DataConfig(path=str(corpus)), "validation", with_meta=True)
    start = tokenizer.eos_token_id
    groups: Groups[str] = Groups()
    rows = list(scored_windows(described, encoder(tokenizer), start, seq_len, stride, language_label, groups))
    scored = [(int(t), int(g)) for row in rows for t, g in zip(row.tokens, row.group, strict=True) if g]
    assert scored == [
        (token, groups[each["meta"]["repo_language"] or "unknown"])
        for each in documents(corpus)
        for token in tokenizer(each["text"])["input_ids"]
    ]
    assert not any(row.group[0] for row in rows)  # the first token of a row is never a target
    for row in rows:
        first = int(np.flatnonzero(row.group)[0])
        assert first == 1 or first >= seq_len - stride  # the first window, or enough context


# Sums


def test_sums_by_group_match_a_sum_over_single_targets() -> None:
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
    train_config: Callable[..., TrainConfig], tokenizer: PreTrainedTokenizerFast, corpus: Path, world_size: int
) -> None:
    config = train_config(
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


# The verb


@pytest.fixture(scope="module")
def models(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A GPT-Neo with the tiny tokenizer, and a GPT-2 with another tokenizer, without whitespace tokens."""
    root = tmp_path_factory.mktemp("models")
    gpt_neo(vocab_size=len(tokenizer), seed=1).save_pretrained(root / "neo")
    tokenizer.save_pretrained(root / "neo")
    other = small_bpe()
    config = GPT2Config(vocab_size=len(other), n_positions=48, n_embd=32, n_layer=2, n_head=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(root / "gpt2")
    other.save_pretrained(root / "gpt2")
    return {"neo": root / "neo", "gpt2": root / "gpt2"}


def evaluated(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    out = tmp_path / "results.json"
    assert main(["evaluate", "task=perplexity", f"out={out}", *arguments]) == 0
    results: dict[str, Any] = json.loads(out.read_text())
    return results


@pytest.mark.slow
@pytest.mark.parametrize("stride", [None, 5])
def test_scores_match_plain_transformers_one_row_at_a_time(
    stride: int | None, models: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    """The oracle reads the documents itself and computes the logits of one row at a time, without batches."""
    both = f"model=[{models['neo']},{models['gpt2']}]"
    windows = [] if stride is None else [f"stride={stride}"]
    found = evaluated(
        tmp_path, both, f"data.path={corpus}", "seq_len=24", "batch_size=3", *windows
    )["results"]  # fmt: skip
    for folder in models.values():
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert isinstance(tokenizer, PreTrainedTokenizerFast)
        sums: dict[str, np.ndarray] = {}
        for ids, labels, first in oracle_rows(corpus, tokenizer, 24, stride):
            with torch.no_grad():
                log_probs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            for position in range(first, len(ids)):
                nats = -log_probs[position - 1, ids[position]].item()
                special = ids[position] == tokenizer.eos_token_id
                size = 0 if special else len(tokenizer.convert_ids_to_tokens(ids[position]))  # a character a byte
                for key in ("total", *labels[position]):
                    sums[key] = sums.get(key, np.zeros(3)) + np.array([nats, 1, size])
        shown = found[str(folder)]
        flat = {"total": shown["total"], **shown["languages"], **shown["repositories"]}
        assert flat.keys() == sums.keys()
        for key, (nats, targets, size) in sums.items():
            assert flat[key]["loss"] == pytest.approx(nats / targets, rel=1e-5)
            assert flat[key]["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
            assert (flat[key]["tokens"], flat[key]["bytes"]) == (targets, size)
    if stride:  # every model is scored on every byte
        size = sum(len(each["text"].encode()) for each in documents(corpus))
        assert {each["total"]["bytes"] for each in found.values()} == {size}


Label = tuple[str, str]  # language, repository


def oracle_rows(
    corpus: Path, tokenizer: PreTrainedTokenizerFast, seq_len: int, stride: int | None
) -> Iterator[tuple[list[int], list[Label], int]]:
    """The ids, the label of each token and the first scored position of each row."""
    end = tokenizer.eos_token_id
    packed: list[tuple[int, Label]] = []
    for each in documents(corpus):
        label = (each["meta"]["repo_language"] or "unknown", each["meta"]["repo_name"])
        ids = tokenizer(each["text"])["input_ids"]
        packed += [(token, label) for token in [*ids, end]]
        for position, token in enumerate(ids if stride else []):
            assert stride
            # a token is scored in the first window that reaches it
            begin = max(0, -(-(position + 2 - seq_len) // stride) * stride)
            context = [end, *ids][begin : position + 1]
            yield [*context, token], [label] * (len(context) + 1), len(context)
    for begin in range(0, len(packed) - seq_len + 1, seq_len) if not stride else ():
        ids, labels = zip(*packed[begin : begin + seq_len], strict=True)
        yield list(ids), list(labels), 1


def test_tokens_per_byte_are_reported_with_and_without_the_whitespace_tokens(
    models: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    names = [str(models["neo"]), str(models["gpt2"])]
    found = evaluated(tmp_path, f"model={names}".replace("'", ""), f"data.path={corpus}", "seq_len=24", "stride=8")[
        "results"
    ]
    texts = [each["text"] for each in documents(corpus)]
    size = sum(len(text.encode()) for text in texts)
    for name in names:
        tokenizer = AutoTokenizer.from_pretrained(name)
        count = sum(len(tokenizer(text)["input_ids"]) for text in texts)
        assert found[name]["tokens_per_byte"] == pytest.approx(count / size)
    neo, other = (found[name] for name in names)
    assert neo["tokens_per_byte"] < neo["tokens_per_byte_without_whitespace_tokens"]
    assert other["tokens_per_byte"] == other["tokens_per_byte_without_whitespace_tokens"]


def test_the_results_name_their_command_and_their_models(models: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    arguments = [f"model={models['neo']}", f"data.path={corpus}", "seq_len=24", "max_rows=3"]
    found = evaluated(tmp_path, *arguments)
    assert found["results"][str(models["neo"])]["total"]["tokens"] == 3 * 23
    again = shlex.split(found["about"]["command"])[1:]
    assert evaluated(tmp_path, *again[1:]) == found
    assert found["about"]["models"] == {str(models["neo"]): weights_hash(models["neo"])}


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["data.path=x"], 2, "model=DIR"),
        (["model={neo}"], 2, "data.path"),
        (["model=[{neo}]", "data.path={corpus}", "seq_len=100"], 2, "64 positions"),
        (["model=[{neo}]", "data.path={corpus}", "stride=64"], 2, "stride=64 must be below seq_len=64"),
        (["model=[{neo}]", "data.path={corpus}", "seq_len=8", "stride=8"], 2, "stride=8 must be below seq_len=8"),
        (["model=[{neo}]", "data.path={corpus}", "split=test"], 3, "test"),
        (["model=[{neo}/none]", "data.path={corpus}"], 2, "no model could be loaded"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    arguments: list[str],
    code: int,
    expected: str,
    models: dict[str, Path],
    corpus: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    filled = [argument.format(neo=models["neo"], corpus=corpus) for argument in arguments]
    assert main(["evaluate", "task=perplexity", *filled]) == code
    assert expected in capsys.readouterr().err
