"""A rank's process. Started by `launch.agent`, or what a process of torchrun's becomes:

    python -m clippy_train.train RUN_DIR [CHECKPOINT [WHOLE]]

Importing what `train.rank` needs makes half a million objects, and they stay. Looking for garbage among them takes a
second in all while they are imported, and a quarter of one for each collection later on (DeepSpeed asks for five while
it starts), so both are left out. What the run makes itself is collected as ever.
"""

import gc
import os
import sys


def main(*arguments: str) -> int:
    gc.disable()
    from clippy_train.train.rank import main as run

    gc.freeze()
    gc.enable()
    return run(*arguments)


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # no interpreter shutdown: a peer that died must not keep this rank waiting in a destructor
