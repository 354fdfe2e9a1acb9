#!/usr/bin/env bash
# Stage 2 of static-dynamic disentanglement with FRePo: learn the dynamic memory and the hallucinator.
# Run sh/s2d/DC.sh with SPC = IPC first: it makes the static memory.
# Usage: bash sh/s2d/FRePo.sh GPU DATASET LR IPC [any flag of distill_s2d.py]
# LR is the learning rate of the dynamic memory, with Adam; the authors' launcher has 1e2.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
positionals 4 "$@"
gpu=$1 dataset=$2 lr=$3 ipc=$4
shift 4

flags=(
  --method FRePo
  --dataset "$dataset"
  --ipc "$ipc"              # synthetic videos per class
  --spc "$ipc"              # one static memory per video
  --dpc "$ipc"              # one dynamic memory per video
  --lr_dynamic "$lr"
  --lr_hal 1e-3             # learning rate of the hallucinator
  --Iteration 10000
  --eval_it 200             # iterations between evaluations
  --batch_target 512        # real clips to predict per step
  --num_pool 10             # number of networks in the pool
  --pool_steps 100          # steps on the set after which a network is replaced
  --lr_pool 1e-4            # learning rate of the networks in the pool
  --learn_label             # learn the labels
  --lr_label 1e-3           # learning rate of the labels
  --num_eval 3              # networks per evaluation
  --epoch_eval_train 500
)
launch "$gpu" distill_s2d.py "${flags[@]}" "$@"
