"""Runs one sample inside the sandbox: started by `sandbox`, imports nothing of this package, needs no file of it.

Standard input is one JSON object: `program` (what was generated, with its prompt), `test`, `entry_point`, `token` and
`resources`. Standard output takes the token and nothing else once the checks are through, or else why they are not.
"""

import ctypes
import json
import os
import resource
import struct
import sys
from pathlib import Path

PR_SET_NO_NEW_PRIVS = 38
LANDLOCK_CREATE, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT = 444, 445, 446  # system calls, the same on all architectures
LANDLOCK_PATH_BENEATH = 1
# Landlock's rights on files, of its first version: to execute, write, read, list, remove and make.
EXECUTE, WRITE_FILE, READ_FILE, READ_FOLDER = 1, 2, 4, 8
READ = EXECUTE | READ_FILE | READ_FOLDER
ALL = (1 << 13) - 1
SYSTEM = ("/usr", "/bin", "/lib", "/lib64", "/proc", "/dev/urandom")


def main() -> None:
    job = json.load(sys.stdin)
    token, channel, write, leave = job.pop("token").encode(), os.dup(1), os.write, os._exit
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    os.close(nothing)
    restrict(job["resources"])
    try:
        run(job["program"], job["test"], job["entry_point"])
    except BaseException as error:
        write(channel, f"failed: {type(error).__name__}: {error}"[:500].encode(errors="replace"))
        leave(1)
    write(channel, token)
    leave(0)


def restrict(resources: dict[str, int]) -> None:
    """Take away what a sample does not need: resources, and files outside of its folder and the interpreter's."""
    for name, value in resources.items():
        number = getattr(resource, name)
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (value, value))
    confine_files()


def confine_files() -> None:
    """Let this process and its children change files in the current folder only, and read those of the interpreter and
    the system besides, where the kernel has Landlock."""
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


def run(program: str, test: str, entry_point: str) -> None:
    """What was generated must be a program by itself, compiled apart from the checks behind it."""
    namespace: dict = {"__name__": "__sample__"}
    compiled = [compile(source, name, "exec") for source, name in ((program, "<sample>"), (test, "<test>"))]
    for code in compiled:
        exec(code, namespace)
    namespace["check"](namespace[entry_point])


if __name__ == "__main__":
    main()
