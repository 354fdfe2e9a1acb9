#!/usr/bin/env bash
# MTT: trajectory matching on pixels, a baseline. Run sh/baseline/buffer.sh first: it makes the experts.
# Usage: bash sh/baseline/MTT.sh GPU DATASET LR IPC [any flag of distill_MTT.py]
# LR is the learning rate of the pixels, 1e5 in the paper.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
positionals 4 "$@"
gpu=$1 dataset=$2 lr=$3 ipc=$4
shift 4

flags=(
  --dataset "$dataset"
  --ipc "$ipc"              # synthetic videos per class
  --lr_img "$lr"            # learning rate of the pixels
  --Iteration 8000
  --eval_it 500             # iterations between evaluations
  --syn_steps 10            # student steps
  --expert_epochs 1         # expert epochs that the student's steps must match
  --max_start_epoch 10      # the student starts at an epoch below this
  --lr_teacher 0.01         # initial step size of the student
  --train_lr                # learn the step size
  --lr_lr 1e-5              # learning rate of the step size; evaluation uses the learned step size
  --init real
  --num_eval 3              # networks per evaluation
  --epoch_eval_train 500
)
launch "$gpu" distill_MTT.py "${flags[@]}" "$@"
