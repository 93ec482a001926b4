#!/usr/bin/env bash
# The paper's experiments on SmolLM2 within a budget of minutes on one GPU: docs/gpu-protocol.md.
#
# What:      the packages and the conversion; the time of a step; then recipes/real_model.py --experiments in the order
#            of what matters most: every arm with seed 0, 1, 2 at beta 0.3, then at 0.1, then stale samples with weights
#            and without. A wave that would end too late isn't started, and what is done is in runs.jsonl.
# Hardware:  one NVIDIA GPU with 80 GB or more (eight runs at a time; --jobs 4 for less), and a complete .venv
# How long:  as many minutes as the first argument says
# Launch:    recipes/real_model_gpu.sh 15 [options of recipes/real_model.py; OUT=runs/gpu is where it writes]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
minutes=${1:?usage: recipes/real_model_gpu.sh MINUTES [options of recipes/real_model.py]}
shift
out=${OUT:-runs/gpu}
left() { echo $((minutes - (SECONDS + 59) / 60)); }

[[ " $* " == *" --dataset "* ]] || make --no-print-directory .cache/real-model/.installed
export PATH="$PWD/.venv/bin:$PATH" PYTHONPATH="$PWD/.cache/real-model${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$out"
experiments() {  # folder, then options
  local folder=$1
  shift
  python recipes/real_model.py --experiments true --use_vllm false --hack 2 --max_completion_length 16 \
    --resume true "$@" --output_dir "$out/$folder" 2>&1 | tee "$out/$folder.txt"
}

experiments timing --arms "k2 as loss" --seeds 0 "$@" --max_steps 5 --eval_examples 8
echo "$(left) of $minutes minutes are left for the arms"
experiments arms --arms "no KL" "k1 as loss" "k2 as loss" "k3 as loss" "reverse KL" "TRL's own" "exact in reward" \
  --betas 0.3 0.1 --seeds 0 1 2 --minutes "$(left)" "$@"
echo "$(left) of $minutes minutes are left for stale samples"
if (($(left) > 0)); then
  experiments stale --arms "k2, stale, weights" "k2, stale, none" --betas 0.3 --seeds 0 1 2 --minutes "$(left)" "$@"
fi
echo "$out: {timing,arms,stale}/runs.jsonl, a row for each run; gradients.json; the tables as {timing,arms,stale}.txt"
