#!/usr/bin/env bash
# Stage 1 of static-dynamic disentanglement: learn the static memory, SPC still frames per class, by gradient matching.
# Usage: bash sh/s2d/DC.sh GPU DATASET SPC [any flag of distill_DC.py]
# Stage 2 at IPC N needs SPC = 2N. The evaluation of this stage shows the accuracy of still frames alone.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
positionals 3 "$@"
gpu=$1 dataset=$2 spc=$3
shift 3

flags=(
  --dataset "$dataset"
  --spc "$spc"              # frames per class; outer and inner loops follow the paper's table
  --lr_img 0.1
  --Iteration 3000
  --eval_it 1000            # iterations between evaluations
  --batch_real 256          # real frames per class and iteration
  --init real
  --num_eval 3              # networks per evaluation
  --epoch_eval_train 500
)
launch "$gpu" distill_DC.py "${flags[@]}" "$@"
