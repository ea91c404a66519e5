# Settings of the libraries in a job, sourced by the scripts beside this file. Values that are already set in the
# environment of `sbatch` win: NCCL_DEBUG=INFO sbatch launch/train.sbatch ...

# The network interface between nodes, if they have several: on the wrong one training hangs or is slow. `ip -br addr`
# lists them; NCCL accepts a prefix. The preflight prints the resulting bandwidth.
#export NCCL_SOCKET_IFNAME=ib0
#export GLOO_SOCKET_IFNAME=ib0

# WARN reports why NCCL failed; INFO also which network it took, and is long.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# A rank that fails aborts its peers' collectives, instead of leaving them to the watchdog.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"

# NCCL's flight recorder: when a collective fails or times out, each rank writes its last ones, with their stacks, to a
# file of this name and its rank. `torchfrtrace --prefix PREFIX FOLDER` says which rank did not join which collective.
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"
export TORCH_FR_DUMP_TEMP_FILE="${TORCH_FR_DUMP_TEMP_FILE:-$PWD/nccl-${SLURM_JOB_ID:-0}-rank-}"

# Expandable segments reduce fragmentation when batch shapes change (validation after training).
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"

# Loader processes tokenise in one thread each. On CPU the launcher gives each rank its share of the cores.
[ -z "${SLURM_GPUS_ON_NODE:-}" ] || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"

# For nodes without internet access: nothing waits for the hub. Without it, models can be loaded by name.
#export HF_HUB_OFFLINE=1
