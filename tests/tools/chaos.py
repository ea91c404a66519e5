"""Kill or signal real runs at random moments, resume them, and compare them with an uninterrupted run.

    python -m tools.chaos kill --trials 200        kill -9: the whole run, single ranks, the launcher, a loader process
    python -m tools.chaos signal --trials 200      TERM, USR1, USR2, INT to random processes, up to 2 s apart

Every run has two DeepSpeed ZeRO-1 ranks and gets one fault per attempt until it finishes. It must then equal the
reference in every logged loss, gradient norm, digest and validation, in the ledger of what was trained, in the bytes of
the fp32 weights and in the random state of every rank. Takes about 10 seconds per trial on two cores.
"""

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from support.models import gpt_neo
from support.runs import Process, Runs, rank_pids, trained, weights_hash
from support.small_corpus import make_corpus, make_tokenizer

from clippy_train.files import STAGING
from clippy_train.run.checkpoint import find_checkpoint
from clippy_train.run.folder import checkpoint_folders
from clippy_train.tokenizer import load_tokenizer

STEPS = 40
VAL_EVERY = 10
SETTINGS = [
    f"trainer.max_steps={STEPS}",
    f"trainer.val_every_steps={VAL_EVERY}",
    "checkpoint.every_steps=3",
    "optim.decay_steps=30",
    "trainer.audit=true",
]
MOMENTS = ("start-up", "step", "save", "validation")
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
MAX_SKEW = 2.0  # seconds between the first and the last process that a signal reaches
GRACE = 30.0  # seconds within which a signalled run must exit
TIMEOUT = 120.0  # seconds after which a run counts as hung


@dataclass
class Run:
    """One attempt of a run."""

    folder: Path
    process: Process

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def ranks(self) -> list[int]:
        return [pid for pid in rank_pids(self.folder) if session(pid) == pid]

    def loaders(self) -> list[int]:
        return sorted(set(rank_pids(self.folder)) - set(self.ranks()))


Fault = Callable[[Run, random.Random], str]  # injects a fault; returns its name


def kill(run: Run, rng: random.Random) -> str:
    """kill -9 for some or all of a run's processes."""
    targets_of = {
        "everything": lambda: [run.process.pid, *rank_pids(run.folder)],
        "rank 0": lambda: run.ranks()[:1],
        "rank 1": lambda: run.ranks()[1:],
        "launcher": lambda: [run.process.pid],
        "a loader": lambda: run.loaders()[:1],
    }
    name = rng.choice(list(targets_of))
    for pid in targets_of[name]():
        send(pid, signal.SIGKILL)
    return name


def send_signal(run: Run, rng: random.Random) -> str:
    """One signal to some or all of a run's processes."""
    number = rng.choice(SIGNALS)
    everyone = [run.process.pid, *rank_pids(run.folder)]
    choices = [[run.process.pid], run.ranks()[:1], run.ranks()[1:], everyone]
    targets = rng.choice([each for each in choices if each])  # ranks may not have started
    for pid in targets:
        if pid != targets[0]:
            time.sleep(rng.uniform(0, MAX_SKEW / (len(targets) - 1)))
        # A second INT kills ranks at once, and the launcher forwards the first one to every rank.
        if not (number == signal.SIGINT and pid != targets[0]):
            send(pid, number)
    return number.name


def send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):  # it has just ended
        os.kill(pid, number)


class Chaos:
    """A reference run, and runs with faults that must equal it.

    Args:
        start: starts a command of `runs` in the background.

    Attributes:
        counts: trials, faults and observations, by name.
    """

    def __init__(
        self,
        runs: Runs,
        seed: int,
        moments: Sequence[str] = MOMENTS,
        start: Callable[..., Process] = Runs.start_command,
    ) -> None:
        self.runs, self.rng, self.moments, self.counts = runs, random.Random(seed), moments, Counter[str]()
        self._start = start
        base = runs.root / "base"  # with dropout, so that a lost random state changes the loss
        vocab_size = len(load_tokenizer(str(runs.tokenizer)))
        gpt_neo(window=8, hidden=32, heads=2, vocab_size=vocab_size, dropout=0.1).save_pretrained(base)
        self.settings = [*SETTINGS, f"model.base={base}"]
        started = time.monotonic()
        process = self.start("reference")
        runs.wait_for_step("reference", 1, process)
        self.start_up = time.monotonic() - started
        assert process.wait(TIMEOUT) == 0
        self.reference = self.outcome("reference")

    def start(self, name: str) -> Process:
        return self._start(self.runs, "train", *self.runs.settings, f"run.name={name}", *self.settings)

    def outcome(self, name: str) -> dict[str, Any]:
        """Everything that must not depend on the faults."""
        folder = self.runs.folder(name)
        checkpoint = find_checkpoint(folder)
        assert checkpoint
        ledger = folder / "ledger.jsonl"
        return {
            "steps": list(map(trained, self.runs.rows(name))),
            "validations": self.runs.rows(name, "val/loss"),
            "ledger": ledger.read_text().splitlines() if ledger.exists() else None,
            "weights": weights_hash(folder),
            "random state": [
                str(torch.load(file, weights_only=True)) for file in sorted(checkpoint.path.glob("rng-*"))
            ],
        }

    def campaign(self, fault: Fault, trials: int) -> Counter[str]:
        """Run attempts until `trials` faults were injected; returns `counts`.

        Raises:
            AssertionError: a run hung, left a process running, exited without saving, or differs from the reference.
        """
        number = 0
        while self.counts["trials"] < trials:
            number += 1
            name = f"faulty-{number}"
            while self.counts["trials"] < trials and self.attempt(name, fault):
                pass
            self.runs.train(name, *self.settings)
            differing = [part for part, value in self.outcome(name).items() if value != self.reference[part]]
            assert not differing, f"{name} differs from the reference in {differing}; see {self.runs.folder(name)}"
            self.counts["runs compared"] += 1
            print(f"{self.counts['trials']} of {trials} faults, {self.counts['runs compared']} runs equal", flush=True)
            shutil.rmtree(self.runs.folder(name))
        return self.counts

    def attempt(self, name: str, fault: Fault) -> bool:
        """Start a run and inject one fault; False if the run finished before it."""
        run = Run(self.runs.folder(name), self.start(name))
        moment = self.rng.choice(self.moments)
        self.wait_for(moment, run, name)
        if not run.alive:
            assert run.process.returncode == 0, run.process.communicate()[0]
            return False
        has_ranks = bool(rank_pids(run.folder))
        what = fault(run, self.rng)
        self.wait_for_exit(run, name, signalled=fault is send_signal, had_ranks=has_ranks)
        self.counts.update(["trials", f"during {moment}", what])
        return True

    def wait_for(self, moment: str, run: Run, name: str) -> None:
        """Wait for a random moment of this kind, or until the run ends."""
        if moment == "start-up":
            time.sleep(self.rng.uniform(0, self.start_up))
            return
        rows = self.runs.rows(name)
        done = rows[-1]["step"] if rows else 0
        first = done + self.rng.randint(1, 8)
        conditions: dict[str, Callable[[], bool]] = {
            "step": lambda: self.last_step(name) >= first,
            "save": lambda: self.last_step(name) >= first and any(run.folder.glob(f"checkpoints/*{STAGING}")),
            "validation": lambda: self.last_step(name) >= first and self.last_step(name) % VAL_EVERY == 0,
        }
        reached = conditions[moment]
        deadline = time.monotonic() + TIMEOUT
        while run.alive and not reached():
            assert time.monotonic() < deadline, f"{name} hangs before its {moment}"
            time.sleep(0.001)
        time.sleep(self.rng.uniform(0, 0.05))

    def last_step(self, name: str) -> int:
        path = self.runs.folder(name) / "metrics.jsonl"
        lines = path.read_bytes().splitlines() if path.exists() else []
        try:
            return json.loads(lines[-1])["step"] if lines else 0
        except ValueError:
            return 0  # the line is being written

    def wait_for_exit(self, run: Run, name: str, signalled: bool, had_ranks: bool) -> None:
        """Wait until no process of a run is left, and check how it exited.

        Before its ranks start, a command may lack its signal handlers, so a signal may end it with any code.
        """
        start = time.monotonic()
        said, _ = run.process.communicate(timeout=TIMEOUT)
        while rank_pids(run.folder):
            assert time.monotonic() - start < TIMEOUT, f"{name}: processes {rank_pids(run.folder)} outlive the run"
            time.sleep(0.01)
        if any(run.folder.glob(f"checkpoints/*{STAGING}")):
            self.counts["inside a save"] += 1
        if not signalled:
            return
        seconds = time.monotonic() - start
        self.counts["slowest exit, ms"] = max(self.counts["slowest exit, ms"], round(1000 * seconds))
        assert not had_ranks or run.process.returncode in (0, 75), f"{name}: exit code {run.process.returncode}\n{said}"
        assert seconds < GRACE, f"{name} took {seconds:.0f} s to exit"
        self.counts[f"exit code {run.process.returncode}" if had_ranks else "before its ranks started"] += 1
        rows, newest = self.runs.rows(name), checkpoint_folders(run.folder)
        assert not rows or newest[0].name == f"step-{rows[-1]['step']:08d}", f"{name} exited without saving\n{said}"


def session(pid: int) -> int:
    """The session of a process, which is that of its rank."""
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return -1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fault", choices=("kill", "signal"))
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--moment", choices=MOMENTS, help="inject faults only then")
    options = parser.parse_args()
    started = time.monotonic()
    root = Path(tempfile.mkdtemp())  # kept for inspection if a run differs
    corpus = make_corpus(root)
    chaos = Chaos(
        Runs(root, corpus, make_tokenizer(corpus, root / "tokenizer")),
        options.seed,
        [options.moment] if options.moment else MOMENTS,
    )
    counts = chaos.campaign({"kill": kill, "signal": send_signal}[options.fault], options.trials)
    shutil.rmtree(root)
    print(json.dumps({"fault": options.fault, **counts, "seconds": round(time.monotonic() - started)}))


if __name__ == "__main__":
    main()
