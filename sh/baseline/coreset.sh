#!/usr/bin/env bash
# Reference selections of real clips: random, or herding or k-center on embeddings of a network trained on the full set.
# Usage: bash sh/baseline/coreset.sh GPU DATASET METHOD IPC [any flag of distill_utils/coreset.py]
# A later paper reports for herding on miniUCF101: 13.2 % (IPC 1), 26.3 % (IPC 5).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
positionals 4 "$@"
gpu=$1 dataset=$2 method=$3 ipc=$4
shift 4

flags=(
  --dataset "$dataset"
  --method "$method"        # random, herding or k-center
  --ipc "$ipc"              # clips per class
  --feature_epochs 60       # training epochs of the network that gives the embeddings
  --feature_batch 32
  --num_eval 3              # networks per evaluation
  --epoch_eval_train 500
)
launch "$gpu" distill_utils.coreset "${flags[@]}" "$@"
