"""Read a checkpoint's files without running code from them: tensors and plain values, nothing else.

torch's files are pickles, and a pickle may call any function. torch's weights-only reader calls none but those of a
fixed list; DeepSpeed's and Lightning's loaders switch it off. `plain_loads` switches it on for whoever calls
`torch.load` in a process. `python -m clippy_train.run.plain MODULE [ARGUMENT...]` runs a library's program so.
Imports torch only when it is called.
"""

import re
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from pkgutil import resolve_name
from typing import Any

from clippy_train.errors import CheckpointError

# What DeepSpeed's files hold besides tensors and plain values. They are records: building one runs no other code.
DEEPSPEED_TYPES = (
    "deepspeed.runtime.fp16.loss_scaler:LossScaler",
    "deepspeed.runtime.zero.config:ZeroStageEnum",
    "deepspeed.utils.tensor_fragment:fragment_address",
)


def load_plain(file: Any, map_location: Any = "cpu", **options: Any) -> Any:
    """`torch.load`, with its options, of tensors and plain values.

    In host memory, unless the caller says otherwise: a node without GPUs can read what a GPU wrote.

    Raises:
        CheckpointError: the file asks for anything else, or a name in it is a path: DeepSpeed's converter names
            folders after parameters.
    """
    from torch.serialization import load

    try:
        content = load(file, map_location=map_location, **{**options, "weights_only": True})
    except (EOFError, RuntimeError, UnpicklingError) as error:
        forbidden = re.search(r"GLOBAL (\S+)", str(error))
        found = forbidden[1] if forbidden else "its content"
        raise _refused(file, f"{found} is neither a tensor nor a plain value") from error
    paths = [name for name in _names(content) if "/" in name]
    if paths:
        raise _refused(file, f"the name {paths[0]!r} is a path")
    return content


def _refused(file: Any, reason: str) -> CheckpointError:
    path = file if isinstance(file, str | Path) else getattr(file, "name", file)  # Lightning opens it itself
    return CheckpointError(f"{path} is refused, nothing of it has been run: {reason}")


def _names(content: Any) -> Iterator[str]:
    """The keys of nested dictionaries and lists."""
    if isinstance(content, dict):
        yield from (key for key in content if isinstance(key, str))
    inside = content.values() if isinstance(content, dict) else content if isinstance(content, list | tuple) else ()
    for each in inside:
        yield from _names(each)


@contextmanager
def plain_loads() -> Iterator[None]:
    """Have every `torch.load` in this process be `load_plain`, which then also reads DeepSpeed's types."""
    import torch

    before = torch.load
    torch.load = load_plain  # type: ignore[assignment]  # it takes what these libraries give
    try:
        with torch.serialization.safe_globals([resolve_name(name) for name in DEEPSPEED_TYPES]):
            yield
    finally:
        torch.load = before


def main(module: str) -> None:
    try:
        with plain_loads():
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except CheckpointError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(sys.argv.pop(1))
