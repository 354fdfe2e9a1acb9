#!/usr/bin/env bash
# The whole story on a generated toy set, on a CPU, without a download: random selection, DM, static memory alone, static-dynamic DM.
# Usage: bash sh/quickstart.sh [GPU]
# About five minutes on two cores after installation. It goes on where it stopped; what is finished is not computed again.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
gpu=${1:-cpu}
install
export WANDB_MODE=${WANDB_MODE:-disabled}
results=$root/results/quickstart

flags=(
  --save_path "$results"
  --num_eval 3
  --epoch_eval_train 100
  --lr_net 0.003
  --batch_real 12
  --precision bf16
)
launch "$gpu" distill_utils.toy
bash "$root/sh/baseline/DM.sh" "$gpu" toy 30 1 "${flags[@]}" --Iteration 0
bash "$root/sh/baseline/DM.sh" "$gpu" toy 30 1 "${flags[@]}" --Iteration 100 --eval_it 1000
bash "$root/sh/s2d/DC.sh" "$gpu" toy 2 "${flags[@]}" --Iteration 10 --eval_it 1000
bash "$root/sh/s2d/DM.sh" "$gpu" toy 30 1 "${flags[@]}" --Iteration 100 --eval_it 1000
launch "$gpu" distill_utils.table "$results"
