#!/usr/bin/env bash
# Trains on NPROC processes of each machine by DeepSpeed's own launcher, with either engine, after checking configuration
# and data in one process.
# Run: bash launch/deepspeed.sh NPROC CONFIG.yaml [key.sub=value ...]
#   HOSTFILE=FILE         the machines, a line each: "a slots=8"; without it this machine alone
#   DEEPSPEED_ARGS="..."  more arguments for the launcher, as --launcher openmpi or --no_ssh --node_rank 1 --master_addr a
# Exits with the job's own code (0 done, 2 bad input, 75 stopped by a signal after saving), which the launcher changes.
set -euo pipefail

refuse() { echo "deepspeed.sh: $1" >&2 && exit 2; }

[[ $# -ge 2 && $1 =~ ^[1-9][0-9]*$ ]] ||
    refuse "must be: launch/deepspeed.sh NPROC CONFIG.yaml [key.sub=value ...], NPROC a whole number >= 1"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python
[[ -x $python ]] || python=$(command -v python3) ||
    refuse "neither $root/.venv/bin/python nor python3 is there; bash launch/setup.sh makes the former"
"$python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("deepspeed") is None)' ||
    refuse "deepspeed is missing in $python; must be installed: pip install -e .[deepspeed]"

machines=1
if [[ -n ${HOSTFILE-} ]]; then
    [[ -r $HOSTFILE ]] || refuse "HOSTFILE is $HOSTFILE: must be a file that can be read"
    machines=$(grep -cE '^[[:space:]]*[^#[:space:]]+[[:space:]]+slots=[0-9]+' "$HOSTFILE") ||
        refuse "HOSTFILE is $HOSTFILE: must have a line 'name slots=N' for each machine"
fi

RANKS_PER_NODE=$1
# shellcheck source=launch/environment.sh
source "$root/launch/environment.sh"
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
# The launcher passes little to other machines by itself; it reads a file for the rest. That one has no name any more and
# goes with the processes that have it open.
file=$(mktemp)
exec {open}<"$file"
[[ ! -f .deepspeed_env ]] || cat .deepspeed_env >"$file"
for name in "${ENVIRONMENT_NAMES[@]}"; do echo "$name=${!name}" >>"$file"; done
rm "$file"
export DS_ENV_FILE=/dev/fd/$open

# The launcher ignores CUDA_VISIBLE_DEVICES beside --num_gpus, and would take the machine's first GPUs.
devices=(--num_gpus "$1")
if [[ -z ${HOSTFILE-} && -n ${CUDA_VISIBLE_DEVICES-} ]]; then
    IFS=, read -ra visible <<<"$CUDA_VISIBLE_DEVICES"
    [[ $CUDA_VISIBLE_DEVICES =~ ^[0-9]+(,[0-9]+)*$ && ${#visible[@]} -ge $1 ]] ||
        refuse "CUDA_VISIBLE_DEVICES is $CUDA_VISIBLE_DEVICES: must be the numbers of at least $1 devices, as 0,1"
    devices=(--include "localhost:$(IFS=, && echo "${visible[*]:0:$1}")")
fi
# A file that is not there is no list of machines; by default the launcher would read /job/hostfile.
launcher=("$python" -m deepspeed.launcher.runner --hostfile "${HOSTFILE:-/nonexistent}" "${devices[@]}" --quiet)
read -ra extra <<<"${DEEPSPEED_ARGS-}"
exec "$python" -m megalign.runtime.checked_job --ranks "$(($1 * machines))" "${@:2}" -- \
    "${launcher[@]}" "${extra[@]}" --module megalign.runtime.rank_keeper
