"""Programs in other languages are run by their interpreters, confined like those in Python."""

import shutil
from pathlib import Path

import pytest

from clippy_train.evaluate.inside import PASSED
from clippy_train.evaluate.interpreters import INTERPRETERS, as_python, installed, runnable_languages
from clippy_train.evaluate.sandbox import Limits, run_checked
from clippy_train.shards.problems import Problem

pytestmark = pytest.mark.processes
LIMITS = Limits(seconds=20, memory_bytes=1 << 30)

# Of MultiPL-E: a prompt, tests, a right completion, a wrong one, and one that ends the program before its tests.
PROGRAMS = {
    "JavaScript": (
        "function double(x){\n",
        "const assert = require('node:assert');\n\nfunction test() {\n  let candidate = double;\n"
        "  assert.deepEqual(candidate(2),4);\n}\n\ntest();",
        "    process.stdout.write('no end of line');\n    return 2 * x;\n}\n",
        "    return x;\n}\n",
        "    process.exit(0);\n}\n",
    ),
    "Perl": (
        "sub double {\n    my($x) = @_;\n",
        "sub testhumaneval {\n    my $candidate = \\&double;\n    if ($candidate->(2) == 4) { print 'ok!' } "
        "else { exit 1; }\n}\n\ntesthumaneval();",
        "    return 2 * $x;\n}\n",
        "    return $x;\n}\n",
        "    exit 0;\n}\n",
    ),
    "Shell": (
        "#!/bin/bash\ndouble() {\n",
        "candidate() {\n    double \"$@\"\n}\n\nset -e\nrun_test() {\n    [[ $(candidate 2) = 4 ]]\n}\n\nrun_test",
        "    echo $((2 * $1))\n}\n",
        "    echo $1\n}\n",
        "    echo 4\n}\nexit 0\n",
    ),
}  # fmt: skip


def outcome(language: str, completion: str) -> str:
    prompt, tests, *_ = PROGRAMS[language]
    problem = Problem("double", prompt, tests, "check", "", language, ())
    return run_checked(*as_python(problem, prompt + completion), LIMITS)


def test_every_language_is_tried() -> None:
    assert PROGRAMS.keys() == INTERPRETERS.keys()
    assert runnable_languages()[0] == "Python"


@pytest.mark.parametrize("language", PROGRAMS)
def test_only_a_program_that_reaches_the_end_of_its_tests_passes(language: str) -> None:
    if language not in runnable_languages():
        pytest.skip(f"{INTERPRETERS[language].program} is not installed")
    _, _, right, wrong, ends_early = PROGRAMS[language]
    assert outcome(language, right) == PASSED
    assert outcome(language, wrong).startswith("failed: AssertionError: status 1")
    assert outcome(language, ends_early).startswith("failed: AssertionError: status 0")


def test_limits_hold_for_the_interpreter() -> None:
    prompt, tests, *_ = PROGRAMS["Shell"]
    problem = Problem("double", prompt, tests, "check", "", "Shell", ())
    program = as_python(problem, prompt + "    while true; do :; done\n}\n")
    assert run_checked(*program, Limits(seconds=1, memory_bytes=1 << 30)) == "timed out"


def test_a_language_without_its_interpreter_cannot_be_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, path: None)
    assert runnable_languages() == ["Python"]


def test_an_interpreter_that_samples_do_not_see_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one of a version manager in the user's folder, also behind a link in the system's."""
    system, own = tmp_path / "system", tmp_path / "own"
    for folder in (system, own):
        folder.mkdir()
    (own / "node").write_text("#!/bin/sh\n")
    (own / "node").chmod(0o755)
    monkeypatch.setenv("PATH", f"{own}:/usr/bin:/bin")
    assert installed("bash") in ("/usr/bin/bash", "/bin/bash")
    assert installed("node") != str(own / "node")
    (system / "node").symlink_to(own / "node")
    monkeypatch.setattr("clippy_train.evaluate.interpreters.PLACES", str(system))
    assert installed("node") is None
