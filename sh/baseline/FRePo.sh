#!/usr/bin/env bash
# FRePo: neural feature regression on pixels, with learned labels.
# Usage: bash sh/baseline/FRePo.sh GPU DATASET LR IPC [any flag of distill_FRePo.py]
# LR is the learning rate of the pixels, with Adam: for example 1e-2.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
positionals 4 "$@"
gpu=$1 dataset=$2 lr=$3 ipc=$4
shift 4

flags=(
  --dataset "$dataset"
  --ipc "$ipc"              # synthetic videos per class
  --lr_img "$lr"            # learning rate of the pixels
  --Iteration 10000
  --eval_it 500             # iterations between evaluations
  --batch_target 512        # real clips to predict per step
  --num_pool 10             # number of networks in the pool
  --pool_steps 100          # steps on the set after which a network is replaced
  --lr_pool 1e-4            # learning rate of the networks in the pool
  --learn_label             # learn the labels
  --lr_label 1e-3           # learning rate of the labels
  --init real
  --num_eval 3              # networks per evaluation
  --epoch_eval_train 500
)
launch "$gpu" distill_FRePo.py "${flags[@]}" "$@"
