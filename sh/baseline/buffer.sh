#!/usr/bin/env bash
# Experts for trajectory matching: networks trained on the real clips, with a snapshot per epoch.
# sh/baseline/MTT.sh and sh/s2d/MTT.sh find them.
# Usage: bash sh/baseline/buffer.sh GPU DATASET [any flag of buffer.py]
# A snapshot takes 14.6 MB, all together 4.8 GB. The paper trains 50 epochs, but its matching reads only the first 10.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
positionals 2 "$@"
gpu=$1 dataset=$2
shift 2

flags=(
  --dataset "$dataset"
  --num_experts 30
  --train_epochs 10         # max_start_epoch + expert_epochs - 1 of the matching; later epochs are never read
  --lr_teacher 0.01
  --batch_train 256         # lower it for a set of fewer clips, which gives only one step per epoch
  --buffer_dtype float32    # bfloat16 halves the size on disk
)
launch "$gpu" buffer.py "${flags[@]}" "$@"
