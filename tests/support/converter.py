"""DeepSpeed's converter in the calling process, which has imported it; a new process spends two seconds on that."""

import io
import runpy
import subprocess
import sys
import traceback
import warnings
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch


def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
    """What `subprocess.run(command, capture_output=True, text=True)` does with `python -m MODULE`; ignores `env`."""
    assert command[:2] == [sys.executable, "-m"]
    code: str | int | None = 0
    out, err = io.StringIO(), io.StringIO()
    with patch.object(sys, "argv", command[2:]), redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # runpy's: the module is imported already
        try:
            runpy.run_module(command[2], run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code
        except Exception:
            code = traceback.format_exc()
    if isinstance(code, str):
        err.write(code)
    return subprocess.CompletedProcess(command, bool(code), out.getvalue(), err.getvalue())


SUBPROCESS = SimpleNamespace(run=run)  # in place of `subprocess` in `run.consolidate`
