"""The process of a rank. Started by `launch.agent`, or what a process of torchrun's becomes:

    python -m clippy_train.train RUN_DIR

Importing what `train.rank` needs creates half a million objects that stay alive. The garbage collector would spend a
second on them during the imports, and a quarter of one in each collection later (DeepSpeed asks for five while it
starts). So it is off during the imports, and never looks at what they created; the run's own objects are collected as
usual.
"""

import gc
import os
import sys


def main(run_dir: str) -> int:
    gc.disable()
    from clippy_train.train.rank import main as run

    gc.freeze()
    gc.enable()
    return run(run_dir)


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # no interpreter shutdown: a dead peer must not keep this rank waiting in a destructor
