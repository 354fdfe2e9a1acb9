#!/usr/bin/env bash
# The full training set: the accuracy that no distilled set is expected to reach.
# Usage: bash sh/baseline/full.sh GPU DATASET [any flag of distill_utils/evaluate.py]
# An independent log for miniUCF101 gives 56.2 %.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
positionals 2 "$@"
gpu=$1 dataset=$2
shift 2

flags=(
  --dataset "$dataset"
  --num_eval 3              # networks
  --epoch_eval_train 60
  --batch_train 32
)
launch "$gpu" distill_utils.evaluate "${flags[@]}" "$@"
