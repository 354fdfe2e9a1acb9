#!/usr/bin/env bash
# Search over a method's flags on validation videos, with Optuna. Resumes where it stopped, and prints the best command.
# The test set is not read.
# Usage: bash sh/study/tune.sh GPU DATASET METHOD [--trials N] [--search FLAG=RANGE] [any flag of the method's script]
# METHOD is coreset, DM, MTT, FRePo, DC, s2d-DM, s2d-MTT, s2d-FRePo or compact; distill_utils/search_space.py lists the
# searched flags of each. A flag that is given is not searched. Example:
#   bash sh/study/tune.sh 0 miniUCF101 compact --width 32 --ipc 5 --search dynamic_frames=4,8,16
# The same command on several GPUs, or on machines that share the folder, shares the trials. Studies and runs go to
# results/tune, or to --save_path.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
positionals 3 "$@"

become -m distill_utils.tune "$@"
