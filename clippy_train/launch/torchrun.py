"""A run whose processes torchrun has started: rank 0 prepares it, then every process becomes its rank.

Preparing (checks, the choice of a checkpoint, the frozen configuration) happens once, as under every launcher. The
other ranks wait for the result in torchrun's own key-value store.
"""

import json
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn

from clippy_train.config import TrainConfig
from clippy_train.errors import ClippyError
from clippy_train.launch.agent import (
    RANK,
    device_environment,
)

PATIENCE = timedelta(hours=2)  # reading a large checkpoint, byte by byte, takes time


def run_rank(config: TrainConfig, prepare: Callable[[TrainConfig], list[str] | int]) -> int:
    """Become this process's rank, with the arguments that rank 0's `prepare` returns; an exit code ends it instead.

    Raises:
        ClippyError: what `prepare` raised, on rank 0.
    """
    from torch.distributed import TCPStore

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(host, port, is_master=False, timeout=PATIENCE)
    key = f"clippy_train/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    if os.environ["RANK"] != "0":
        told = json.loads(store.get(key))
    else:
        try:
            told = prepare(config)
        except ClippyError as error:
            store.set(key, json.dumps(error.exit_code))
            raise
        store.set(key, json.dumps(told))
    return told if isinstance(told, int) else _become_rank(config, told)


def _become_rank(config: TrainConfig, arguments: list[str]) -> NoReturn:
    sys.stdout.flush()
    command = [sys.executable, "-m", RANK, str(config.run_dir), *arguments]
    os.execve(sys.executable, command, {**os.environ, **device_environment(config)})
