"""`environment.json`: versions, commit and hardware that an attempt of a run had."""

import os
import platform
import socket
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import clippy_train

PACKAGES = ("torch", "lightning", "transformers", "tokenizers", "deepspeed", "hydra-core", "numpy", "zstandard")


def environment() -> dict[str, Any]:
    """The record of this process's environment."""
    return {
        "clippy_train": clippy_train.__version__,
        "commit": git_commit(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpus": os.cpu_count(),
        "gpus": gpu_names(),
    }


def git_commit() -> str | None:
    """The commit of the source tree that this package runs from; None if it is installed."""
    here = Path(clippy_train.__file__)
    git = ["git", "-C", str(here.parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], capture_output=True, check=True)
        return subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None


def gpu_names() -> list[str]:
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return []
    return listed.stdout.splitlines() if listed.returncode == 0 else []
