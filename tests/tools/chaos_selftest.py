"""Take each protection out of a copy of the package, and see the gate that guards it turn red.

    python -m tools.chaos_selftest        `make chaos-selftest`: some ten minutes on two cores

A gate that stays green without its protection proves nothing, and neither does one that is red with it: each runs both
ways. Exits with 1 if one says the same both times.
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
    """A protection, the text of a module that is it, what stands there without it, and the gate that must notice."""

    protection: str
    module: str
    text: str
    instead: str
    gate: list[str]


def pytest(*tests: str) -> list[str]:
    return [str(Path(sys.executable).parent / "pytest"), "-q", "-x", "-p", "no:cacheprovider", *tests]


MUTATIONS = [
    Mutation(
        "files reach the disk before a checkpoint exists",
        "files.py",
        "        os.fsync(descriptor)\n",
        "        pass\n",
        pytest("test_checkpoint.py", "-k", "reaches_the_disk"),
    ),
    Mutation(
        "the content of a checkpoint is verified",
        "run/checkpoint.py",
        "        elif content and hash_file(path / name) != sha256:\n",
        "        elif False:\n",
        pytest("test_checkpoint.py"),
    ),
    Mutation(
        "signals only set a flag",
        "train/callbacks/preemption.py",
        "        self.signal = number\n",
        "        raise SystemExit\n",
        SIGNALS,
    ),
    Mutation(
        "signals wait until a rank can handle them",
        "launch/agent.py",
        "    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)\n",
        "",
        [*SIGNALS, "--moment", "start-up"],
    ),
    Mutation(
        "cursors are those of the trained batch, not of what a loader has read since",
        "train/callbacks/progress.py",
        "            self.cursors[stream] = cursor\n",
        "            self.cursors[stream] = cursor\n            self.cursors[stream][2] += 1\n",
        KILLS,
    ),
    Mutation(
        "what is saved is a copy of the state, which training then changes",
        "train/writer.py",
        "self._snapshot.of(state_dict)\n",
        "state_dict\n",
        KILLS,
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
    """A copy beside its configuration, which gates import instead of the package itself."""
    for folder in (PACKAGE, PACKAGE.parent / "conf", PACKAGE.parent / "launch"):
        shutil.copytree(folder, root / folder.name)
    return root / PACKAGE.name


def passes(gate: list[str], root: Path) -> bool:
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    try:
        return not subprocess.run(gate, cwd=TESTS, env=environment, capture_output=True, timeout=TIMEOUT).returncode
    except subprocess.TimeoutExpired:
        return False


def noticed(mutation: Mutation) -> bool:
    """Whether the gate passes on a copy of the package, and fails once the protection is taken out of it."""
    with tempfile.TemporaryDirectory() as folder:
        module = copy_of_package(Path(folder)) / mutation.module
        source = module.read_text()
        assert source.count(mutation.text) == 1, f"{mutation.module} has changed: {mutation.protection}"
        if not passes(mutation.gate, Path(folder)):
            return False
        module.write_text(source.replace(mutation.text, mutation.instead))
        return not passes(mutation.gate, Path(folder))


def main() -> int:
    missed = 0
    for mutation in MUTATIONS:
        started = time.monotonic()
        seen = noticed(mutation)
        missed += not seen
        print("red  " if seen else "WRONG", f"{time.monotonic() - started:4.0f} s ", mutation.protection, flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
