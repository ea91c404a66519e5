# Settings of the libraries under a job, sourced by the scripts beside it. What is already set in the environment of
# `sbatch` wins: NCCL_DEBUG=INFO sbatch launch/train.sbatch ...

# The interface through which nodes reach each other, where they have several: training hangs, or crawls, on the wrong
# one. `ip -br addr` lists them; a prefix will do for NCCL. The preflight prints the bandwidth that comes out.
#export NCCL_SOCKET_IFNAME=ib0
#export GLOO_SOCKET_IFNAME=ib0

# Says which network NCCL took, and why it failed; INFO is long.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# A rank that fails takes its peers out of a collective, instead of leaving them there until the watchdog.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"

# Memory that grows in segments breaks up less under batches of changing shapes (validation after training).
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"

# A rank's loader processes tokenise, each in one thread. On CPU a rank gets its share of the cores by itself.
[ -z "${SLURM_GPUS_ON_NODE:-}" ] || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"

# Nodes of a cluster often have no way out; with this nothing waits for the hub. Leave it out to load models by name.
#export HF_HUB_OFFLINE=1
