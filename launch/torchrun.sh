#!/bin/bash
# Train on several nodes without Slurm. Run the same command on every node; ranks connect to the first one, MASTER:
#
#   NODES=2 DEVICES=8 MASTER=node1:29400 launch/torchrun.sh experiment=NAME data.path=DIR [KEY=VALUE...]
#
# DEVICES is the number of ranks on each node. All nodes must share the folder that contains run.root, the corpus and the
# environment. TERM, INT, USR1 and USR2 save and end the run; the same command continues it. torchrun's exit code is not
# that of the ranks: callers must look at the run itself (clippy checkpoint ls run=runs/NAME).

set -eu
: "${NODES:?how many nodes}" "${DEVICES:?ranks on each node}" "${MASTER:?HOST:PORT of the first node}"
. "$(clippy --launch-dir)/env.sh"
exec torchrun --nnodes="$NODES" --nproc-per-node="$DEVICES" --rdzv-backend=c10d --rdzv-endpoint="$MASTER" \
    --signals-to-handle=SIGTERM,SIGINT,SIGUSR1,SIGUSR2 --shutdown-timeout=300 -m clippy_train.cli train "$@"
