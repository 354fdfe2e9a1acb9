#!/usr/bin/env bash
# Installs what is needed and passes the tests; runs on a bare machine with Python 3.10 or later.
# Usage: bash sh/test.sh [--quick] [any argument of pytest]
# --quick leaves out the tests that are marked slow: those that start several processes or train for long.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
arguments=(-q)
for argument in "$@"; do
  if [[ $argument == --quick ]]; then arguments+=(-m "not slow"); else arguments+=("$argument"); fi
done
install pytest
cd "$root"
WANDB_MODE=disabled exec "$(find_python)" -m pytest "${arguments[@]}" tests
