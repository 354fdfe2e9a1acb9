#!/usr/bin/env bash
# Evaluate the full training set: an upper bound for the accuracy of distilled sets.
# Usage: bash sh/baseline/full.sh GPU DATASET [any flag of distill_utils/evaluate.py]
# An independent log reports 56.2 % for miniUCF101.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
positionals 2 "$@"
gpu=$1 dataset=$2
shift 2

flags=(
  --dataset "$dataset"
  --num_eval 3              # number of networks
  --epoch_eval_train 60
  --batch_train 32
)
launch "$gpu" distill_utils.evaluate "${flags[@]}" "$@"
