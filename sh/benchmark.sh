#!/usr/bin/env bash
# Benchmark of the main operations on this machine: preparing and loading, iterations of DM, MTT and FRePo, evaluation and
# expert epoch, each compared with the machine's own rates, and with --plain also with the operation as it is usually
# written. Prints a table and writes a json file.
# Usage: bash sh/benchmark.sh [GPU] [any flag of sh/benchmark/__main__.py]
# GPU is a number, mps, xpu or cpu. Default: the first GPU, or the CPU if there is none.
# Time: some minutes on two cores at the toy set's sizes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
gpu=cpu
if [[ -n ${CUDA_VISIBLE_DEVICES-all} && $(nvidia-smi -L 2>/dev/null || true) == GPU* ]]; then gpu=0; fi
if (($#)) && [[ $1 != --* ]]; then gpu=$1; shift; fi
install
export TQDM_DISABLE=1       # no progress bars

flags=(
  --repeats 5
)
launch "$gpu" sh/benchmark "${flags[@]}" "$@"
