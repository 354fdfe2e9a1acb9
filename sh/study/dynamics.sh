#!/usr/bin/env bash
# Static and dynamic classes: train networks on the full set, with full clips and with one repeated frame. Print the
# dynamics score of each class, and the accuracy of every run on both kinds of classes.
# Usage: bash sh/study/dynamics.sh GPU DATASET [any flag of distill_utils/evaluate.py]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
positionals 2 "$@"
gpu=$1 dataset=$2
shift 2

save_path=$root/results
for ((i = 1; i <= $#; i++)); do
  case ${!i} in
    --save_path) j=$((i + 1)); save_path=${!j} ;;
    --save_path=*) save_path=${!i#*=} ;;
  esac
done
bash "$root/sh/baseline/full.sh" "$gpu" "$dataset" "$@"
bash "$root/sh/baseline/full.sh" "$gpu" "$dataset" "$@" --n_real 1
module distill_utils.dynamics "$save_path"
