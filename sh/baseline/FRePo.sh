#!/usr/bin/env bash
# FRePo: neural feature regression on pixels, with learned labels.
# Usage: bash sh/baseline/FRePo.sh GPU DATASET LR IPC [any flag of distill_FRePo.py]
# LR is that of the pixels, for Adam: 1e-2, say.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
positionals 4 "$@"
gpu=$1 dataset=$2 lr=$3 ipc=$4
shift 4

flags=(
  --dataset "$dataset"
  --ipc "$ipc"              # synthetic videos per class
  --lr_img "$lr"            # of the pixels
  --Iteration 10000
  --eval_it 500             # iterations between evaluations
  --batch_target 512        # real clips that a step predicts
  --num_pool 10             # networks of the pool,
  --pool_steps 100          # each made anew after so many steps on the set,
  --lr_pool 1e-4            # at this learning rate
  --learn_label             # learn the labels,
  --lr_label 1e-3           # at this learning rate
  --init real
  --num_eval 3              # networks of an evaluation
  --epoch_eval_train 500
)
launch "$gpu" distill_FRePo.py "${flags[@]}" "$@"
