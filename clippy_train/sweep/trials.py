"""The trials of a sweep, as processes on this machine or as Slurm jobs. Each is a `clippy train` with its own folder.

A trial is done when the checkpoint of its last step exists, whichever command wrote it with the same settings. With
`trainer.max_epochs` its command says so, at once if the run has ended before.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from clippy_train.compose import LAUNCH, plain
from clippy_train.config import TrainConfig, keys
from clippy_train.errors import ConfigError, Interrupted
from clippy_train.files import atomic_write
from clippy_train.launch.slurm import job_facts
from clippy_train.run.folder import CONFIG, JOB_FILE, METRICS, OUTPUT, last_step
from clippy_train.run.rows import read_rows

FOLLOWS = "CLIPPY_SWEEP"  # environment variable of a trial's process: its standard input is a pipe from the sweep
DONE, PRUNED, INTERRUPTED = "done", "pruned", "interrupted"  # states of a trial
REMEDY = "Restore them, or choose another run.name"
OBJECTIVE = "val/bits_per_byte"  # trials are ranked by their lowest validation, that of the run's best checkpoint
# Sections, groups and keys that, apart from rounding, change neither what a trial learns nor how that is measured.
NEUTRAL = (
    "run", "launcher", "sweep", "logger", "checkpoint", "resume", "debug", "hardware",
    "data.num_workers", "data.max_bad_fraction",
    "model.attention", "model.compile", "model.checkpoint_activations",
    "strategy.name", "strategy.stage", "strategy.reduce_bucket_size",
    "trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.micro_batch_size",
    "trainer.eval_micro_batch_size", "trainer.log_every_steps", "trainer.audit", "trainer.watchdog_seconds",
    "trainer.profile_steps", "trainer.peak_tflops", "trainer.deterministic",
)  # fmt: skip


def matters(name: str) -> bool:
    """Whether results of two values of this key, group or section are not comparable."""
    return not any(name == each or name.startswith(f"{each}.") for each in NEUTRAL)


def settings_that_matter(composed: DictConfig) -> dict[str, Any]:
    """The settings that a trial's result depends on, as plain values."""
    selected = {name: OmegaConf.select(composed, name) for name, _ in keys(TrainConfig) if matters(name)}
    return {name: plain(each) for name, each in selected.items()}


def differences(then: dict[str, Any], now: dict[str, Any]) -> str:
    """The settings that changed, in words; empty if none did."""
    changed = [name for name in now if then.get(name) != now[name]]
    return "; ".join(f"{name} was {then.get(name)}, is {now[name]}" for name in changed)


@dataclass
class Trial:
    """One point of a sweep.

    Attributes:
        varied: the values that it does not share with the other trials, by key.
        arguments: the arguments of its `clippy train`.
        settings: those that its result depends on.
        code: exit code; None before it has ended.
        pruned: whether it was told to end, because other trials are better.
        job: id of its Slurm job; empty if it has none, or the job has ended.
    """

    varied: dict[str, str]
    arguments: list[str]
    run_dir: Path
    max_steps: int
    settings: dict[str, Any] = field(default_factory=dict)
    code: int | None = None
    pruned: bool = False
    job: str = ""

    @property
    def done(self) -> bool:
        ended = self.code == 0 and self.settings.get("trainer.max_epochs") is not None  # with its data
        return ended or last_step(self.run_dir) >= self.max_steps

    @property
    def state(self) -> str:
        if self.done:
            return DONE
        if self.code is None:
            return f"in the queue: job {self.job}" if self.job else "not started"
        if self.code == Interrupted.exit_code:
            return PRUNED if self.pruned else INTERRUPTED
        return f"failed: exit code {self.code}"

    @property
    def over(self) -> bool:
        """Whether the same command again would do nothing about it, or try it again from its start."""
        return self.done or (self.code is not None and self.state != INTERRUPTED)

    def require_same_settings(self) -> None:
        """Raise ConfigError if the steps in this trial's folder were trained with other settings."""
        recorded = self.run_dir / CONFIG
        if not (last_step(self.run_dir) and recorded.exists()):
            return
        changed = differences(settings_that_matter(cast(DictConfig, OmegaConf.load(recorded))), self.settings)
        if changed:
            raise ConfigError(f"{self.run_dir} has results of other settings: {changed}. {REMEDY}")

    def validations(self) -> list[tuple[float, int]]:
        """Bits per byte and step of each validation, except the one before the first step."""
        rows = read_rows(self.run_dir / METRICS, OBJECTIVE)
        return [(row[OBJECTIVE], row["step"]) for row in rows if OBJECTIVE in row and row["step"] > 0]

    @property
    def result(self) -> float | None:
        """The objective; None if the trial is not done, or its metrics are gone."""
        return min(self.validations(), default=(None, 0))[0] if self.done else None


class Local:
    """Trials as child processes: one at a time on this terminal, or `parallel` at a time, each with an output file.

    Each holds the sweep's `lock`, so that the same sweep does not meet trials that still save after it was killed.
    """

    poll_seconds = 0.1
    lock: int | None = None

    def __init__(self, parallel: int) -> None:
        self.parallel = parallel
        self._processes: dict[Path, subprocess.Popen[bytes]] = {}

    def start(self, trial: Trial) -> None:
        trial.run_dir.mkdir(parents=True, exist_ok=True)
        with ExitStack() as files:
            output = None
            if self.parallel > 1:
                print(f"{trial.run_dir}: started, see {OUTPUT} there", flush=True)
                output = files.enter_context((trial.run_dir / OUTPUT).open("a"))
            self._processes[trial.run_dir] = subprocess.Popen(
                [sys.executable, "-m", "clippy_train.cli", "train", *trial.arguments],
                env={**os.environ, FOLLOWS: "1"},
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=() if self.lock is None else (self.lock,),
                start_new_session=True,  # so that a terminal's Ctrl-C reaches it once, through `stop`
            )

    def poll(self, running: list[Trial]) -> list[Trial]:
        """The trials that are still running; sets the exit code of the others."""
        for trial in running:
            code = self._processes[trial.run_dir].poll()
            trial.code = 128 - code if code is not None and code < 0 else code
        return [trial for trial in running if trial.code is None]

    def stop(self, signal_number: int) -> None:
        """Pass the signal on to all trials: they save and exit."""
        for process in self._processes.values():
            if process.poll() is None:
                process.send_signal(signal_number)

    def end(self, trial: Trial) -> None:
        """Have one trial save and exit."""
        self._processes[trial.run_dir].send_signal(signal.SIGTERM)


def follow_sweep() -> None:
    """In a trial's process: save and exit once the sweep has ended, for whatever reason."""
    if os.environ.pop(FOLLOWS, None):
        threading.Thread(target=_wait_for_end, daemon=True).start()


def _wait_for_end() -> None:
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)


class Slurm:
    """Trials as jobs of launch/train.sbatch, which requeue themselves.

    A job outlives the sweep that submitted it; the same sweep later waits for it instead of submitting another one.
    """

    poll_seconds = 5.0
    ENDED = (  # final states of a job
        "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED",
        "REVOKED", "TIMEOUT",
    )  # fmt: skip

    def __init__(self, parallel: int | None, options: str) -> None:
        if shutil.which("sbatch") is None:
            raise ConfigError(
                "launcher=slurm: sbatch is not on the PATH; omit launcher to run the trials on this machine"
            )
        self.parallel, self.options = parallel or sys.maxsize, shlex.split(options)
        self._detached = False

    def start(self, trial: Trial) -> None:
        trial.run_dir.mkdir(parents=True, exist_ok=True)
        file = trial.run_dir / JOB_FILE
        known: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        if known and self._states([known["job"]]).get(known["job"], "COMPLETED") not in self.ENDED:
            self._wait_for(trial, known["job"], known["settings"])
            return
        output = f"--output={str(trial.run_dir.resolve()).replace('%', '%%')}/slurm-%j.out"
        command = ["sbatch", "--parsable", f"--job-name={trial.run_dir.name}", output, *self.options]
        command += [str(LAUNCH / "train.sbatch"), *trial.arguments]
        submitted = subprocess.run(command, env=_outside_of_jobs(), capture_output=True, text=True, check=False)
        if submitted.returncode:
            _refuse(trial, submitted.stderr.strip())
            return
        trial.job = submitted.stdout.strip().split(";")[0]
        with atomic_write(file) as record:
            json.dump({"job": trial.job, "settings": trial.settings}, record)
        print(f"{trial.run_dir}: job {trial.job}", flush=True)

    def _wait_for(self, trial: Trial, job: str, settings: dict[str, Any]) -> None:
        changed = differences(settings, trial.settings)
        if changed:
            _refuse(trial, f"job {job} in the queue has other settings: {changed}. {REMEDY}")
            return
        trial.job = job
        print(f"{trial.run_dir}: waiting for job {job}", flush=True)

    def poll(self, running: list[Trial]) -> list[Trial]:
        """As `Local.poll`; after `stop`, no trial counts as running."""
        states = self._states([trial.job for trial in running if trial.job])
        for trial in running:
            if trial.job and states.get(trial.job, "COMPLETED") in self.ENDED:
                trial.code, trial.job = self._code(trial.job), ""
        return [] if self._detached else [trial for trial in running if trial.code is None]

    def stop(self, signal_number: int) -> None:
        """Stop waiting; the jobs go on."""
        self._detached = True

    def end(self, trial: Trial) -> None:
        """Cancel one trial's job: it saves, and is not requeued."""
        subprocess.run(["scancel", trial.job], check=False)

    def _states(self, jobs: list[str]) -> dict[str, str]:
        """The state of each job that Slurm still knows; `UNKNOWN` for all of them while Slurm does not answer."""
        command = ["squeue", "--noheader", "--states=all", "--format=%i %T", f"--jobs={','.join(jobs)}"]
        asked = subprocess.run(command, capture_output=True, text=True, check=False)
        if asked.returncode and "Invalid job id" not in asked.stderr:
            return dict.fromkeys(jobs, "UNKNOWN")
        return dict(line.split() for line in asked.stdout.splitlines())

    def _code(self, job: str) -> int:
        """The exit code of a job; that of an interruption if it did not end by itself or Slurm has forgotten it."""
        facts = job_facts(job)
        if facts.get("JobState") not in ("COMPLETED", "FAILED"):
            return Interrupted.exit_code
        code, number = map(int, facts["ExitCode"].split(":"))
        return 128 + number if number else code


def _refuse(trial: Trial, reason: str) -> None:
    print(f"{trial.run_dir}: {reason}", file=sys.stderr)
    trial.code = ConfigError.exit_code


def _outside_of_jobs() -> dict[str, str]:
    """The environment without what describes the job that this sweep may run in: sbatch would pass it on."""
    return {name: value for name, value in os.environ.items() if name == "SLURM_CONF" or not name.startswith("SLURM_")}
