"""Training on what continues a prompt: tokens of a prompt are read, and nothing of them is learnt."""

import json
from collections.abc import Callable
from itertools import islice, takewhile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.distributed import run_distributed
from support.fits import SETTINGS, Fit
from support.formats import HUMANEVAL, MBPP
from support.models import gpt_neo
from support.models import token_ids as random_ids

from clippy_train.config import CorpusConfig, FilterConfig, SourceConfig, TrainConfig
from clippy_train.corpus.build import build_corpus
from clippy_train.data.batches import validation_batches
from clippy_train.data.mixture import open_sources
from clippy_train.data.objectives import Completion, PlacedDocument, describe_objective, token_ids
from clippy_train.data.stream import START, Stream
from clippy_train.errors import DataError
from clippy_train.model import loss
from clippy_train.model.loss import mean_loss
from clippy_train.plan import ends
from clippy_train.run.identity import data_identity, identity_changes
from clippy_train.shards.format import SPLITS, Fields
from clippy_train.shards.problems import read_exercises, read_problems
from clippy_train.shards.sources import FileCorpus, open_corpus, require_text
from clippy_train.tokenizer import load_tokenizer

EOS, PAD = 10**6, 10**6 + 1
LENGTHS = [(3, 2), (0, 5), (9, 1), (2, 12), (30, 4), (1, 1), (4, 4)]  # tokens of each prompt and text

Make = Callable[..., TrainConfig]


def encode(texts: list[str]) -> list[list[int]]:
    return [[int(each) for each in text.split()] for text in texts]


def documents(lengths: list[tuple[int, int]]) -> list[tuple[list[int], list[int]]]:
    """Prompts and texts whose tokens all differ."""
    numbers = iter(range(1, 10**6))
    return [(list(islice(numbers, prompt)), list(islice(numbers, text))) for prompt, text in lengths]


def write_rows(path: Path, rows: list[tuple[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": prompt, "text": text}) + "\n" for prompt, text in rows))


def joined(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def stream(folder: Path, cut: str = "start", pad: int | None = None, seq_len: int = 8) -> Stream:
    path = folder / "rows.jsonl"
    write_rows(path, [(joined(prompt), joined(text)) for prompt, text in documents(LENGTHS)])
    corpus = FileCorpus("data.path", (str(path),), "", Fields(prompt="prompt"))
    return Stream(corpus, Completion(encode, EOS, seq_len, cut), seq_len, window=3, pad=pad)


def of_first_epoch(found: Stream) -> list[np.ndarray]:
    return [block.tokens for block in takewhile(lambda block: block.spans[0].epoch == 0, found.blocks())]


def shown(read: list[int], learnt: list[int], longest: int, cut: str) -> list[int]:
    """What a model sees of a document."""
    whole = [*read, *learnt, EOS]
    first = min(len(read), max(0, len(whole) - longest)) if cut == "start" else 0
    return whole[first : first + longest]


@given(st.integers(0, 9), st.integers(1, 9), st.integers(1, 12), st.sampled_from(["start", "end"]))
def test_what_is_too_long_is_cut_where_the_setting_says(prompt: int, text: int, longest: int, cut: str) -> None:
    ((read, learnt),) = documents([(prompt, text)])
    (tokens,) = Completion(encode, EOS, longest, cut)(0, [PlacedDocument(joined(learnt), 0, 0, joined(read))])
    assert token_ids(tokens).tolist() == shown(read, learnt, longest, cut)
    assert [token < 0 for token in tokens] == [token in read for token in token_ids(tokens)]


@pytest.mark.parametrize("cut", ["start", "end"])
def test_packed_documents_follow_each_other_and_padded_ones_have_a_block_each(tmp_path: Path, cut: str) -> None:
    padded = []
    for block in of_first_epoch(stream(tmp_path, cut, PAD)):
        padding = int((block == ~PAD).sum())
        assert (block[len(block) - padding :] == ~PAD).all()
        padded.append(token_ids(block)[: len(block) - padding].tolist())
    assert sorted(padded) == sorted(shown(*each, 8, cut) for each in documents(LENGTHS))
    packed = [block.tokens for block in islice(stream(tmp_path, cut).blocks(), 20)]
    in_order = [token for document in padded for token in document]
    assert token_ids(np.concatenate(packed)).tolist()[: len(in_order)] == in_order


@pytest.mark.parametrize("pad", [None, PAD])
def test_a_restart_gives_the_blocks_that_follow(tmp_path: Path, pad: int | None) -> None:
    found = stream(tmp_path, pad=pad)
    blocks = list(islice(found.blocks(START), 30))
    for number, block in enumerate(blocks[:-1]):
        after = list(islice(found.blocks(block.cursor), 29 - number))
        assert [each.tokens.tolist() for each in after] == [each.tokens.tolist() for each in blocks[number + 1 :]]


def test_the_gradient_is_that_of_hugging_faces_loss_with_ignored_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss.CHUNK, "cpu", 50)
    model, ids = gpt_neo(), random_ids(3, 57)
    predicted = (torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.3).long()
    labels = torch.where(predicted == 1, ids, -100)
    expected = torch.autograd.grad(model(ids, labels=labels, use_cache=False).loss, list(model.parameters()))
    positions_per_target = predicted[:, 1:].numel() / predicted[:, 1:].sum()
    for loss_dtype, limit in (("fp32", 1e-5), ("bf16", 0.1)):
        found = mean_loss(model, ids, "sdpa", loss_dtype, predicted=predicted) * positions_per_target
        for mine, theirs in zip(torch.autograd.grad(found, list(model.parameters())), expected, strict=True):
            assert (mine - theirs).abs().max() <= limit * theirs.abs().max()


@pytest.mark.parametrize("loss_dtype", ["fp32", "bf16"])
def test_nothing_is_learnt_from_a_prompt(loss_dtype: str) -> None:
    """A loss on texts alone has no gradient in the hidden states that predict the prompts."""
    model, ids = gpt_neo(), random_ids(2, 20)
    predicted = torch.ones_like(ids)
    predicted[0, :12] = predicted[1, 15:] = 0
    hidden = torch.randn(2, 20, model.config.hidden_size, requires_grad=True)
    head = loss.loss_head(model)
    losses = head(hidden[:, :-1], ids[:, 1:], loss_dtype=loss_dtype, weights=predicted[:, 1:])
    (gradient,) = torch.autograd.grad(losses.mean(), [hidden])
    assert (gradient[:, :-1].abs().sum(-1) > 0).equal(predicted[:, 1:] == 1)


def answer(number: int) -> str:
    return f"{number % 7 + number % 5}\n"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sums of two numbers: prompts of several lengths, and short answers."""
    folder = tmp_path_factory.mktemp("sums")
    for split, numbers in (("train", range(400)), ("validation", range(400, 440))):
        asked = [(f"# {'please ' * (n % 3)}add {n % 7} and {n % 5}\n", answer(n)) for n in numbers]
        write_rows(folder / split / "0.jsonl", asked)
    return folder


def settings(rows: Path, out: Path) -> list[str]:
    return [
        *SETTINGS, f"data.path={rows}", "data.prompt_column=prompt", f"run.root={out}", "trainer.val_every_steps=100",
        "trainer.global_batch_size=8", "data.streams=4", "data.seq_len=32",
    ]  # fmt: skip


@pytest.mark.processes
@pytest.mark.parametrize("packing", ["true", "false"])
def test_a_step_is_the_mean_over_its_targets_for_any_layout(
    rows: Path, train_config: Make, tmp_path: Path, packing: str
) -> None:
    def train(name: str, ranks: int, micro_batch: int, strategy: str) -> np.ndarray:
        config = train_config(
            *settings(rows, tmp_path), f"run.name={name}", f"strategy={strategy}", f"trainer.devices={ranks}",
            f"trainer.micro_batch_size={micro_batch}", f"data.packing={packing}",
        )  # fmt: skip

        def rank() -> np.ndarray:
            fit = Fit(config)
            fit.fit()
            return np.array([(row["train/loss"], row["train/grad_norm"]) for row in fit.rows()])

        return run_distributed(rank, ranks)[0]

    whole = train("whole", 1, 8, "single")
    assert len(whole) == 3
    for name, ranks, micro_batch, strategy in (("one", 1, 1, "single"), ("two", 2, 2, "ddp"), ("four", 4, 1, "zero2")):
        assert train(name, ranks, micro_batch, strategy) == pytest.approx(whole, rel=2e-5), name


@pytest.mark.slow
def test_the_loss_of_answers_falls_and_their_validation_has_no_prompt(
    rows: Path, train_config: Make, tmp_path: Path
) -> None:
    config = train_config(
        *settings(rows, tmp_path), "strategy=single", "trainer.devices=1", "data.packing=false", "run.name=sums",
        "trainer.max_steps=60", "optim.lr=1e-2", "optim.warmup_steps=5", "optim.decay_steps=55",
        "trainer.val_every_steps=60", "trainer.val_samples=40",
    )  # fmt: skip
    fit = Fit(config)
    fit.fit()
    losses = [row["train/loss"] for row in fit.rows()]
    assert losses[-1] < losses[0] / 2
    batches = fit.data.val_dataloader()
    encoded = fit.data.tokenizer
    targets = sum(int((batch["group"] > 0).sum()) for batch in batches)
    assert targets == sum(len(encoded(answer(each))["input_ids"]) + 1 for each in range(400, 440))


@pytest.mark.slow
def test_a_run_ends_after_its_epochs(rows: Path, train_config: Make, tmp_path: Path) -> None:
    config = train_config(
        *settings(rows, tmp_path), "strategy=single", "trainer.devices=1", "data.packing=false", "run.name=epochs",
        "trainer.max_steps=500", "trainer.max_epochs=2",
    )  # fmt: skip
    fit = Fit(config)
    fit.fit()
    (last,) = fit.rows()[-1:]
    assert last["step"] == 2 * 400 // 8 + 1  # the step after shows that the epoch is over
    assert last["data/documents"] == 8 * last["step"]


def test_card_and_plan_say_what_is_learnt(train_config: Make) -> None:
    config = train_config("data.prompt_column=prompt", "data.packing=false")
    assert describe_objective(config.data) == "the text that continues a prompt, padded"


def test_documents_without_a_prompt_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n')
    corpus = FileCorpus("data.path", (str(path),), "", Fields(prompt="question"))
    with pytest.raises(DataError, match=r"no_text 1.* its prompt under data\.prompt_column=question"):
        require_text(corpus)


@pytest.mark.slow
def test_a_checkpoint_from_before_a_setting_existed_has_its_default(train_config: Make) -> None:
    now = data_identity(train_config(), [])
    then = {name: value for name, value in now.items() if name != "data.packing"}
    then["data.filter"] = {name: value for name, value in now["data.filter"].items() if name != "redact"}
    assert identity_changes(then, now) == []
    changed = data_identity(train_config("data.packing=false"), [])
    assert identity_changes(then, changed) == ["data.packing was True, is False"]


# From programming problems


def apps_row(number: int, starter: str = "") -> dict[str, object]:
    solutions = [f"print({number})\n", f"x = {number}\nprint(x)\n"]
    question = f"Print {number}.\n"
    return {"problem_id": number, "question": question, "starter_code": starter, "solutions": json.dumps(solutions)}


def test_problems_become_documents_with_the_prompts_of_the_original(tmp_path: Path) -> None:
    path = tmp_path / "apps.jsonl"
    given_rows = [apps_row(number, "def f():\n" if number % 2 else "") for number in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in given_rows))
    build_corpus(CorpusConfig(problems=[str(path)], out=str(tmp_path / "out"), filter=FilterConfig()))
    found: dict[str, list[str]] = {}
    prompts = set()
    for split in SPLITS:
        corpus = open_corpus(SourceConfig(str(tmp_path / "out")), split, with_meta=True, prompt_column="prompt")
        for entry in corpus.documents(0):
            assert entry.meta
            assert entry.text
            found.setdefault(entry.meta["repo_name"], []).append(split)
            prompts.add((entry.meta["repo_name"], entry.prompt, entry.text))
    assert all(len(splits) == 2 and len(set(splits)) == 1 for splits in found.values())
    asked = {
        0: "\nQUESTION:\nPrint 0.\n\n\n\nUse Standard Input format\n\nANSWER:\n",
        1: "\nQUESTION:\nPrint 1.\n\ndef f():\n\n\nUse Call-Based format\n\nANSWER:\n",
    }
    for number, prompt in asked.items():
        assert (f"APPS/{number}", prompt, f"x = {number}\nprint(x)\n") in prompts
    assert len(prompts) == 80


def test_other_formats_have_one_solution_for_each_problem(tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps(HUMANEVAL) + "\n" + json.dumps(MBPP) + "\n")
    problems = read_problems(str(path))
    (first, second) = read_exercises(str(path))
    assert [(each.prompt, each.solutions) for each in (first, second)] == [
        (each.prompt, [each.reference]) for each in problems
    ]


def test_a_prompt_is_checked_against_benchmarks_and_redacted(tmp_path: Path) -> None:
    """In a corpus, and in documents that are read while training."""
    problem = {**HUMANEVAL, "prompt": PROBLEM}
    (tmp_path / "benchmark.jsonl").write_text(json.dumps(problem))
    asked = [{**apps_row(number), "question": f"Print {number}. Ask me@site.example.org"} for number in range(30)]
    asked += [{**apps_row(99), "question": PROBLEM}]
    (tmp_path / "apps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    rules = FilterConfig(decontaminate=[str(tmp_path / "benchmark.jsonl")], redact=["emails"])
    problems = [str(tmp_path / "apps.jsonl")]
    built = build_corpus(CorpusConfig(problems=problems, out=str(tmp_path / "out"), filter=rules))
    assert (built["documents"], built["rejected"], built["redacted"]) == (60, {"benchmark": 2}, {"emails": 60})
    build_corpus(CorpusConfig(problems=problems, out=str(tmp_path / "plain"), filter=FilterConfig()))
    for source, rule in (("out", FilterConfig()), ("plain", rules)):
        corpus = open_corpus(SourceConfig(str(tmp_path / source), filter=rule), "train", prompt_column="prompt")
        prompts = [entry.prompt for entry in corpus.documents(0) if entry.text is not None]
        assert prompts
        assert all("<EMAIL>" in prompt and "@" not in prompt and "twice" not in prompt for prompt in prompts)


PROBLEM = """def double_all(numbers):
    \"\"\"Return a new list in which every number of the given list of whole numbers stands twice, one after the other,
    in the order of the list, but leave out all numbers that are negative or larger than one hundred and fifty.\"\"\"
"""


def test_a_validation_without_anything_to_score_is_refused(rows: Path, train_config: Make, tmp_path: Path) -> None:
    write_rows(tmp_path / "data" / "train" / "0.jsonl", [("a " * 200, "b")] * 8)
    write_rows(tmp_path / "data" / "validation" / "0.jsonl", [("a " * 200, "b")] * 8)
    config = train_config(
        *settings(tmp_path / "data", tmp_path), "strategy=single", "trainer.devices=1", "data.packing=false",
        "data.truncate=end",
    )  # fmt: skip
    with pytest.raises(DataError, match=r"nothing is left to score.*data\.truncate=start"):
        validation_batches(config, load_tokenizer(str(config.tokenizer.base)), rank=0)


def test_the_plan_says_when_epochs_end(tmp_path: Path, train_config: Make) -> None:
    path = tmp_path / "apps.jsonl"
    path.write_text("".join(json.dumps(apps_row(number)) + "\n" for number in range(60)))
    built = build_corpus(CorpusConfig(problems=[str(path)], out=str(tmp_path / "out"), filter=FilterConfig()))
    documents = built["splits"]["train"]["documents"]
    made = [f"data.path={tmp_path / 'out'}", "data.prompt_column=prompt", "data.packing=false", "trainer.max_epochs=3"]
    config = train_config(*made, "trainer.global_batch_size=16", "optim.decay_steps=100")
    assert ends(config).startswith(f"after trainer.max_epochs=3, some {3 * documents / 16:,.0f} steps by the manifest")
    assert "THE SCHEDULE IS LONGER" in ends(config)


def test_a_mixture_of_one_source_is_not_a_corpus_without_its_filter(rows: Path, train_config: Make) -> None:
    source = [f"data.sources=[{{path:{rows},filter:{{min_bytes:3}}}}]", "data.path=null"]
    mixture, corpus = train_config(*source), train_config(f"data.path={rows}")
    then, now = (data_identity(each, open_sources(each.data, "train")) for each in (mixture, corpus))
    assert any("filter" in line for line in identity_changes(then, now))
