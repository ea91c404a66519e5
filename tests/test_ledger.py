"""The ledger of a run that was killed: every token of an epoch exactly once, consistent with the digests."""

from pathlib import Path

import pytest
from support import oracle
from support.runs import Runs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clippy_train.run.folder import (
    LEDGER,
)
from clippy_train.run.rows import (
    RowFile,
    read_rows,
)
from clippy_train.tokenizer import load_tokenizer

SETTINGS = [
    "trainer.audit=true",
    "data.seq_len=64",
    "data.streams=8",
    "trainer.global_batch_size=32",
    "trainer.micro_batch_size=8",
    "trainer.max_steps=64",
    "trainer.val_every_steps=64",
    "checkpoint.every_steps=7",
    "strategy=zero1",
]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, tiny_tokenizer: Path) -> Runs:
    """A run of two ranks that was killed at an arbitrary moment, then resumed and finished."""
    runs = Runs(tmp_path_factory.mktemp("ledger"), tiny_corpus, tiny_tokenizer)
    runs.train_with_a_kill("killed", 10, *SETTINGS)
    return runs


@pytest.mark.processes
def test_after_kills_every_token_of_every_epoch_was_trained_once(
    killed: Runs, tiny_corpus: Path, tiny_tokenizer: Path
) -> None:
    tokenizer = load_tokenizer(tiny_tokenizer)
    documents = oracle.read_documents(
        tiny_corpus / "train", lambda text: [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    )
    rows = list(read_rows(killed.folder("killed") / LEDGER))
    assert [row["step"] for row in rows] == list(range(1, 65))
    every = [span for row in rows for span in row["spans"]]
    epochs = oracle.completed_epochs(every)
    assert epochs >= 1
    for epoch in range(epochs):
        assert oracle.lost_and_repeated(documents, every, epoch) == (0, 0)
    assert oracle.lost_and_repeated(documents, every, epochs)[1] == 0

    digests = [row["data/digest"] for row in killed.rows("killed")]
    assert [oracle.digest(oracle.tokens(documents, row["spans"]), seq_len=64) for row in rows] == digests


@pytest.mark.processes
def test_tensorboard_shows_one_curve_of_a_run_that_was_killed(killed: Runs) -> None:
    events = EventAccumulator(str(killed.folder("killed")))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert shown == [(row["step"], pytest.approx(row["train/loss"])) for row in killed.rows("killed")]


def test_rows_that_are_repeated_or_cut_short_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    RowFile(path, resumed_step=2).append({"step": 3, "again": True})
    assert list(read_rows(path)) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]
