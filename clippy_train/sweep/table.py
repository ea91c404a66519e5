"""`sweep.csv`: a row for every trial that a sweep's folder has seen, the best first. Rows are replaced, never dropped.

A row names the settings that its trial did not vary, so a number never passes for that of other settings.
"""

import csv
from collections import defaultdict
from math import inf
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from clippy_train.files import atomic_write
from clippy_train.report import print_columns
from clippy_train.run.folder import last_step
from clippy_train.sweep.trials import OBJECTIVE, Trial

TABLE = "sweep.csv"
RESULT, LAST, SETTINGS, FOLDER = "bits per byte", "at the end", "settings", "folder"
COLUMNS = ["state", "step", RESULT, "at step", LAST, SETTINGS, FOLDER]
SEED = "seed"

Row = dict[str, Any]


def row(trial: Trial, settings: str) -> Row:
    """A trial's row: the values that it varies, then `COLUMNS`."""
    result: list[Any] = [None, None, None]
    if trial.result is not None:
        validations = trial.validations()
        result = [*min(validations), validations[-1][0]]
    cells = [trial.state, last_step(trial.run_dir), *result, settings, str(trial.run_dir)]
    return {**trial.varied, **dict(zip(COLUMNS, cells, strict=True))}


def update(folder: Path, varied: list[str], rows: list[Row]) -> list[Row]:
    """Write these rows into the folder's table, beside those of other trials; return all of them, the best first."""
    new = {each[FOLDER] for each in rows}
    merged = [*rows, *(each for each in _read(folder / TABLE) if each[FOLDER] not in new)]
    merged.sort(key=lambda each: inf if each[RESULT] is None else each[RESULT])
    others = [name for name in dict.fromkeys(name for each in merged for name in each) if name not in COLUMNS]
    with atomic_write(folder / TABLE) as file:
        writer = csv.DictWriter(file, [*dict.fromkeys([*varied, *others]), *COLUMNS])
        writer.writeheader()
        writer.writerows(merged)
    return merged


def _read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows: list[Row] = list(csv.DictReader(file))
    return [{**each, **{name: float(each[name]) if each[name] else None for name in (RESULT, LAST)}} for each in rows]


def show(folder: Path, varied: list[str], rows: list[Row], settings: str) -> None:
    """Print the rows of these settings that vary just these keys; if they vary the seed, also means over it."""
    shown = [each for each in rows if each.get(SETTINGS) == settings and _varied(each) == set(varied)]
    columns = [*varied, *COLUMNS[:-2]]
    title = f"{folder}, by the lowest {OBJECTIVE}\nsettings: {settings or 'the defaults'}"
    print_columns(title, columns, [[_text(each[name]) for name in columns] for each in shown])
    means = seed_means(varied, shown)
    if means:
        header = [*(name for name in varied if name != SEED), "seeds", f"mean of {RESULT}", "standard deviation"]
        print_columns(f"{folder}, over seeds", header, [[_text(cell) for cell in each] for each in means])


def _varied(each: Row) -> set[str]:
    """The keys that a row's trial varied: a table has columns for those of other trials too, which are empty there."""
    return {name for name, value in each.items() if name not in COLUMNS and value not in (None, "")}


def seed_means(varied: list[str], rows: list[Row]) -> list[list[Any]]:
    """For trials that differ only in their seed: their values, number of seeds, mean and standard deviation."""
    groups: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for each in rows:
        if SEED in varied and each[RESULT] is not None:
            groups[tuple(each[name] for name in varied if name != SEED)].append(each[RESULT])
    means = [[*values, len(of), mean(of), stdev(of)] for values, of in groups.items() if len(of) > 1]
    return sorted(means, key=lambda each: each[-2])


def _text(cell: Any) -> str:
    return f"{cell:.4f}" if isinstance(cell, float) else "" if cell is None else str(cell)
