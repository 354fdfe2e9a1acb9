#!/usr/bin/env bash
# The frontier, accuracy against stored bytes: real clips, pixels, still frames, and still frames moved by a dynamic
# memory, each at several byte budgets.
# Usage: bash sh/study/frontier.sh GPU DATASET [any flag that all scripts have, such as --width 32]
# The same command resumes where it stopped; finished runs are not repeated. At the end it prints a table over seeds, and
# writes frontier.csv and the page report/index.html, in results/frontier or in RESULTS. SETTINGS=FILE is a bash file
# that sets some of the arrays below to other values, such as those found by sh/study/tune.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
positionals 2 "$@"
gpu=$1 dataset=$2
shift 2
refuse --save_path 'give RESULTS=DIR before the command' "$@"
refuse --seed 'give SETTINGS=FILE before the command, a file with a line such as seeds=(3 4)' "$@"

results=${RESULTS:-$root/results/frontier}
budgets=(20000 50000 150000 500000 1500000 5000000)  # bytes; for about ten classes, clips of 8 frames of 64 pixels
beyond=(8000000)                              # random selection only: in the table, the largest sets then lie between
                                              # two random runs
seeds=(0 1 2)                                 # of everything random, except the experts and the pool of DM
evaluation=(
  --num_eval 3                # networks per evaluation
  --epoch_eval_train 500
)
last=(--eval_it 1000000)      # evaluate at the end only
selection=(                   # the network whose embeddings herding and k-center compare
  --feature_epochs 60
  --feature_batch 32
)
full=(                        # training on the full set
  --num_eval 3
  --epoch_eval_train 60
  --batch_train 32
)
experts=(
  --num_experts 10
  --train_epochs 40           # matching needs at least max_start_epoch + expert_epochs - 1
  --batch_train 64            # on a small set: gives at least a few steps per epoch
)
trajectories=(                # for both kinds of MTT
  --syn_steps 5
  --expert_epochs 2
  --min_start_epoch 5         # experts must know more than the synthetic set can teach
  --max_start_epoch 35
)
pixels=(
  --storage uint8
  --init real
)
few_frames=(                  # pixels with a quarter of the bytes or less
  --n_syn 2
  --interpolation linear
)
pixels_DM=(--lr_img 30 --batch_real 64 --Iteration 2000)
pixels_MTT=(--lr_img 1e4 --Iteration 500)
pixels_FRePo=(--lr_img 0.03 --num_pool 5 --lr_pool 1e-3 --Iteration 500)
stills=(
  --storage uint8
  --init real
  --lr_img 0.1
  --outer_loop 1              # the paper gives loops only for some numbers of frames
  --inner_loop 1
  --batch_real 64
  --Iteration 500
)
compact=(
  --storage uint4             # half the bytes of uint8: twice the videos (docs/trials.md)
  --static real               # the mean frame of a real clip,
  --init_dynamic residual     # moved by the clip's own grey residual,
  --init_hal identity         # which is added to it
  --train_static
)
compact_DM=(                  # rates for 21 videos per class; for 8 half of them; with --width 32 four times as much:
  --lr_dynamic 15             # the gradient of a video shrinks with their number, and grows with the width
  --lr_static 15
  --lr_hal 0
  --batch_real 64
  --pool 150
  --Iteration 200
)
compact_MTT=(--lr_dynamic 1 --lr_static 1 --lr_hal 0 --Iteration 500)  # larger rates lost accuracy on ROOM6
compact_FRePo=(--lr_dynamic 0.003 --lr_static 0.003 --lr_hal 0 --num_pool 5 --lr_pool 1e-3 --Iteration 500)
if [[ -n ${SETTINGS:-} ]]; then
  [[ -r $SETTINGS ]] || stop "SETTINGS=$SETTINGS cannot be read"
  [[ $SETTINGS == */* ]] || SETTINGS=./$SETTINGS   # source searches PATH for a name alone
  source "$SETTINGS"
fi

left_out=() failed=()
# run NAME LAUNCHER ARGUMENT …: run a launcher. Ctrl-C or a TERM signal to the run ends the script. Refused and failed
# runs are listed at the end.
run() {
  local name=$1 launcher=$2 code=0; shift 2
  printf '\n== %s\n' "$name"
  bash "$root/sh/$launcher" "$gpu" "$dataset" "$@" --save_path "$results" || code=$?
  case $code in
    0) ;;
    130|143) exit "$code" ;;
    2) left_out+=("$name") ;;                 # with a budget: usually that is too small
    *) failed+=("$name") ;;
  esac
}

run 'full data' baseline/full.sh "${full[@]}" "$@"
run experts baseline/buffer.sh "${experts[@]}" "$@"
failed=(${left_out[@]+"${left_out[@]}"} ${failed[@]+"${failed[@]}"}) left_out=()   # these two have no budget
for bytes in "${budgets[@]}"; do
  for seed in "${seeds[@]}"; do
    at="at $bytes bytes, seed $seed"
    all=(--bytes "$bytes" --seed "$seed" "${evaluation[@]}" "$@")
    for method in random herding k-center; do
      run "$method $at" baseline/coreset.sh "$method" 1 "${selection[@]}" "${all[@]}"
    done
    run "DM on pixels $at" baseline/DM.sh 30 1 "${pixels[@]}" "${pixels_DM[@]}" "${last[@]}" "${all[@]}"
    run "DM on few frames $at" baseline/DM.sh 30 1 \
      "${pixels[@]}" "${few_frames[@]}" "${pixels_DM[@]}" "${last[@]}" "${all[@]}"
    run "MTT on pixels $at" baseline/MTT.sh 1e4 1 \
      "${pixels[@]}" "${trajectories[@]}" "${pixels_MTT[@]}" "${last[@]}" "${all[@]}"
    run "MTT on few frames $at" baseline/MTT.sh 1e4 1 \
      "${pixels[@]}" "${few_frames[@]}" "${trajectories[@]}" "${pixels_MTT[@]}" "${last[@]}" "${all[@]}"
    run "FRePo on pixels $at" baseline/FRePo.sh 0.03 1 "${pixels[@]}" "${pixels_FRePo[@]}" "${last[@]}" "${all[@]}"
    run "static memory alone $at" s2d/DC.sh 2 "${stills[@]}" "${last[@]}" "${all[@]}"
    run "static-dynamic of real clips $at" s2d/DM.sh 10 1 "${compact[@]}" --Iteration 0 "${all[@]}"
    run "static-dynamic DM $at" s2d/DM.sh 10 1 "${compact[@]}" "${compact_DM[@]}" "${last[@]}" "${all[@]}"
    run "static-dynamic MTT $at" s2d/MTT.sh 1000 1 \
      "${compact[@]}" "${trajectories[@]}" "${compact_MTT[@]}" "${last[@]}" "${all[@]}"
    run "static-dynamic FRePo $at" s2d/FRePo.sh 0.003 1 \
      "${compact[@]}" "${compact_FRePo[@]}" "${last[@]}" "${all[@]}"
  done
done
for bytes in ${beyond[@]+"${beyond[@]}"}; do
  for seed in "${seeds[@]}"; do
    run "random at $bytes bytes, seed $seed" baseline/coreset.sh random 1 \
      "${selection[@]}" --bytes "$bytes" --seed "$seed" "${evaluation[@]}" "$@"
  done
done

printf '\n'
for name in ${left_out[@]+"${left_out[@]}"}; do echo "left out (see the error above): $name" >&2; done
for name in ${failed[@]+"${failed[@]}"}; do echo "failed: $name" >&2; done
module distill_utils.table --over_seeds "$results" --csv "$results/frontier.csv"
module distill_utils.report "$results" --out "$results/report"
exit $((${#failed[@]} > 0))
