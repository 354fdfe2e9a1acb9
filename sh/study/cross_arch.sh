#!/usr/bin/env bash
# A finished run's set evaluated by other networks than the one it was distilled with; finished networks are not computed again.
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
