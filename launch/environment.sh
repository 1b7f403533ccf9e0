#!/usr/bin/env bash
# Environment of every rank, sourced by the scripts beside it; the reason for each variable stands above its line.
# A value that is set already stays; one that is set but empty leaves the variable unset, for the library's own default:
#     CUDA_DEVICE_MAX_CONNECTIONS= NCCL_DEBUG=INFO bash launch/torchrun.sh 8 job.yaml
# The names that are set stand in ENVIRONMENT_NAMES afterwards, for launchers that pass on only what they are told.
ENVIRONMENT_NAMES=()

default() { # NAME VALUE
    [[ -v $1 ]] || declare -g "$1=$2"
    [[ -n ${!1} ]] || { unset "$1" && return; }
    export "${1?}"
    ENVIRONMENT_NAMES+=("$1")
}

# Megatron overlaps the communication of tensor and sequence parallelism with matrix products only if the GPU starts
# both in the order of their calls, which up to Hopper one hardware queue ensures. Results are the same without it.
# Leave it empty on Blackwell, which keeps the order by itself, and for ZeRO or FSDP, whose gathers want more queues.
default CUDA_DEVICE_MAX_CONNECTIONS 1

# A rank whose collective failed ends, so that the launcher ends or restarts the job; 3 ends it without ncclCommAbort,
# which can hang itself. It is torch's own default, but torchrun would set 1.
default TORCH_NCCL_ASYNC_ERROR_HANDLING 3

# Ends a rank whose NCCL watchdog thread is stuck in a CUDA call. More than watchdog.timeout_s (600 s), so that the
# watchdog reports a job that hangs before.
default TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC 900

# The flight recorder keeps the last collectives of each rank, with sizes and states: it shows which rank a hanging job
# waits for. One layer of a model makes about ten of them; torch's default of 2000 is less than one step of a large one.
default TORCH_FR_BUFFER_SIZE 20000

# Writes what the flight recorder holds when a collective times out, a file a rank, by default where the log says.
default TORCH_NCCL_DUMP_ON_TIMEOUT 1

# NCCL says nothing of why a call failed unless it may warn.
default NCCL_DEBUG WARN

# Sequences of different lengths break the allocator's blocks up until a large one finds no room in free memory;
# segments that can grow do not. The old name, which newer versions of torch warn of, counts where it is set.
default PYTORCH_ALLOC_CONF "${PYTORCH_CUDA_ALLOC_CONF-expandable_segments:True}"

# As many threads as a rank has cores: with more, the ranks of a machine would wait for each other. Slurm knows a
# task's cores; else the machine's are divided by RANKS_PER_NODE, which the script that sources this file sets.
cores=$(nproc)
threads=$((cores / ${RANKS_PER_NODE:-$cores}))
default OMP_NUM_THREADS "${SLURM_CPUS_PER_TASK:-$((threads > 0 ? threads : 1))}"

# Every rank's tokenizer would start a thread for each core of the machine, and warns when a process forks after that.
default TOKENIZERS_PARALLELISM false

# Where a machine has several networks, gloo and NCCL may choose one that the other machines do not see, and wait there.
# NET_INTERFACE names the right one (`ip -br address` lists them); NCCL also finds InfiniBand cards by itself.
default GLOO_SOCKET_IFNAME "${NET_INTERFACE-}"
# NCCL takes a list and prefixes; `=` asks for exactly this one: eth1 would also be eth10.
default NCCL_SOCKET_IFNAME "${NET_INTERFACE:+=$NET_INTERFACE}"

unset -f default
unset cores threads
