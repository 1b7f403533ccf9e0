#!/usr/bin/env bash
# Trains on NPROC processes of this machine, after checking configuration and data in one plain process.
# Run: bash launch/torchrun.sh NPROC CONFIG.yaml [key.sub=value ...]
# Exits with the job's own code (0 done, 2 bad input, 75 stopped by a signal after saving), which torchrun alone loses.
set -euo pipefail

if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: launch/torchrun.sh NPROC CONFIG.yaml [key.sub=value ...], NPROC a whole number >= 1" >&2
    exit 2
fi
ranks=$1
shift
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python
[[ -x $python ]] || python=$(command -v python3) || {
    echo "launch: neither $root/.venv/bin/python nor python3 is there; bash launch/setup.sh makes the former" >&2
    exit 1
}
# torchrun would set one thread and say so at length; the cores are shared out instead.
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
# Where the processes write the job's code: not the run directory, which may hold another run's, and not a pipe, into
# which a reward's module may print.
handover=$(mktemp -d)
trap 'rm -rf "$handover"' EXIT
export MEGALIGN_RESULT_FILE=$handover/code

result() { # the code that was handed over; else the process's own, which must be a failure
    if [[ -s $MEGALIGN_RESULT_FILE ]]; then
        code=$(<"$MEGALIGN_RESULT_FILE")
    else
        local ended="exit code $code"
        [[ $code -le 128 ]] || ended="signal $((code - 128))"
        echo "launch: $1 ended early, by $ended; a module that the job loads may have done it" >&2
        [[ $code -ne 0 ]] || code=1
    fi
}

code=0
"$python" -m megalign.preflight --ranks "$ranks" "$@" >&2 || code=$?
result "the checks"
[[ $code -eq 0 ]] || exit "$code"
rm "$MEGALIGN_RESULT_FILE"

# In the background, so that a signal reaches torchrun at once and its exit code is still waited for.
"$python" -m torch.distributed.run --standalone --nproc-per-node "$ranks" --max-restarts 0 \
    -m megalign train "$@" &
job=$!
# To the ranks, not to torchrun, which would kill them 30 s later, maybe in the middle of saving.
ranks_of='import psutil, sys; [p.terminate() for p in psutil.Process(int(sys.argv[1])).children()]'
trap 'signalled=yes; "$python" -c "$ranks_of" "$job" 2>/dev/null || kill -TERM "$job" 2>/dev/null || true' TERM INT
signalled=yes
while [[ -n $signalled ]]; do # a trapped signal ends `wait` early, with a code that is not the job's
    signalled=
    code=0
    wait "$job" || code=$?
done
result "the ranks"
exit "$code"
