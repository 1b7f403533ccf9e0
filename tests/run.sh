#!/usr/bin/env bash
# Sets .venv up if need be and runs the tests; arguments go to pytest.
# Run: bash tests/run.sh [pytest arguments]      (-n 2: two tests at a time, where two cores have nothing else to do)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
# Tests that share an expensive fixture go to one worker.
[[ " $*" != *" -n"* ]] || set -- --dist loadgroup "$@"
# Only tests that ask for a GPU see one (-m gpu): the others start more ranks than a machine may have GPUs.
[[ " $* " == *" gpu "* || " $* " == *"tests/gpu"* ]] || export CUDA_VISIBLE_DEVICES=
# One thread a process: the distributed tests start several.
OMP_NUM_THREADS=1 exec .venv/bin/python -m pytest "$@"
