"""Every name in a run's folder, `run.root`/`run.name`, and in its checkpoints. Readers and writers take them from here.

config.yaml         every setting, resolved: what ranks read
settings.jsonl      with which settings each step was made (`run.history`)
start.json          what the launcher decided for this attempt (`run.start`)
environment.json    versions, commit, hardware
corpus.json         what the corpus's manifest says about it; of a mixture, each source's name, streams and manifest
attempts.json       Slurm: at which step each attempt of the job began
metrics.jsonl       a row for each logged step, validation and checkpoint
ledger.jsonl        `trainer.audit`: which documents each step was trained on
samples.jsonl       completions of `logger.sample_prompts`
events.out.*        the same numbers, for TensorBoard
validation/         the same for the loss of validations, as a run beside this one
hf/                 configuration and tokenizer of the model in training, as Hugging Face files
profile/            `trainer.profile_steps`: traces
stacks/             what each rank was doing when one hung
lost/               tracebacks of ranks that lost the others, or their device
checkpoints/step-00000500/    manifest.json, state (the strategy's), rng-00000.pt, ...
checkpoints/best    link to the checkpoint with the lowest validation
.lock               held while a command trains here
output.log          output of a trial that runs beside others
job.json            a trial's Slurm job, and the settings that it was submitted with
"""

import re
from pathlib import Path

from clippy_train.files import STAGING

CONFIG = "config.yaml"
HISTORY = "settings.jsonl"
START = "start.json"
ENVIRONMENT = "environment.json"
CORPUS = "corpus.json"
ATTEMPTS = "attempts.json"
METRICS = "metrics.jsonl"
LEDGER = "ledger.jsonl"
SAMPLES = "samples.jsonl"
VALIDATION = "validation"
HF_FOLDER = "hf"
PROFILE = "profile"
STACKS = "stacks"
LOST = "lost"
CHECKPOINTS = "checkpoints"
BEST = "best"
LOCK = ".lock"
OUTPUT = "output.log"
JOB_FILE = "job.json"

# In a checkpoint's folder
MANIFEST = "manifest.json"
STATE = "state"  # a file, or DeepSpeed's folder
LATEST = "latest"  # in STATE: DeepSpeed's own pointer
DEEPSPEED_TAG = "checkpoint"  # the folder of DeepSpeed's files in STATE, as Lightning names it


def stack_file(run_dir: Path, rank: int) -> Path:
    return run_dir / STACKS / f"rank-{rank}.txt"


def lost_file(run_dir: Path, rank: int) -> Path:
    return run_dir / LOST / f"rank-{rank}.txt"


def rng_file(checkpoint: Path, rank: int) -> Path:
    return checkpoint / f"rng-{rank:05d}.pt"


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    return run_dir / CHECKPOINTS / f"step-{step:08d}"


def checkpoint_step(path: Path) -> int:
    """The step in the name of a checkpoint's folder; -1 if it has another name."""
    matched = re.fullmatch(r"step-(\d{8})", path.name)
    return int(matched[1]) if matched else -1


def checkpoint_folders(run_dir: Path) -> list[Path]:
    """A run's checkpoint folders, newest first, intact or not; without those that are not complete yet."""
    return sorted((run_dir / CHECKPOINTS).glob("step-" + "[0-9]" * 8), reverse=True)


def staging_folders(run_dir: Path) -> list[Path]:
    """What was left half-written among a run's checkpoints."""
    found = (run_dir / CHECKPOINTS).glob(f"*{STAGING}")
    return [path for path in found if not path.is_symlink()]  # of `best`: the next one replaces it


def last_step(run_dir: Path) -> int:
    """The step of a run's newest checkpoint, intact or not; 0 if it has none."""
    newest = checkpoint_folders(run_dir)[:1]
    return checkpoint_step(newest[0]) if newest else 0


def run_of(checkpoint: Path) -> Path:
    """The folder of the run that wrote a checkpoint, where either of them may be reached through a link."""
    places = [path.parent.parent for path in (checkpoint.absolute(), checkpoint.resolve())]
    return next((place for place in places if (place / CONFIG).exists()), places[-1])
