#!/usr/bin/env bash
# Stage 2 of static-dynamic disentanglement with MTT: learn the dynamic memory and the hallucinator.
# Run first: sh/s2d/DC.sh with SPC = 2 · IPC, which makes the static memory, and sh/baseline/buffer.sh, which makes the
# experts.
# Usage: bash sh/s2d/MTT.sh GPU DATASET LR IPC [any flag of distill_s2d.py]
# LR is the learning rate of the dynamic memory, 1e4 in the paper.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
positionals 4 "$@"
gpu=$1 dataset=$2 lr=$3 ipc=$4
shift 4

case $ipc in [1-4]) steps=10 every=400 ;; *) steps=5 every=200 ;; esac  # the paper's values for IPC 1 and 5
flags=(
  --method MTT
  --dataset "$dataset"
  --ipc "$ipc"              # synthetic videos per class
  --lr_dynamic "$lr"
  --lr_hal 1e-3             # learning rate of the hallucinator
  --Iteration 10000
  --eval_it $every          # iterations between evaluations
  --syn_steps $steps        # student steps
  --expert_epochs 1         # expert epochs that the student's steps must match
  --max_start_epoch 10      # the student starts at an epoch below this
  --lr_teacher 0.01         # initial step size of the student
  --train_lr                # learn the step size
  --lr_lr 1e-5              # learning rate of the step size; evaluation uses the learned step size
  --num_eval 3              # networks per evaluation
  --epoch_eval_train 500
)
launch "$gpu" distill_s2d.py "${flags[@]}" "$@"
