#!/usr/bin/env bash
# Installs what is needed and passes the tests; runs on a bare machine with Python 3.10 or later.
# Usage: bash sh/test.sh [any argument of pytest]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
install pytest
cd "$root"
WANDB_MODE=disabled exec "$(find_python)" -m pytest -q "$@" tests
