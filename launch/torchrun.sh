#!/usr/bin/env bash
# Trains on NPROC processes of this machine, after checking configuration and data in one plain process.
# Run: bash launch/torchrun.sh NPROC CONFIG.yaml [key.sub=value ...]       as `megalign launch` where it is installed
# Exits with the job's own code (0 done, 2 bad input, 75 stopped by a signal after saving), which torchrun alone loses.
#
# On several machines, the same command on each of them, with
#     NNODES=2 NODE_RANK=0 MASTER_ADDR=host-of-node-0 [MASTER_PORT=29500]        NODE_RANK=1 on the second, and so on
# or, where nobody numbers them,
#     NNODES=2 RDZV_ENDPOINT=host-of-one-of-them:29400
# MAX_RESTARTS=3 starts the job again, from its last checkpoint, when a rank dies; docs/clusters.md has all variables.
set -euo pipefail

if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: launch/torchrun.sh NPROC CONFIG.yaml [key.sub=value ...], NPROC a whole number >= 1" >&2
    exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# The environment that launch/setup.sh makes; a cluster's own Python where that was not run.
python=$root/.venv/bin/python
[[ -x $python ]] || python=$(command -v python3) || {
    echo "launch: neither $root/.venv/bin/python nor python3 is there; bash launch/setup.sh makes the former" >&2
    exit 1
}
RANKS_PER_NODE=$1
# shellcheck source=launch/environment.sh
source "$root/launch/environment.sh"
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
# exec: a signal to this script reaches the launcher, which passes it on to the ranks.
exec "$python" -m megalign launch "$@"
