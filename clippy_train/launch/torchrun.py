"""A run whose processes torchrun has started: rank 0 prepares it, then every process becomes its rank.

Preparation (checks, choice of the checkpoint, frozen configuration) happens once, as under every launcher. The other
ranks wait for its result in torchrun's own key-value store.
"""

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn

from clippy_train.config import TrainConfig
from clippy_train.errors import ClippyError
from clippy_train.launch.agent import RANK, device_environment

TIMEOUT = timedelta(hours=2)  # verifying a large checkpoint, byte by byte, takes time
TRAIN = "train"


def run_rank(config: TrainConfig, prepare: Callable[[TrainConfig], bool]) -> int:
    """Have rank 0 prepare the run, then become this process's rank; return the exit code if there is nothing to train.

    Raises:
        ClippyError: what `prepare` raised, on rank 0.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not re-exported explicitly

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(host, port, is_master=False, timeout=TIMEOUT)
    key = f"clippy_train/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    if os.environ["RANK"] == "0":
        try:
            store.set(key, TRAIN if prepare(config) else "0")
        except ClippyError as error:
            store.set(key, str(error.exit_code))
            raise
    result = store.get(key).decode()
    return _become_rank(config) if result == TRAIN else int(result)


def _become_rank(config: TrainConfig) -> NoReturn:
    sys.stdout.flush()
    command = [sys.executable, "-m", RANK, str(config.run_dir)]
    os.execve(sys.executable, command, {**os.environ, **device_environment(config)})
