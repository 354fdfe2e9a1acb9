#!/usr/bin/env bash
# Stage 2 of static-dynamic disentanglement with MTT: it needs the static memory of sh/s2d/DC.sh and the experts of sh/baseline/buffer.sh.
# Usage: bash sh/s2d/MTT.sh GPU DATASET LR IPC [any flag of distill_s2d.py]
# LR is that of the dynamic memory, 1e4 in the paper.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
positionals 4 "$@"
gpu=$1 dataset=$2 lr=$3 ipc=$4
shift 4

case $ipc in [1-4]) steps=10 every=400 ;; *) steps=5 every=200 ;; esac  # the paper's for IPC 1 and 5
flags=(
  --method MTT
  --dataset "$dataset"
  --ipc "$ipc"              # synthetic videos per class
  --lr_dynamic "$lr"
  --lr_hal 1e-3             # of the hallucinator
  --Iteration 10000
  --eval_it $every          # iterations between evaluations
  --syn_steps $steps        # steps of the student
  --expert_epochs 1         # epochs of the expert that they are to match
  --max_start_epoch 10      # the student starts at one of the epochs below
  --lr_teacher 0.01         # the student's step size at the start
  --train_lr                # learn it,
  --lr_lr 1e-5              # at this learning rate; networks are evaluated with what it has become
  --num_eval 3              # networks of an evaluation
  --epoch_eval_train 500
)
launch "$gpu" distill_s2d.py "${flags[@]}" "$@"
