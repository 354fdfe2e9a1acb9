#!/usr/bin/env bash
# Evaluate a finished run's set with other networks than the one used for distillation. Finished networks are not
# repeated.
# Usage: bash sh/study/cross_arch.sh GPU RUN [any flag of distill_utils/evaluate.py]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
positionals 2 "$@"
gpu=$1 run=$2
shift 2

flags=(
  --networks ConvNet3D,CNN+mean,CNN+RNN,CNN+GRU,CNN+LSTM,r3d_18,mc3_18,r2plus1d_18
)
launch "$gpu" distill_utils.evaluate "$run" "${flags[@]}" "$@"
