#!/usr/bin/env bash
# The whole story on a generated toy set, on a CPU, without a download: random selection, DM, static memory alone, static-dynamic DM; then
# experts, MTT and static-dynamic MTT.
# Usage: bash sh/quickstart.sh [GPU]
# Six minutes on two cores with bf16 in hardware; 36 on two without, measured before MTT kept graphs. It goes on where it stopped; what is finished is not computed again.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
gpu=${1:-cpu}
install
export WANDB_MODE=${WANDB_MODE:-disabled}
results=$root/results/quickstart

ipc=3
flags=(
  --save_path "$results"
  --num_eval 3              # networks of an evaluation
  --epoch_eval_train 60
  --lr_net 0.005            # 0.01, the protocol's, diverges on so few videos
  --eval_it 1000            # only at the end
)
all=(--batch_real 24)       # clips of a class
start=(--spc $ipc --dpc $ipc --init_dynamic residual --init_hal identity)
few=(--syn_steps 5 --batch_syn 8 --max_start_epoch 4 --lr_lr 1e-6)
module distill_utils.toy

printf '\n== random selection: %s real videos per class\n' $ipc
bash "$root/sh/baseline/DM.sh" "$gpu" toy 300 $ipc "${flags[@]}" "${all[@]}" --Iteration 0
printf '\n== DM: their pixels learned by distribution matching\n'
bash "$root/sh/baseline/DM.sh" "$gpu" toy 300 $ipc "${flags[@]}" "${all[@]}" --Iteration 30
printf '\n== static memory alone: still frames learned by gradient matching\n'
bash "$root/sh/s2d/DC.sh" "$gpu" toy $ipc "${flags[@]}" "${all[@]}" --Iteration 10 --outer_loop 1 --inner_loop 1
printf '\n== static-dynamic DM: the still frames, moved by a dynamic memory and a hallucinator\n'
bash "$root/sh/s2d/DM.sh" "$gpu" toy 3 $ipc "${flags[@]}" "${all[@]}" "${start[@]}" --Iteration 30 --lr_hal 1e-5
printf '\n== experts: networks trained on the real clips, a snapshot per epoch\n'
bash "$root/sh/baseline/buffer.sh" "$gpu" toy --save_path "$results" --num_experts 3 --train_epochs 4 --batch_train 16
printf '\n== MTT: pixels learned by trajectory matching\n'
bash "$root/sh/baseline/MTT.sh" "$gpu" toy 3000 $ipc "${flags[@]}" "${few[@]}" --Iteration 20
printf '\n== static-dynamic MTT\n'
bash "$root/sh/s2d/MTT.sh" "$gpu" toy 500 $ipc "${flags[@]}" "${few[@]}" "${start[@]}" --Iteration 20 --lr_hal 1e-5

printf '\n== results\n'
module distill_utils.table "$results"
