"""`clippy corpus`: folders of code, or a dataset -> shuffled shards in the Code Clippy format, split by repository.

Promises: the same sources and settings give the same bytes, however many processes work; no repository is in two
splits; rejected documents are counted by rule. What is finished of an interrupted build stays in a hidden folder beside
`out`, and the same command continues from there, to the same bytes; `out` is complete or absent. Memory is that of the
`stages`, for each process. Disk holds the text twice, compressed, and with `dedup.near` a third time.
"""

import dataclasses
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clippy_train import __version__
from clippy_train.config import CorpusConfig
from clippy_train.corpus.dedup import band_shape
from clippy_train.corpus.manifest import VERSION, Tally, write_manifest
from clippy_train.corpus.stages import SIZES, STAGES, Build, Sizes
from clippy_train.corpus.tasks import Workers, perform_stage
from clippy_train.errors import ConfigError, DataError
from clippy_train.files import atomic_write, locked
from clippy_train.shards.filters import recorded_rules, require_rules
from clippy_train.shards.format import SPLITS, shard_name
from clippy_train.shards.sources import MANIFEST

SETTINGS = "settings.json"  # of a build: what its results depend on
LOCK = "lock"

log = logging.getLogger(__name__)


def build_corpus(config: CorpusConfig, sizes: Sizes = SIZES) -> dict[str, Any]:
    """Write `train/`, `validation/`, `test/` and `manifest.json` to `out`, and return the manifest.

    Raises:
        ConfigError: `out` is not empty, or the fractions leave nothing to train on; another command builds it, or began
            to with other settings.
        DataError: a source is missing or unreadable, or there are too few repositories to hold any out.
        Interrupted: a process was killed.
    """
    build = begin_build(config, sizes)
    with _alone(build):
        if not (Path(config.out) / MANIFEST).exists():  # killed between the last rename and the removal of the results
            with Workers(config.workers) as workers:
                for stage in STAGES:
                    perform_stage(build, stage, workers)
            publish(build)
    return dict(json.loads((Path(config.out) / MANIFEST).read_bytes()))


def begin_build(config: CorpusConfig, sizes: Sizes = SIZES) -> Build:
    """The build of `out`, new or interrupted.

    Raises:
        ConfigError: as `build_corpus`.
    """
    held_out = config.validation_fraction + config.test_fraction
    if held_out >= 1:
        raise ConfigError(f"validation_fraction + test_fraction = {held_out}: nothing is left to train on")
    if config.dedup.near:
        band_shape(config.dedup.threshold, config.dedup.permutations)
    require_rules(config.filter)
    out = Path(config.out).resolve()
    folder = out.with_name(f".{out.name}.unfinished")
    is_finished = folder.exists() and (out / MANIFEST).exists()
    if not is_finished and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out={config.out} exists and is not empty: choose another folder or remove it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out={config.out} cannot be made: {error.strerror}") from error
    _require_settings(folder, config, sizes)
    return Build(config, folder, sizes)


@contextmanager
def _alone(build: Build) -> Iterator[None]:
    """Keep other commands out of a build. Its results are removed when the block ends, and on an error that a
    repetition cannot mend."""
    with locked(build.folder / LOCK, f"out={build.config.out}: another command builds it; wait for it"):
        try:
            yield
        except (ConfigError, DataError):
            shutil.rmtree(build.folder)
            raise
        except BaseException:
            log.warning("interrupted: the same command continues from %s", build.folder)
            raise
        shutil.rmtree(build.folder)


def _require_settings(folder: Path, config: CorpusConfig, sizes: Sizes) -> None:
    """Check that the results in a folder are of these settings and sources, or say so in a new folder.

    Raises:
        ConfigError: they are not; the message names the keys.
    """
    path = folder / SETTINGS
    folders = [str(Path(each).resolve()) for each in config.src]
    sources = {"src": folders, "hub": config.hub, "problems": config.problems}
    settings = {**recorded_settings(config), **sources, "version": __version__, "sizes": list(sizes)}
    if not path.exists():
        with atomic_write(path) as file:
            json.dump(settings, file)
    before = json.loads(path.read_bytes())
    if changed := [name for name, value in settings.items() if before.get(name) != value]:
        raise ConfigError(
            f"out={config.out}: an interrupted build with another {', '.join(changed)} is in {folder}: "
            "repeat its command to finish it, or remove the folder"
        )


def publish(build: Build) -> None:
    """Move the shards to a folder with their manifest, and that to `out`. May be repeated after an interruption."""
    folder = build.folder / "corpus"
    tally, facts = Tally(), build.facts("split")
    tally.rejected.update(facts["rejected"])
    tally.redacted.update(facts["redacted"])
    tally.update(facts["kept"])
    files: dict[str, list[dict[str, str | int]]] = {split: [] for split in SPLITS}
    for name in SPLITS:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for task in range(STAGES[-1].tasks(build)):
        written = build.facts("write", task)
        tally.update(written["kept"])
        for split, found in written["files"].items():
            numbered = enumerate(found, len(files[split]))
            files[split] += [_moved(build.result("write", task), folder, number, file) for number, file in numbered]
    manifest = {
        "version": VERSION,
        "settings": recorded_settings(build.config),
        "files": files,
        "repositories": dict(zip(SPLITS, facts["repositories"], strict=True)),
        **tally.counts(),
    }
    write_manifest(folder, manifest)
    folder.rename(build.config.out)


def _moved(result: Path, folder: Path, number: int, file: dict[str, str | int]) -> dict[str, str | int]:
    """Move a shard from a result to the corpus, unless that is done, under its number there."""
    shard = result / str(file["name"])
    name = f"{shard.parent.name}/{shard_name(number)}"
    if shard.exists():
        shard.rename(folder / name)
    return {**file, "name": name}


def recorded_settings(config: CorpusConfig) -> dict[str, Any]:
    """What the corpus depends on besides its sources, whose location may differ the next time."""
    elsewhere = ("src", "hub", "problems", "out", "workers", "slurm")
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in elsewhere}
    return {**settings, "filter": recorded_rules(config.filter)}
