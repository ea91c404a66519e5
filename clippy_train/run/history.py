"""`settings.jsonl`: with which settings each step of a run was made.

A row says that an attempt trains after `step` with `settings`, the value of every key. Rows are only appended, and only
if they change something. An attempt that starts again from an older step makes the steps after it again, so its row
replaces what earlier rows say about them.
"""

import json
import math
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from clippy_train.config import TrainConfig, as_yaml, values
from clippy_train.files import atomic_write
from clippy_train.run.changes import STARTED
from clippy_train.run.folder import HISTORY
from clippy_train.run.rows import read_rows

VALIDATION = ("data.validation_split", "trainer.val_samples")  # which sequences a validation scores


class Phase(NamedTuple):
    """The steps after `step`, up to the next phase, and the settings that they were made with."""

    step: int
    settings: dict[str, Any]


def phases(run_dir: Path, last_step: float = math.inf) -> list[Phase]:
    """The phases of a run's steps up to `last_step`; nothing about steps that no attempt has recorded."""
    return [each for each in _phases(read_rows(run_dir / HISTORY, "settings")) if each.step < last_step]


def record(run_dir: Path, step: int, config: TrainConfig, origin: Path) -> None:
    """Note that the steps after `step` are made with `config`.

    Args:
        origin: folder of the run that made the steps before.
    """
    rows = list(read_rows(origin / HISTORY, "settings"))
    longer = [*rows, {"step": step, "settings": values(config)}]
    if _phases(longer) != _phases(rows):
        with atomic_write(run_dir / HISTORY) as file:
            file.writelines(json.dumps(row) + "\n" for row in longer)


def _phases(rows: Iterable[dict[str, Any]]) -> list[Phase]:
    found: list[Phase] = []
    for row in rows:
        found = [each for each in found if each.step < row["step"]]
        if not found or found[-1].settings != row["settings"]:
            found.append(Phase(**row))
    return found


def compared_after(run_dir: Path) -> int:
    """The step after which every validation of a run has scored the same sequences."""
    scored = [(each.step, [each.settings.get(name) for name in VALIDATION]) for each in phases(run_dir)]
    return max((step for (_, before), (step, now) in pairwise(scored) if now != before), default=-1)


def changed(found: list[Phase]) -> dict[str, str]:
    """The settings that differ between phases, with their values in words: `0.001 to step 500, then 0.0005`.

    Without those that say how an attempt was started.
    """
    texts = {}
    for name in (name for each in found[-1:] for name in each.settings if name not in STARTED):
        values_by_step = [(each.step, as_yaml(each.settings.get(name))) for each in found]
        kept = values_by_step[:1] + [now for before, now in pairwise(values_by_step) if now[1] != before[1]]
        if len(kept) > 1:
            earlier = [f"{value} to step {end}" for (_, value), (end, _) in pairwise(kept)]
            texts[name] = ", then ".join([*earlier, kept[-1][1]])
    return texts
