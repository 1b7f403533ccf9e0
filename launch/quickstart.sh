#!/usr/bin/env bash
# Runs everything on one small machine: an untrained Hugging Face checkpoint, SFT, GVPO rounds on two processes that share
# the model (TP=2), EPA and PoFT for comparison, and Hugging Face checkpoints again, judged on held-out problems.
# Run: bash launch/quickstart.sh [key.sub=value ...]      (seven minutes of processor time over two cores; the first run
# also makes .venv). Overrides go to every training job: engine.name=deepspeed runs all of them on the second engine.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/setup.sh
python=.venv/bin/python
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
# On the CPU wherever it runs: its two processes need no GPU, and could not share one.
export CUDA_VISIBLE_DEVICES=

out=runs/quickstart overrides=("$@")
started=$(date +%s)

say() { printf '\n== %s\n' "$*"; }

rm -rf "$out"
say "a small model and its problems"
"$python" launch/quickstart/make.py "$out"

say "SFT: the base, which knows the format and some of the sums"
"$python" -m megalign train configs/quickstart/sft.yaml "${overrides[@]}"

say "GVPO: rounds of sampling, scoring and training, two processes, TP=2"
bash launch/torchrun.sh 2 configs/quickstart/gvpo.yaml "${overrides[@]}"

epa() {
    "$python" -m megalign rollout configs/quickstart/gvpo.yaml run.dir="$out/samples" \
        rollout.rounds=24 rollout.temperature=1.0 "${overrides[@]}" parallel.tensor=1 &&
        "$python" launch/quickstart/keep_solved.py "$out/samples/rollout.jsonl" "$out/data/groups.jsonl" &&
        "$python" -m megalign train configs/quickstart/epa.yaml "${overrides[@]}"
}
noisy() {
    "$python" -m megalign train configs/quickstart/sft_noisy.yaml "${overrides[@]}" &&
        "$python" -m megalign train configs/quickstart/poft.yaml "${overrides[@]}"
}
say "side by side: EPA on samples of the base; SFT on noisy answers, and PoFT on them with the GVPO model as teacher"
epa > >(sed -u 's/^/[epa]   /') 2>&1 &
contrast=$! code=0
noisy > >(sed -u 's/^/[noisy] /') 2>&1 || code=$?
wait "$contrast" || code=$?
[[ $code -eq 0 ]] || exit "$code"

say "held-out accuracy of the exported models"
"$python" launch/quickstart/report.py "$out" --started "$started"
