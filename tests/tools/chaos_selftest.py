"""Remove each protection from a copy of the package and check that the test that guards it fails.

    python -m tools.chaos_selftest        `make chaos-selftest`: about ten minutes on two cores

A test that passes without its protection proves nothing, and neither does one that fails with it: each runs both ways.
Exits with 1 if a test gives the same result both times.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parents[1]
PACKAGE = TESTS.parent / "clippy_train"
KILLS = [sys.executable, "-m", "tools.chaos", "kill", "--trials", "4"]
SIGNALS = [sys.executable, "-m", "tools.chaos", "signal", "--trials", "4"]
TIMEOUT = 900


@dataclass(frozen=True)
class Mutation:
    """A protection, the text that implements it in a module, its replacement, and the command that must then fail."""

    protection: str
    module: str
    text: str
    replacement: str
    check: list[str]


def pytest(*tests: str) -> list[str]:
    return [str(Path(sys.executable).parent / "pytest"), "-q", "-x", "-p", "no:cacheprovider", *tests]


MUTATIONS = [
    Mutation(
        "files are flushed to disk before a checkpoint is published",
        "files.py",
        "        os.fsync(descriptor)\n",
        "        pass\n",
        pytest("test_checkpoint.py", "-k", "flushed_to_disk"),
    ),
    Mutation(
        "the content of a checkpoint is verified",
        "run/checkpoint.py",
        "        elif content and hash_file(path / name) != sha256:\n",
        "        elif False:\n",
        pytest("test_checkpoint.py"),
    ),
    Mutation(
        "nothing that stands in a file of a checkpoint is run",
        "run/plain.py",
        '"weights_only": True',
        '"weights_only": False',
        pytest("test_plain.py", "-k", "no_form"),
    ),
    Mutation(
        "... nor by the loaders of Lightning and DeepSpeed",
        "run/plain.py",
        "    torch.load = load_plain ",
        "    torch.load = before ",
        pytest("test_plain.py", "-k", "rank_runs and zero1"),
    ),
    Mutation(
        "signals only set a flag",
        "train/callbacks/preemption.py",
        "        self.signal = number\n",
        "        raise SystemExit\n",
        SIGNALS,
    ),
    Mutation(
        "signals are blocked until a rank can handle them",
        "launch/agent.py",
        "until they can handle it.\n    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)\n",
        "\n",
        [*SIGNALS, "--moment", "start-up"],
    ),
    Mutation(
        "cursors are those of the trained batch, not of batches that a loader has read ahead",
        "train/callbacks/progress.py",
        "            self.cursors[stream] = cursor\n",
        "            self.cursors[stream] = cursor\n            self.cursors[stream][2] += 1\n",
        KILLS,
    ),
    Mutation(
        "a save writes a copy of the state, which training goes on to change",
        "train/writer.py",
        "self._snapshot.of(state_dict)\n",
        "state_dict\n",
        pytest("test_saving.py", "-k", "training_goes_on"),
    ),
    Mutation(
        "the random state is part of a checkpoint",
        "train/callbacks/checkpointer.py",
        "            load_rng(rng_file(self.resumed.path, trainer.global_rank))\n",
        "            pass\n",
        KILLS,
    ),
]


def copy_of_package(root: Path) -> Path:
    """Copy the package and its configuration, to be imported in place of the original."""
    for folder in (PACKAGE, PACKAGE.parent / "conf", PACKAGE.parent / "launch"):
        shutil.copytree(folder, root / folder.name)
    return root / PACKAGE.name


def passes(check: list[str], root: Path) -> bool:
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    try:
        return not subprocess.run(check, cwd=TESTS, env=environment, capture_output=True, timeout=TIMEOUT).returncode
    except subprocess.TimeoutExpired:
        return False


def is_detected(mutation: Mutation) -> bool:
    """Whether the check passes on a copy of the package and fails once the protection is removed."""
    with tempfile.TemporaryDirectory() as folder:
        module = copy_of_package(Path(folder)) / mutation.module
        if not passes(mutation.check, Path(folder)):
            return False
        module.write_text(module.read_text().replace(mutation.text, mutation.replacement))
        return not passes(mutation.check, Path(folder))


def main() -> int:
    missed = 0
    for mutation in MUTATIONS:
        started = time.monotonic()
        detected = is_detected(mutation)
        missed += not detected
        print(
            "red  " if detected else "WRONG", f"{time.monotonic() - started:4.0f} s ", mutation.protection, flush=True
        )
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
