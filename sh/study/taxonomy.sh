#!/usr/bin/env bash
# The paper's study of temporal compression: learned frames, matched frames, segments, interpolations. Writes one csv of
# accuracy, time, memory and bytes.
# Usage: bash sh/study/taxonomy.sh GPU DATASET IPC [any flag of distill_DM.py]
# METHOD=MTT studies trajectory matching instead, with the experts in results/. Its cells with fewer real frames or with
# segments need experts trained the same way (sh/baseline/buffer.sh … --n_real 4); the error message says so.
# Finished cells are not repeated; failed cells are listed at the end. The runs and taxonomy.csv go to
# results/taxonomy-<method>-ipc<IPC>, or to RESULTS.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
positionals 3 "$@"
gpu=$1 dataset=$2 ipc=$3
shift 3
refuse --save_path 'give RESULTS=DIR before the command' "$@"

method=${METHOD:-DM}                          # or MTT
case $method in
  DM) lr=30 ;;
  MTT) lr=1e5 ;;
  *) stop "METHOD must be DM or MTT, not '$method'" ;;
esac
case $dataset in
  UCF101|miniUCF101|HMDB51) T=${T:-16} ;;     # frames per clip; set T=… if --frames changes it
  *) T=${T:-8} ;;
esac
results=${RESULTS:-$root/results/taxonomy-$method-ipc$ipc}

cells=("--n_syn $T" "--n_syn $T --interpolation parametric")
for ((n = 1; n < T; n *= 2)); do
  for interpolation in duplicate linear parametric; do
    # Linear interpolation of one frame equals duplicate.
    if ((n > 1)) || [[ $interpolation != linear ]]; then cells+=("--n_syn $n --interpolation $interpolation"); fi
  done
  cells+=("--n_real $n")
done
for ((segments = 2; segments < T; segments *= 2)); do
  if ((T % segments == 0)); then cells+=("--segments $segments"); fi
done

failed=()
for cell in "${cells[@]}"; do
  printf '\n== %s %s\n' "$method" "$cell"
  read -ra flags <<< "$cell"
  bash "$root/sh/baseline/$method.sh" "$gpu" "$dataset" "$lr" "$ipc" "$@" --save_path "$results" "${flags[@]}" || {
    code=$?                                   # Ctrl-C or a TERM signal ends the grid, not the cell
    if ((code == 130 || code == 143)); then exit "$code"; fi
    failed+=("$cell")
  }
done
for cell in ${failed[@]+"${failed[@]}"}; do echo "failed: $method $cell" >&2; done
module distill_utils.table "$results" --csv "$results/taxonomy.csv"
exit $((${#failed[@]} > 0))
