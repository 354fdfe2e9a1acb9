#!/usr/bin/env bash
# MTT: trajectory matching on pixels, the baseline. It needs the experts of sh/baseline/buffer.sh.
# Usage: bash sh/baseline/MTT.sh GPU DATASET LR IPC [any flag of distill_MTT.py]
# LR is that of the pixels, 1e5 in the paper.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
positionals 4 "$@"
gpu=$1 dataset=$2 lr=$3 ipc=$4
shift 4

flags=(
  --dataset "$dataset"
  --ipc "$ipc"              # synthetic videos per class
  --lr_img "$lr"            # of the pixels
  --Iteration 8000
  --eval_it 500             # iterations between evaluations
  --syn_steps 10            # steps of the student
  --expert_epochs 1         # epochs of the expert that they are to match
  --max_start_epoch 10      # the student starts at one of the epochs below
  --lr_teacher 0.01         # the student's step size at the start
  --train_lr                # learn it,
  --lr_lr 1e-5              # at this learning rate; networks are evaluated with what it has become
  --init real
  --num_eval 3              # networks of an evaluation
  --epoch_eval_train 500
)
launch "$gpu" distill_MTT.py "${flags[@]}" "$@"
