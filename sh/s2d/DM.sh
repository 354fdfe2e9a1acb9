#!/usr/bin/env bash
# Stage 2 of static-dynamic disentanglement with DM: learn the dynamic memory and the hallucinator.
# Run sh/s2d/DC.sh with SPC = 2 · IPC first: it makes the static memory (not with --static real; see compact.sh).
# Usage: bash sh/s2d/DM.sh GPU DATASET LR IPC [any flag of distill_s2d.py]
# LR is the learning rate of the dynamic memory.
# Published for miniUCF101: 17.5 % (IPC 1, LR 1e-4), 27.2 % (IPC 5, LR 1e3).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
positionals 4 "$@"
gpu=$1 dataset=$2 lr=$3 ipc=$4
shift 4

case $ipc in [1-4]) hal=1e-5 ;; *) hal=1e-6 ;; esac  # the paper's values for IPC 1 and 5
flags=(
  --method DM
  --dataset "$dataset"
  --ipc "$ipc"              # synthetic videos per class
  --lr_dynamic "$lr"
  --lr_hal $hal             # learning rate of the hallucinator
  --Iteration 5000
  --eval_it 400             # iterations between evaluations
  --batch_real 64           # real clips per class and iteration
  --num_eval 3              # networks per evaluation
  --epoch_eval_train 500
)
launch "$gpu" distill_s2d.py "${flags[@]}" "$@"
