"""One command at a time in a run's folder.

The operating system releases the lock on a file when its process ends, however it ends. A process of torchrun's keeps
it when it becomes rank 0. Slurm knows whether a job is still running, so a lock that a lost node left on a shared file
system blocks nobody.
"""

import os
import socket
from pathlib import Path

from clippy_train.errors import ConfigError
from clippy_train.files import take_lock
from clippy_train.launch import slurm
from clippy_train.run.folder import LOCK


def lock_folder(folder: Path, setting: str, attempt: str = "") -> int:
    """Create a folder and keep other commands out of it until this process has ended.

    Args:
        setting: the key and value that lead to this folder.
        attempt: `slurm.attempt_name` in a Slurm job.

    Returns:
        The lock's descriptor: a process that inherits it keeps the lock, too.

    Raises:
        ConfigError: another command runs there, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise ConfigError(f"run.root: cannot write the run's folder: {error}") from error
    holder = os.read(descriptor, 1000).decode() or "another command"
    if not take_lock(descriptor) and not slurm.has_ended(holder):
        os.close(descriptor)
        raise ConfigError(f"{setting}: {holder} trains in {folder}; wait for it, or choose another run.name")
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, (attempt or f"process {os.getpid()} on {socket.gethostname()}").encode(), 0)
    os.set_inheritable(descriptor, True)
    return descriptor
