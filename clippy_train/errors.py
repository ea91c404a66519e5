"""What can go wrong for a user, and the exit code that tells a scheduler what to do about it.

A `ClippyError` carries a message that names the key and the fix; the command line prints it without a traceback.
Any other exception is a bug of ours and exits with 1.
"""


class ClippyError(Exception):
    """A condition that the user (or the scheduler) can act on."""

    exit_code = 1


class ConfigError(ClippyError):
    """A setting is wrong, or settings contradict each other. A retry cannot mend it."""

    exit_code = 2


class DataError(ClippyError):
    """The corpus is missing, empty or unreadable."""

    exit_code = 3


class CheckpointError(ClippyError):
    """No checkpoint can be trusted, or none belongs to this run."""

    exit_code = 4


class Interrupted(ClippyError):
    """Stopped by a signal after saving: run the same command again to continue."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h


class NonFinite(ClippyError):
    """Loss or gradient norm is not a finite number; nothing of it is saved."""

    exit_code = 1


class Diverged(ClippyError):
    """Ranks that must hold the same weights do not; nothing of it is saved."""

    exit_code = 1


class Stuck(ClippyError):
    """A job came back again and again without making a step."""

    exit_code = 1


class MachineFault(ClippyError):
    """A rank was killed, or lost its device or the other ranks: run the same command again to continue."""

    exit_code = 71  # EX_OSERR of sysexits.h


class SandboxFault(ClippyError):
    """A sample could not be judged, for a reason that is not the sample's."""

    exit_code = 1


def first_line(error: BaseException) -> str:
    """The first line of an error's message; libraries often add paragraphs of advice."""
    return str(error).strip().split("\n")[0]
