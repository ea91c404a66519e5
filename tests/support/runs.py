"""Real training runs for tests: the `clippy` command in child processes, two DeepSpeed ranks, small models."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from clippy_train.errors import MachineFault
from clippy_train.hf.export import load_checkpoint_model
from clippy_train.run.checkpoint import find_checkpoint
from support import forks, processes

# A model and a batch that train in seconds. `Runs` adds corpus and tokenizer.
SMALL = [
    "experiment=demo",
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.num_heads=2",
    "model.window_size=8",
    "model.max_position_embeddings=64",
    "data.seq_len=32",
    "data.streams=4",
    "data.window=8",
    "trainer.global_batch_size=8",
    "trainer.micro_batch_size=2",
    "trainer.eval_micro_batch_size=4",
    "trainer.val_samples=6",
    "trainer.max_steps=6",
    "trainer.val_every_steps=4",
    "trainer.log_every_steps=2",
    "checkpoint.every_steps=2",
    "logger.sample_prompts=[]",
    "optim.warmup_steps=2",
    "optim.decay_steps=4",
]

Process = subprocess.Popen[str] | forks.Command
MEASURED = ("throughput/", "slowest/", "system/", "checkpoint/")  # prefixes of values that differ between equal runs


class Runs:
    """Runs in one folder, on one corpus and tokenizer."""

    def __init__(self, root: Path, corpus: Path, tokenizer: Path) -> None:
        self.root, self.tokenizer = root, tokenizer
        self.settings = [*SMALL, f"data.path={corpus}", f"tokenizer.base={tokenizer}"]

    def folder(self, name: str) -> Path:
        return self.root / "runs" / name

    def train(self, name: str, *overrides: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Train to the end and check the exit code."""
        return self.clippy("train", *self.settings, f"run.name={name}", *overrides, code=code)

    def clippy(self, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        result = forks.run(arguments, self.root, environment(self.root), timeout=150)
        assert result.returncode == code, f"exit code {result.returncode}:\n{result.stdout}\n{result.stderr}"
        return result

    def start(self, name: str, *overrides: str) -> forks.Command:
        """Start training in the background, in its own process group."""
        return self.start_clippy("train", *self.settings, f"run.name={name}", *overrides)

    def start_clippy(self, *arguments: str) -> forks.Command:
        return forks.Command(arguments, self.root, environment(self.root), merged=True)

    def start_command(self, *arguments: str) -> subprocess.Popen[str]:
        """Start a new Python process, where `start_clippy` forks one."""
        return processes.start(
            command(*arguments),
            cwd=self.root,
            env=environment(self.root),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def rows(self, name: str, key: str = "train/loss") -> list[dict[str, Any]]:
        """The logged rows of a run that have `key`."""
        path = self.folder(name) / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [row for row in rows if key in row]

    def train_with_a_kill(self, name: str, step: int, *overrides: str) -> None:
        """Train to the end, but kill a rank at an arbitrary moment after a step, and resume."""
        process = self.start(name, *overrides)
        self.wait_for_step(name, step, process)
        os.kill(rank_pids(self.folder(name))[0], signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode == MachineFault.exit_code
        trained = len(self.rows(name))
        assert "from step" in self.train(name, *overrides).stdout
        assert len(self.rows(name)) > trained

    def wait_for_step(self, name: str, step: int, process: Process, key: str = "train/loss") -> None:
        deadline = time.monotonic() + 100
        while not any(row["step"] >= step for row in self.rows(name, key)):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, f"step {step} not reached in time"
            time.sleep(0.02)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "clippy_train.cli", *arguments]


def environment(root: Path) -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TORCH_EXTENSIONS_DIR": str(root / "torch_extensions"),
        "TMPDIR": str(root),
    }


def rank_pids(run_dir: Path, rank: int | None = None) -> list[int]:
    """Processes that train `run_dir`: its ranks, or one of them, and their loader processes."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink() != run_dir.parents[1]:
                continue
            its_rank = _rank_of(process, run_dir.name)
        except OSError:
            continue
        if its_rank is not None and rank in (its_rank, None):
            found.append(int(process.name))
    return sorted(found)


def _rank_of(process: Path, run: str) -> int | None:
    """The rank that a process has in a run, or whose loader it is; it was forked or started."""
    line = (process / "cmdline").read_bytes().split(b"\0")
    for file in (process / "fd").iterdir():
        marked = re.fullmatch(rf"/memfd:{forks.mark('([0-9]+)', re.escape(run))} \(deleted\)", str(file.readlink()))
        if marked:
            return int(marked[1])
    if b"clippy_train.train" in line and f"runs/{run}".encode() in line:
        variables = dict(each.partition(b"=")[::2] for each in (process / "environ").read_bytes().split(b"\0"))
        return int(variables.get(b"RANK", b"0"))
    return None


def end(process: Process, number: signal.Signals) -> int:
    """Signal a launcher and return its exit code."""
    process.send_signal(number)
    process.communicate(timeout=90)
    assert process.returncode is not None
    return process.returncode


def trained(row: dict[str, Any]) -> dict[str, Any]:
    """The row of a step without its measurements."""
    return {name: value for name, value in row.items() if not name.startswith(MEASURED)}


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """The fp32 weights of a run's newest checkpoint."""
    checkpoint = find_checkpoint(run_dir)
    assert checkpoint
    return {
        name: parameter.detach()
        for name, parameter in load_checkpoint_model(run_dir / "hf", checkpoint).named_parameters()
    }


def weights_hash(run_dir: Path) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(weights(run_dir).items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def losses_and_norms(runs: Runs, name: str) -> list[float]:
    return [row[key] for row in runs.rows(name) for key in ("train/loss", "train/grad_norm")]
