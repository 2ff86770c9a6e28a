#!/usr/bin/env bash
# The sweeps behind docs/memory_budget.md for one data set: what finetuning gpt2-mini takes and buys in each memory budget,
# and what scoring with the finetuned models does. Stopped, it goes on where it was. Called by sweep_pg19.sh and its like.
#     scripts/sweep.sh pg19-sample runs/sweep-pg19
set -euo pipefail
data=$1 output=$2

sweep() { # task, then methods, windows and budgets
  local folder="$output/$1" resume=()
  [ ! -e "$folder/settings.json" ] || resume=(--resume)
  recur-gpt2 sweep --data "$data" --task "$1" "${@:2}" --finetuned "$output/finetuned" --output-dir "$folder" \
    "${resume[@]}"
}

softmax=(--methods disjoint overlap recurrent recurrent+overlap --windows 64 128 256 512 1024)
longest=(--methods recurrent recurrent+overlap --windows 960) # at 1024 no position is left for memory
linear=(--methods t2r recurrent+t2r --windows 256 1024) # slow to train on a CPU
for methods in softmax longest linear; do
  declare -n chosen=$methods
  sweep train "${chosen[@]}" --budget 192MiB 256MiB 384MiB 512MiB 1GiB
  sweep score "${chosen[@]}" --budget 72MiB 96MiB 128MiB 192MiB
done
