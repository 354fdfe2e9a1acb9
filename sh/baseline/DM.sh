#!/usr/bin/env bash
# DM: distribution matching on pixels, a baseline. With --Iteration 0 the result is a random selection of real clips.
# Usage: bash sh/baseline/DM.sh GPU DATASET LR IPC [any flag of distill_DM.py]
# LR is the learning rate of the pixels. Published for miniUCF101 with LR 30: 15.3 % (IPC 1), 25.7 % (IPC 5).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
positionals 4 "$@"
gpu=$1 dataset=$2 lr=$3 ipc=$4
shift 4

flags=(
  --dataset "$dataset"
  --ipc "$ipc"              # synthetic videos per class
  --lr_img "$lr"            # learning rate of the pixels
  --Iteration 5000
  --eval_it 500             # iterations between evaluations
  --batch_real 64           # real clips per class and iteration
  --init real
  --num_eval 3              # networks per evaluation
  --epoch_eval_train 500
)
launch "$gpu" distill_DM.py "${flags[@]}" "$@"
