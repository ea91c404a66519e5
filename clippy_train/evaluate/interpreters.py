"""Programs in languages other than Python, run by their interpreters inside the sandbox.

A program and its tests become one file, whose last statement prints a secret. `run_checked` runs the Python that starts
the interpreter on it, so all protections and limits hold, and whatever ends the program before its tests are through is
a failure. A program that reads its own file can print the secret: docs/evaluate.md.
"""

import os
import secrets
import shutil
from typing import NamedTuple

from clippy_train.evaluate.confine import SYSTEM
from clippy_train.shards.problems import PYTHON, Problem


class Interpreter(NamedTuple):
    program: str
    file: str
    report: str  # a statement that prints its argument, on a line of its own


# Only languages whose tests, in the format of MultiPL-E, run where they stand: not when the program ends (Ruby), and
# without ending it themselves (Lua).
INTERPRETERS = {
    "JavaScript": Interpreter("node", "sample.js", 'console.log("\\n{}");'),
    "Perl": Interpreter("perl", "sample.pl", 'print "\\n{}\\n";'),
    "Shell": Interpreter("bash", "sample.sh", "printf '\\n%s\\n' {}"),
}

PLACES = "/usr/local/bin:/usr/bin:/bin"
SEEN = tuple(f"{path}/" for path in SYSTEM)
ENTRY_POINT = "run"
CHECK = "def check(run):\n    run()\n"
RUN = """\
import subprocess

def run():
    with open({file!r}, "w") as file:
        file.write({source!r})
    ended = subprocess.run([{program!r}, {file!r}], capture_output=True, stdin=subprocess.DEVNULL)
    if ended.stdout.split()[-1:] != [{secret!r}]:
        lines = ended.stderr.decode(errors="replace").split("\\n")
        raise AssertionError(f"status {{ended.returncode}} {{' '.join(filter(None, lines[:3]))}}")
"""


def runnable_languages() -> list[str]:
    """The languages that programs can be run in on this machine."""
    return [PYTHON, *(name for name, each in INTERPRETERS.items() if installed(each.program))]


def installed(program: str) -> str | None:
    """The path of a system's interpreter; None if it, or what it links to, is in a folder that samples do not see."""
    found = shutil.which(program, path=PLACES)
    return found if found and os.path.realpath(found).startswith(SEEN) else None


def as_python(problem: Problem, program: str) -> tuple[str, str, str]:
    """The program, test and entry point that `run_checked` takes for a program in the problem's language."""
    if problem.language == PYTHON:
        return program, problem.test, problem.entry_point
    interpreter, secret = INTERPRETERS[problem.language], secrets.token_hex(16)
    source = f"{program}\n{problem.test}\n{interpreter.report.format(secret)}\n"
    started = installed(interpreter.program)
    code = RUN.format(file=interpreter.file, source=source, program=started, secret=secret.encode())
    return code, CHECK, ENTRY_POINT
