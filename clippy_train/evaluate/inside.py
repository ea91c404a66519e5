"""Run one sample inside the sandbox. `sandbox` passes this source to an interpreter, so it imports no package module.

Standard input is one JSON object: `program` (the prompt and its completion), `test`, `entry_point`, `token` and
`resources`. Standard output receives the token, and nothing else, if the checks pass, or otherwise the reason.
"""

import ctypes
import json
import os
import resource
import struct
import sys
from pathlib import Path
from typing import Any

PR_SET_NO_NEW_PRIVS = 38
LANDLOCK_CREATE, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT = 444, 445, 446  # system calls, equal on all architectures
LANDLOCK_PATH_BENEATH = 1
# File access rights of Landlock's first version; the remaining bits of ALL remove and create files.
EXECUTE, WRITE_FILE, READ_FILE, READ_FOLDER = 1, 2, 4, 8
READ = EXECUTE | READ_FILE | READ_FOLDER
ALL = (1 << 13) - 1
SYSTEM = ("/usr", "/bin", "/lib", "/lib64", "/proc", "/dev/urandom")


def main() -> None:
    job = json.load(sys.stdin)
    token, channel, write, leave = job.pop("token").encode(), os.dup(1), os.write, os._exit
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)
    restrict_process(job["resources"])
    try:
        run_sample(job["program"], job["test"], job["entry_point"])
    except BaseException as error:
        write(channel, f"failed: {type(error).__name__}: {error}"[:500].encode(errors="replace"))
        leave(1)
    write(channel, token)
    leave(0)


def restrict_process(resources: dict[str, int]) -> None:
    """Limit resources, and restrict files to the sample's folder, the interpreter and the system."""
    for name, value in resources.items():
        number = getattr(resource, name)
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (value, value))
    confine_files()


def confine_files() -> None:
    """Allow writing only in the current folder, and reading only there, in the interpreter and in the system.

    Needs a kernel with Landlock; without it nothing is restricted. Children inherit the rules.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    rights = struct.pack("=Q", ALL)
    ruleset = libc.syscall(LANDLOCK_CREATE, rights, len(rights), 0)
    if ruleset < 0:
        return
    readable = {path: READ for path in (sys.prefix, sys.base_prefix, *SYSTEM) if Path(path).exists()}
    for path, allowed in {**readable, os.devnull: READ_FILE | WRITE_FILE, ".": ALL}.items():
        root = os.open(path, os.O_PATH)
        libc.syscall(LANDLOCK_ADD_RULE, ruleset, LANDLOCK_PATH_BENEATH, struct.pack("=Qi", allowed, root), 0)
        os.close(root)
    libc.syscall(LANDLOCK_RESTRICT, ruleset, 0)
    os.close(ruleset)


def run_sample(program: str, test: str, entry_point: str) -> None:
    """Run a program and its checks. Each is compiled on its own, so the program cannot comment out the checks."""
    namespace: dict[str, Any] = {"__name__": "__sample__"}
    compiled = [compile(source, name, "exec") for source, name in ((program, "<sample>"), (test, "<test>"))]
    for code in compiled:
        exec(code, namespace)
    namespace["check"](namespace[entry_point])


if __name__ == "__main__":
    main()
