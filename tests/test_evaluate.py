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
from support.formats import HUMANEVAL, RIGHT
from support.models import gpt_neo, small_bpe
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from clippy_train.cli import main
from clippy_train.config import FIM_TOKENS, DataConfig, EvaluateConfig, SourceConfig, TokenizerConfig, TrainConfig
from clippy_train.data.objectives import LeftToRight
from clippy_train.data.scored import Group, Groups, first_blocks, language_label, scored_blocks, scored_windows
from clippy_train.data.stream import Stream
from clippy_train.evaluate.completion import LINE_TOKENS, SPAN_LINES, Cut, similarity, split_cuts
from clippy_train.evaluate.results import weights_hash
from clippy_train.model.build import extend_model
from clippy_train.model.load import save_model
from clippy_train.model.sample import Gap, Sampling, complete_prompts, generate_tokens
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
        open_corpus(data, "validation"), LeftToRight(encoder(tokenizer), tokenizer.eos_token_id), seq_len, shuffle=False
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


@pytest.mark.slow
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
    counted: Counter[Group] = Counter()
    for rank in range(world_size):
        module = DataModule(config, tokenizer, rank, np.zeros((6, 5), dtype=np.int64))
        for batch in module.val_dataloader():
            counted.update(module.groups[number - 1] for number in batch["group"].flatten().tolist() if number)
    expected = [
        Group(each["meta"]["repo_language"] or "unknown")
        for each in documents(corpus)
        for _ in [*tokenizer(each["text"])["input_ids"], tokenizer.eos_token_id]
    ]
    assert counted == Counter(expected[: 9 * 16])
    assert len(counted) > 1


@pytest.mark.parametrize("world_size", [1, 3])
def test_validation_scores_every_solution_once_over_all_ranks_in_equal_batches(
    train_config: Callable[..., TrainConfig],
    tokenizer: PreTrainedTokenizerFast,
    corpus: Path,
    tmp_path: Path,
    world_size: int,
) -> None:
    rows = [
        {**HUMANEVAL, "task_id": f"{language}/{number}", "canonical_solution": RIGHT * (1 + number)}
        for number, language in enumerate(["Python", "CPP", "Go", "Python", "CPP", "Go", "Python"])
    ]
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = train_config(
        f"data.path={corpus}", "data.seq_len=64", "data.streams=6", f"trainer.devices={world_size}",
        "trainer.global_batch_size=6", "trainer.micro_batch_size=1", "trainer.eval_micro_batch_size=2",
        "trainer.val_samples=4", f"data.val_problems={problems}",
    )  # fmt: skip
    counted: Counter[Group] = Counter()
    shapes = []
    for rank in range(world_size):
        module = DataModule(config, tokenizer, rank, np.zeros((6, 5), dtype=np.int64))
        batches = list(module.val_dataloader())
        shapes.append([batch["input_ids"].shape for batch in batches])
        for batch in batches:
            counted.update(module.groups[number - 1] for number in batch["group"].flatten().tolist() if number)
    assert all(each == shapes[0] for each in shapes)
    expected = Counter[Group]()
    for row, language in zip(rows, ["Python", "C++", "Go", "Python", "C++", "Go", "Python"], strict=True):
        expected[Group(language, solution=True)] += len(tokenizer(row["canonical_solution"])["input_ids"])
    assert {group: count for group, count in counted.items() if group.solution} == expected


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


def evaluated(tmp_path: Path, *arguments: str, task: str = "perplexity") -> dict[str, Any]:
    out = tmp_path / "results.json"
    assert main(["evaluate", f"task={task}", f"out={out}", *arguments]) == 0
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


@pytest.mark.parametrize("seq_len", [12, 64])
def test_solutions_are_scored_given_their_prompts_as_by_plain_transformers(
    seq_len: int, models: dict[str, Path], tmp_path: Path
) -> None:
    """The oracle takes one token after another. Where windows are short, a solution has several."""
    rows = [
        {
            "task_id": f"{kind}/{number}",
            "prompt": f"def f_{number}(x):\n",
            "canonical_solution": "    return x\n" * size,
        }
        for number, (kind, size) in enumerate([("Python", 1), ("CPP", 2), ("HumanEval", 3)])
    ]
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [f"model={models['neo']}", f"problems={problems}", f"seq_len={seq_len}", "batch_size=2"]
    found = evaluated(tmp_path, *arguments)["results"][str(models["neo"])]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(models["neo"]), load_tokenizer(models["neo"])
    nats: Counter[str] = Counter()
    scored: Counter[str] = Counter()
    for row, language in zip(rows, ("Python", "C++", "Python"), strict=True):
        prompt, solution = (tokenizer(row[name])["input_ids"] for name in ("prompt", "canonical_solution"))
        ids, first = [tokenizer.eos_token_id, *prompt, *solution], 1 + len(prompt)
        begin, done = max(0, min(len(ids) - seq_len, first - seq_len // 2)), first
        while done < len(ids):
            window = ids[begin : begin + seq_len]
            with torch.no_grad():
                log_probs = model(torch.tensor([window])).logits[0].double().log_softmax(-1)
            for position in range(done - begin, len(window)):
                nats[language] -= log_probs[position - 1, window[position]].item()
            done, begin = begin + len(window), begin + max(1, seq_len // 2)
        scored[language] += len(row["canonical_solution"])
    for language in ("Python", "C++"):
        assert found["languages"][language]["bytes"] == scored[language]
        expected = nats[language] / math.log(2) / scored[language]
        assert found["languages"][language]["bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    assert found["total"]["bytes"] == sum(len(row["canonical_solution"]) for row in rows)
    assert "repositories" not in found


# Lines


def test_lines_to_complete_depend_on_the_split_and_the_seed_only(corpus: Path) -> None:
    def cuts(**settings: Any) -> list[Cut]:
        return list(split_cuts(EvaluateConfig(task="completion", data=SourceConfig(path=str(corpus)), **settings)))

    texts = [each["text"] for each in documents(corpus)]
    for each in cuts(n=2):
        assert any(text.startswith(f"{each.context}{each.line}") for text in texts)
        assert str(each.context).endswith("\n")
        assert each.line.strip()
    assert cuts(n=2) == cuts(n=2) != cuts(n=2, seed=1)
    assert set(cuts(n=1)) < set(cuts(n=2))
    assert [each.context for each in cuts(n=1, max_rows=9)] == [
        each.context for each in cuts(n=1)[: len(cuts(n=1, max_rows=9))]
    ]
    every = [index for text in texts for index, line in enumerate(text.splitlines()) if index and line.strip()]
    assert len(cuts(n=1000)) == len(every)


@pytest.mark.parametrize("infill", ["line", "span"])
def test_what_is_filled_in_stands_between_its_context(corpus: Path, infill: str) -> None:
    def cuts(**settings: Any) -> list[Cut]:
        return list(split_cuts(EvaluateConfig(task="completion", data=SourceConfig(path=str(corpus)), **settings)))

    texts = [each["text"] for each in documents(corpus)]
    filled, following = cuts(n=3, infill=infill), cuts(n=3)
    assert filled == cuts(n=3, infill=infill) != cuts(n=3, infill=infill, seed=1)
    for each, line in zip(filled, following, strict=True):
        assert isinstance(each.context, Gap)
        before, after = each.context
        missing = next(
            text[len(before) : len(text) - len(after)]
            for text in texts
            if text.startswith(before + each.line) and text.endswith(after)
        )
        assert missing.rstrip() == each.line != ""
        if infill == "line":
            assert (before, each.line) == (line.context, line.line)
        else:
            assert before.startswith(str(line.context))
            assert before.count("\n") == str(line.context).count("\n")  # it begins in the same line,
            assert not missing[0].isspace()
            assert missing.count("\n") <= SPAN_LINES  # and ends in one of the next
    if infill == "span":
        assert len({each.line.count("\n") for each in filled}) == SPAN_LINES


def test_a_line_is_compared_by_equality_and_by_edits() -> None:
    assert similarity("x = 1", "x = 1") == (True, 1.0)
    assert similarity("", "x") == (False, 0.0)
    equal, similar = similarity("  abcd", "abcf")  # two spaces and d out, f in: 4 edits of 10 characters
    assert not equal
    assert similar == pytest.approx(0.6)


@pytest.mark.slow
def test_lines_are_completed_as_plain_transformers_does(corpus: Path, tmp_path: Path) -> None:
    tokenizer = small_bpe()
    model = gpt_neo(vocab_size=len(tokenizer), positions=96, seed=1)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    arguments = [f"model={tmp_path / 'model'}", f"data.path={corpus}", "n=2", "batch_size=3", "max_rows=12"]
    found = evaluated(tmp_path, *arguments, task="completion")["results"][str(tmp_path / "model")]
    config = EvaluateConfig(task="completion", data=SourceConfig(path=str(corpus)), n=2, max_rows=12)
    scored: dict[str, list[tuple[bool, float]]] = {}
    for cut in split_cuts(config):
        ids = tokenizer(cut.context)["input_ids"][-(96 - LINE_TOKENS) :]
        out = generate_tokens(
            model, torch.tensor([ids]), max_new_tokens=LINE_TOKENS, do_sample=False, eos_token_id=tokenizer.eos_token_id
        )
        text = str(tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)).split("\n")[0].rstrip()
        for name in ("total", cut.language):
            scored.setdefault(name, []).append(similarity(text, cut.line))
    for name, each in {"total": found["total"], **found["languages"]}.items():
        assert each["lines"] == len(scored[name])
        assert each["exact_match"] == pytest.approx(np.mean([exact for exact, _ in scored[name]]))
        assert each["edit_similarity"] == pytest.approx(np.mean([similar for _, similar in scored[name]]))


@pytest.mark.slow
@pytest.mark.parametrize(("infill", "tokens", "end"), [("line", LINE_TOKENS, "\n"), ("span", 3 * LINE_TOKENS, "\0")])
def test_lines_are_filled_in_from_both_sides(
    corpus: Path, tmp_path: Path, infill: str, tokens: int, end: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = small_bpe()
    model = gpt_neo(vocab_size=len(tokenizer), positions=256, seed=1)
    save_model(model, tokenizer, tmp_path / "without")
    extend_model(model, tokenizer, TokenizerConfig(whitespace_tokens=[]), fim_tokens=FIM_TOKENS)
    save_model(model, tokenizer, tmp_path / "model")
    arguments = [f"infill={infill}", f"data.path={corpus}", "max_rows=6"]
    found = evaluated(tmp_path, f"model={tmp_path / 'model'}", *arguments, task="completion")
    config = EvaluateConfig(task="completion", data=SourceConfig(path=str(corpus)), max_rows=6, infill=infill)
    similar = []
    for cut in split_cuts(config):
        assert isinstance(cut.context, Gap)
        (text,) = complete_prompts(model, tokenizer, [cut.context], Sampling(tokens))
        similar.append(similarity(text.split(end)[0].rstrip(), cut.line)[1])
    assert found["results"][str(tmp_path / "model")]["total"]["edit_similarity"] == pytest.approx(np.mean(similar))
    assert f"infill={infill}" in found["about"]["command"]
    assert main(["evaluate", "task=completion", f"model={tmp_path / 'without'}", *arguments]) == 2
    assert "no tokens for fill-in-the-middle" in capsys.readouterr().err


@pytest.mark.slow
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
        (["model={neo}", "problems=x.jsonl"], 2, "problems=x.jsonl: no such file"),
        (["model={neo}", "problems=x.jsonl", "stride=3"], 2, "omit data.path, data.hub and stride"),
        (["model={neo}", "problems=x.jsonl", "data.path={corpus}"], 2, "omit data.path, data.hub and stride"),
        (["task=completion", "data.path={corpus}"], 2, "model=DIR"),
        (["task=completion", "model={neo}"], 2, "data.path"),
        (["task=completion", "model={neo}", "problems=x", "data.path={corpus}"], 2, "omit problems"),
        (["task=completion", "model={neo}", "data.path={corpus}"], 2, "no room for a line of 64 tokens"),
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
    task = [] if any(each.startswith("task=") for each in filled) else ["task=perplexity"]
    assert main(["evaluate", *task, *filled]) == code
    assert expected in capsys.readouterr().err
