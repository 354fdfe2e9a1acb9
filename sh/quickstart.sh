#!/usr/bin/env bash
# The whole story on a generated toy set, on a CPU, without a download: random selection, DM, static memory alone, static-dynamic DM.
# Usage: bash sh/quickstart.sh [GPU]
# About five minutes on two cores after installation. It goes on where it stopped; what is finished is not computed again.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
gpu=${1:-cpu}
install
export WANDB_MODE=${WANDB_MODE:-disabled} PYTHONPATH=$root
results=$root/results/quickstart

ipc=3
flags=(
  --save_path "$results"
  --num_eval 3              # networks of an evaluation
  --epoch_eval_train 60
  --lr_net 0.005            # 0.01, the protocol's, diverges on so few videos
  --batch_real 24           # all clips of a class
  --eval_it 1000            # only at the end
  --precision bf16
)
"$(find_python)" -m distill_utils.toy

printf '\n== random selection: %s real videos per class\n' $ipc
bash "$root/sh/baseline/DM.sh" "$gpu" toy 300 $ipc "${flags[@]}" --Iteration 0
printf '\n== DM: their pixels learned by distribution matching\n'
bash "$root/sh/baseline/DM.sh" "$gpu" toy 300 $ipc "${flags[@]}" --Iteration 30
printf '\n== static memory alone: still frames learned by gradient matching\n'
bash "$root/sh/s2d/DC.sh" "$gpu" toy $ipc "${flags[@]}" --Iteration 10 --outer_loop 1 --inner_loop 1
printf '\n== static-dynamic DM: the still frames, moved by a dynamic memory and a hallucinator\n'
bash "$root/sh/s2d/DM.sh" "$gpu" toy 3 $ipc "${flags[@]}" --Iteration 30 \
  --spc $ipc --dpc $ipc --lr_hal 1e-5 --init_dynamic residual --init_hal identity

printf '\n== results\n'
"$(find_python)" -m distill_utils.table "$results"
