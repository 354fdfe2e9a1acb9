#!/usr/bin/env bash
# Install all requirements and run the tests, on a bare machine with Python 3.10 or later.
# Usage: bash sh/test.sh [--quick] [any argument of pytest]
# --quick skips tests marked slow: those that start several processes or train for long.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
arguments=(-q)
for argument in "$@"; do
  if [[ $argument == --quick ]]; then arguments+=(-m "not slow"); else arguments+=("$argument"); fi
done
install pytest pytest-xdist
cd "$root"
# With pytest-xdist, up to four processes of one thread each share the test files.
if "$(find_python)" -c 'import xdist' 2>/dev/null; then
  cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
  arguments=(-n $((cores < 4 ? cores : 4)) --dist loadfile "${arguments[@]}")
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
fi
WANDB_MODE=disabled exec "$(find_python)" -m pytest "${arguments[@]}" tests
