"""Checkpoints on disk: damage is detected before anything is loaded, and old checkpoints are pruned."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.damage import DAMAGE, flip

from clippy_train.cli import main
from clippy_train.compose import compose
from clippy_train.config import CheckpointConfig, TrainConfig
from clippy_train.errors import CheckpointError
from clippy_train.files import STAGING
from clippy_train.plan import checkpoints_kept
from clippy_train.run.checkpoint import (
    Manifest,
    Unreadable,
    find_best,
    find_checkpoint,
    flush_and_hash,
    manifest_bytes,
    open_checkpoint,
    prune,
    publish,
    read_checkpoint,
)
from clippy_train.run.folder import (
    BEST,
    CHECKPOINTS,
    CONFIG,
    HISTORY,
    MANIFEST,
    METRICS,
    checkpoint_folder,
    checkpoint_folders,
    checkpoint_step,
    run_of,
)
from clippy_train.run.rows import SCORE, read_rows

LAYOUT = {"ranks": 2, "strategy.name": "zero", "strategy.stage": 1, "optim.name": "adamw"}
FILES = ("rng-00000.pt", "state/latest", "state/checkpoint/mp_rank_00_model_states.pt")


def write(run_dir: Path, step: int, bits_per_byte: float | None = None) -> Path:
    """A published checkpoint; files of two steps differ in content, not in size."""
    staging = checkpoint_folder(run_dir, step).with_suffix(STAGING)
    for name in FILES:
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
        (staging / name).write_bytes(f"{name} of step {step:03d}".encode() * 20)
    files = flush_and_hash(staging, [staging / name for name in FILES])
    manifest = Manifest(step, 256 * step, [[0, 1, 20]], {"documents": 9}, {"seed": 42}, LAYOUT, files)
    publish(staging, checkpoint_folder(run_dir, step), manifest)
    validate(run_dir, step, bits_per_byte)
    return checkpoint_folder(run_dir, step)


def validate(run_dir: Path, step: int, bits_per_byte: float | None) -> None:
    if bits_per_byte is not None:
        with (run_dir / METRICS).open("a") as file:
            file.write(json.dumps({"step": step, SCORE: bits_per_byte}) + "\n")


def test_a_checkpoint_is_flushed_to_disk_before_it_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    renamed: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def recorded_fsync(descriptor: int) -> None:
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    def checked_rename(staging: Path, final: Path) -> Path:
        waiting = [path.name for path in (staging, *staging.rglob("*")) if path.stat().st_ino not in synced]
        assert not waiting
        renamed.append(final.name)
        synced.clear()
        return rename(staging, final)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(Path, "rename", checked_rename)
    path = write(tmp_path / "run", 2)
    assert renamed == [path.name]
    assert path.parent.stat().st_ino in synced  # the rename is flushed too


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    for step in (2, 4):
        write(tmp_path / "run", step)
    return tmp_path / "run"


@pytest.mark.parametrize("name", [MANIFEST, *FILES])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_detected_and_the_previous_checkpoint_is_used(
    run_dir: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    newest = checkpoint_folder(run_dir, 4)
    found = find_checkpoint(run_dir)
    assert found
    assert found.path == newest
    DAMAGE[damage](newest / name, checkpoint_folder(run_dir, 2) / name)
    found = find_checkpoint(run_dir)
    assert found
    assert found.manifest.step == 2
    assert f"{newest} is damaged" in caplog.text
    assert f"falling back to {checkpoint_folder(run_dir, 2)}" in caplog.text
    shutil.rmtree(checkpoint_folder(run_dir, 2))
    with pytest.raises(CheckpointError, match="no intact checkpoint"):
        find_checkpoint(run_dir)


def test_a_flipped_bit_in_any_byte_of_a_manifest_is_detected(run_dir: Path) -> None:
    path = checkpoint_folder(run_dir, 4) / MANIFEST
    content = path.read_bytes()
    for index in range(len(content)):
        path.write_bytes(content[:index] + bytes([content[index] ^ 1 << index % 8]) + content[index + 1 :])
        with pytest.raises(CheckpointError, match=r"is damaged|another version"):
            read_checkpoint(path.parent)
    path.write_bytes(content)
    assert read_checkpoint(path.parent).manifest.step == 4


def test_an_older_checkpoint_in_the_folder_of_the_newest_is_detected(run_dir: Path) -> None:
    shutil.rmtree(checkpoint_folder(run_dir, 4))
    shutil.copytree(checkpoint_folder(run_dir, 2), checkpoint_folder(run_dir, 4))
    with pytest.raises(CheckpointError, match="is from step 2"):
        open_checkpoint(checkpoint_folder(run_dir, 4))


def test_a_checkpoint_may_be_copied_elsewhere(run_dir: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoint_folder(run_dir, 4), tmp_path / "copy")
    assert open_checkpoint(copy).manifest == open_checkpoint(checkpoint_folder(run_dir, 4)).manifest


@pytest.mark.parametrize("unreadable", [MANIFEST, FILES[0]])
def test_a_checkpoint_that_cannot_be_read_is_not_taken_for_damaged(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, unreadable: str
) -> None:
    """A run that fell back to the one before would replace it, although it may be intact."""
    read = Path.open

    def fail(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == checkpoint_folder(run_dir, 4) / unreadable:
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(Unreadable, match=r"step-00000004 cannot be read: .*Permission denied"):
        find_checkpoint(run_dir)


def test_the_run_of_a_checkpoint_is_found_through_links(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run_dir / CONFIG).touch()
    moved = (run_dir / CHECKPOINTS).rename(tmp_path / "scratch")
    (run_dir / CHECKPOINTS).symlink_to(moved)
    (tmp_path / "link").symlink_to(checkpoint_folder(run_dir, 4))
    (tmp_path / "elsewhere").symlink_to(run_dir)
    assert run_of(checkpoint_folder(run_dir, 4)) == run_dir
    assert run_of(checkpoint_folder(tmp_path / "elsewhere", 4)).samefile(run_dir)
    monkeypatch.chdir(run_dir / CHECKPOINTS)
    (run_dir / CHECKPOINTS).unlink()
    moved.rename(run_dir / CHECKPOINTS)
    assert run_of(Path("step-00000004")) == run_dir
    assert run_of(tmp_path / "link") == run_dir


def test_another_format_version_is_named(run_dir: Path) -> None:
    path = checkpoint_folder(run_dir, 4) / MANIFEST
    path.write_text(json.dumps({"version": 1, "step": 4, "world_size": 2}))
    with pytest.raises(CheckpointError, match=r"another version of this program \(format 1\)"):
        read_checkpoint(path.parent)


@given(st.integers(0, 10**12), st.dictionaries(st.text(), st.floats(allow_nan=False) | st.text()))
def test_a_manifest_is_read_as_it_was_written(tokens: int, data: dict[str, float | str]) -> None:
    manifest = Manifest(4, tokens, [[1, 2], [3, 4]], {"documents": 1}, data, LAYOUT, {"a": [1, "b"]})
    fields = json.loads(manifest_bytes(manifest))
    assert Manifest(**{name: fields[name] for name in Manifest.__dataclass_fields__}) == manifest
    assert manifest_bytes(replace(manifest, tokens=tokens + 1)) != manifest_bytes(manifest)


@given(
    bits=st.dictionaries(st.integers(1, 60), st.none() | st.floats(0.5, 2), min_size=1, max_size=9),
    keep_last=st.integers(1, 5),
    keep_every=st.none() | st.integers(1, 20),
    data=st.data(),
)
@settings(max_examples=50)
def test_pruning_keeps_the_newest_the_periodic_and_the_best(
    tmp_path_factory: pytest.TempPathFactory,
    bits: dict[int, float | None],
    keep_last: int,
    keep_every: int | None,
    data: st.DataObject,
) -> None:
    run_dir = tmp_path_factory.mktemp("prune")
    for step, value in bits.items():
        checkpoint_folder(run_dir, step).mkdir(parents=True)
        manifest = Manifest(step, 0, [], {}, {}, LAYOUT, {})
        (checkpoint_folder(run_dir, step) / MANIFEST).write_bytes(manifest_bytes(manifest))
        validate(run_dir, step, value)
    checkpoint_folder(run_dir, 61).with_suffix(STAGING).mkdir()
    now = data.draw(st.sampled_from(sorted(bits)))
    prune(run_dir, now, CheckpointConfig(every_steps=1, keep_last=keep_last, keep_every=keep_every))
    past = {step: value for step, value in bits.items() if step <= now}
    best = min((value, step) for step, value in {**past, 0: 9.0}.items() if value is not None)[1]
    newest = sorted(past)[-keep_last:]
    assert {checkpoint_step(path) for path in checkpoint_folders(run_dir)} == {
        step for step in past if step in newest or step == best or (keep_every and step % keep_every == 0)
    }
    assert (run_dir / "checkpoints" / BEST).is_dir() == (best > 0)
    assert not list(run_dir.glob(f"checkpoints/*{STAGING}"))


@pytest.fixture(scope="module")
def demo() -> TrainConfig:
    return compose(TrainConfig, ["experiment=demo"])


@given(
    every=st.integers(1, 4), steps=st.integers(1, 60), keep_last=st.integers(1, 5), rounds=st.none() | st.integers(1, 5)
)
def test_the_plan_gives_the_largest_number_of_checkpoints_kept(
    demo: TrainConfig, every: int, steps: int, keep_last: int, rounds: int | None
) -> None:
    """Compared with a run whose first checkpoint stays the best."""
    demo.trainer.max_steps = steps
    demo.checkpoint = CheckpointConfig(every_steps=every, keep_last=keep_last, keep_every=rounds and rounds * every)
    saved = sorted({*range(every, steps + 1, every), steps})
    kept = 0
    for now in range(1, len(saved) + 1):
        good = {step for step in saved[:now] if rounds and step % (rounds * every) == 0}
        kept = max(kept, len({saved[0], *saved[:now][-keep_last:], *good}))
    assert kept <= checkpoints_kept(demo)
    assert kept == checkpoints_kept(demo) or rounds


def test_best_is_a_link_that_follows_the_lowest_validation(run_dir: Path) -> None:
    link, keep_one = run_dir / "checkpoints" / BEST, CheckpointConfig(every_steps=1, keep_last=1)
    for step, bits, best in ((5, 0.7, 5), (6, 0.8, 5), (7, None, 5), (8, 0.6, 8)):
        write(run_dir, step, bits)
        prune(run_dir, step, keep_one)
        assert open_checkpoint(link).manifest.step == best
        assert {checkpoint_step(path) for path in checkpoint_folders(run_dir)} == {step, best}
    (checkpoint_folder(run_dir, 8) / MANIFEST).write_text("{")
    assert find_best(run_dir) is None


def test_validations_of_other_sequences_are_not_compared(run_dir: Path) -> None:
    write(run_dir, step=1, bits_per_byte=2.0)
    write(run_dir, step=2, bits_per_byte=3.0)
    rows = [
        {"step": step, "settings": {"trainer.val_samples": samples, "optim.lr": lr}}
        for step, samples, lr in ((0, 10, 1), (1, 20, 1), (2, 20, 2))
    ]
    (run_dir / HISTORY).write_text("".join(json.dumps(row) + "\n" for row in rows))
    best = find_best(run_dir)
    assert best
    assert checkpoint_step(best) == 2


def test_damaged_rows_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"step": 1, "a": 2}\n[1]\n"a"\n{"a": 1}\n\xff\n{"step": 2, "a": 3}\n{"step": 3, "a"')
    assert [row["a"] for row in read_rows(path, "a")] == [2, 3]
    assert [row["step"] for row in read_rows(path)] == [1, 2]


@pytest.mark.slow
def test_ls_lists_and_verify_reads_every_byte(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(checkpoint_folder(run_dir, 2))
    write(run_dir, 2, 0.5)
    assert main(["checkpoint", "verify", f"run={run_dir}"]) == 0
    newest, older = (line for line in capsys.readouterr().out.splitlines() if "intact" in line)
    assert "1,024" in newest
    assert "last" in newest
    assert "best" in older
    flip(checkpoint_folder(run_dir, 4) / FILES[2])
    assert main(["checkpoint", "ls", f"run={run_dir}"]) == 0
    assert capsys.readouterr().out.count("complete") == 2  # a flipped bit changes no size
    assert main(["checkpoint", "verify", f"run={run_dir}"]) == 4
    assert "damaged" in capsys.readouterr().out
    os.truncate(checkpoint_folder(run_dir, 4) / FILES[2], 3)
    assert main(["checkpoint", "ls", f"run={run_dir}"]) == 0
    assert capsys.readouterr().out.count("complete") == 1
    (checkpoint_folder(run_dir, 2) / MANIFEST).unlink()
    assert main(["checkpoint", "ls", f"run={run_dir}"]) == 0
    assert "complete" not in capsys.readouterr().out
    assert main(["checkpoint", "ls", "run=nowhere"]) == 2
