#!/usr/bin/env bash
# Stage 2 of static-dynamic disentanglement with FRePo: it needs the static memory of sh/s2d/DC.sh with SPC = IPC.
# Usage: bash sh/s2d/FRePo.sh GPU DATASET LR IPC [any flag of distill_s2d.py]
# LR is that of the dynamic memory, for Adam; the authors' launcher has 1e2.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
positionals 4 "$@"
gpu=$1 dataset=$2 lr=$3 ipc=$4
shift 4

flags=(
  --method FRePo
  --dataset "$dataset"
  --ipc "$ipc"              # synthetic videos per class
  --spc "$ipc"              # one static memory
  --dpc "$ipc"              # and one dynamic memory a video
  --lr_dynamic "$lr"
  --lr_hal 1e-3             # of the hallucinator
  --Iteration 10000
  --eval_it 200             # iterations between evaluations
  --batch_target 512        # real clips that a step predicts
  --num_pool 10             # networks of the pool,
  --pool_steps 100          # each made anew after so many steps on the set,
  --lr_pool 1e-4            # at this learning rate
  --learn_label             # learn the labels,
  --lr_label 1e-3           # at this learning rate
  --num_eval 3              # networks of an evaluation
  --epoch_eval_train 500
)
launch "$gpu" distill_s2d.py "${flags[@]}" "$@"
