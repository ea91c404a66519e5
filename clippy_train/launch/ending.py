"""Why a run ended: one exit code and one line from those of its processes.

A rank that fails takes the others with it, and these fail in their collectives. So an exit code that names a cause wins
over one of a rank that has lost the others, and that one over an interruption.
"""

import signal
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path

from clippy_train.errors import Interrupted, MachineFault
from clippy_train.run.folder import LOST, lost_file

FROM_WEAK_TO_STRONG = (0, Interrupted.exit_code, MachineFault.exit_code, 1, 2, 3, 4)
FIRST_TASK_CODE = 10  # srun returns the largest code of its tasks, so they number theirs by strength, from here on


def strongest(codes: Iterable[int]) -> int:
    """The exit code that says most about why a run ended. A negative one is a signal's number."""
    return max(map(_known, codes), key=FROM_WEAK_TO_STRONG.index)


def _known(code: int) -> int:
    if code < 0:
        return MachineFault.exit_code
    return code if code in FROM_WEAK_TO_STRONG else 1


def task_code(code: int) -> int:
    """The exit code with which an agent tells srun that of its ranks."""
    return FIRST_TASK_CODE + FROM_WEAK_TO_STRONG.index(_known(code))


def of_task_code(code: int) -> int | None:
    """The exit code of the ranks; None if srun failed itself."""
    place = code - FIRST_TASK_CODE
    return FROM_WEAK_TO_STRONG[place] if 0 <= place < len(FROM_WEAK_TO_STRONG) else 0 if code == 0 else None


def describe(failed: Mapping[int, int], run_dir: Path) -> str:
    """Which ranks of this node failed and how, those that caused it first.

    Args:
        failed: exit codes by rank.
    """
    host = socket.gethostname()
    lost = [rank for rank, code in failed.items() if code == MachineFault.exit_code]
    said = [f"rank {rank} on {host}: {_how(code)}" for rank, code in failed.items() if rank not in lost]
    if lost:
        ranks = f"rank{'s' if len(lost) > 1 else ''} {', '.join(map(str, lost))} on {host}"
        said.append(f"{ranks}: {_last_line(lost_file(run_dir, lost[0]))} (more in {run_dir / LOST})")
    return "; ".join(said)


def _how(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    hint = " (out of memory?)" if -code == signal.SIGKILL else ""
    return f"killed by signal {-code}{hint}"


def _last_line(path: Path) -> str:
    """Of a traceback: the error itself."""
    lines = path.read_text(errors="replace").split("\n") if path.exists() else []
    errors = [line for line in lines if line and not line.startswith(" ")]
    return f"lost the others or its device: {errors[-1][:200]}" if errors else "lost the others or its device"
