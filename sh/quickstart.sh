#!/usr/bin/env bash
# All methods on a generated toy set, on a CPU, without a download: one real video per class; pixels learned by DM;
# still frames alone; still frames moved by a dynamic memory, learned by MTT. Each runs for three random selections of
# real videos. Pixels are stored at 8 bits, still frames and dynamic memories at 4. A table follows at the end.
# Usage: bash sh/quickstart.sh [GPU] [any flag that all scripts have, such as --precision fp32]
# Time: 5.5 minutes on two cores of an AMD EPYC (Zen 3: AVX2, no AVX-512), after two minutes of installation; the
# printed seconds refer to this machine.
# The same command resumes where it stopped; finished runs are not repeated.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
gpu=${1:-cpu}
if (($#)); then shift; fi
refuse --save_path 'its runs are in results/quickstart' "$@"
refuse --seed 'it runs seeds 0, 1 and 2' "$@"
install
export WANDB_MODE=${WANDB_MODE:-disabled}
results=$root/results/quickstart
seeds=(0 1 2)               # of the selection of real videos and of everything else that is random

# These settings were chosen on validation clips: bash sh/quickstart.sh cpu --validation 0.25.
all=(--save_path "$results" --size 48 --width 32)
evaluation=(
  --num_eval 3              # networks per evaluation
  --epoch_eval_train 90
)
at_end=(--eval_it 100000)   # evaluate at the end only
compact=(                   # half the bits, and a dynamic memory of a quarter of the pixels: as accurate
  --storage uint4
  --dynamic_size 24
)

chapter() {
  printf '\n[%s/5] %s (about %s on two cores)\n' "$@"
}

# each LAUNCHER ARGUMENT …: run it for all seeds in parallel, each with a share of the cores; only the first one shows
# progress.
cores=$(python -c 'from distill_utils.machine import cores; print(cores())')   # less than the machine's in a container
threads=$((cores > ${#seeds[@]} ? cores / ${#seeds[@]} : 1))
each() {
  local seed job jobs=() launcher=$1; shift
  for seed in "${seeds[@]}"; do
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads} TQDM_DISABLE=${jobs:+1}${TQDM_DISABLE:-} \
      bash "$root/sh/$launcher" "$gpu" toy "$@" "${all[@]}" "${evaluation[@]}" --seed "$seed" ${extra[@]+"${extra[@]}"} &
    jobs+=($!)
  done
  for job in "${jobs[@]}"; do wait "$job"; done
}
set -m                      # give each job a process group, so that all end when this script does
trap 'for job in $(jobs -p); do kill -- "-$job" || true; done 2>/dev/null' EXIT
extra=("$@")                # below, ${extra[@]+…} is for bash before 4.4, which calls an empty array unbound
module distill_utils.toy

chapter 1 'random selection: one real video per class' '45 s'
each baseline/coreset.sh random 1
chapter 2 'DM: pixels learned by distribution matching' '65 s'
each baseline/DM.sh 1000 1 --init mean --batch_real 24 --Iteration 25 --storage uint8 "${at_end[@]}"
chapter 3 'static memory: still frames learned by gradient matching' '75 s'
each s2d/DC.sh 1 --init mean --lr_img 0.02 --batch_real 24 --Iteration 5 --storage uint4 "${at_end[@]}"
chapter 4 'experts: networks trained on the real clips, a snapshot per epoch' '55 s'
bash "$root/sh/baseline/buffer.sh" "$gpu" toy "${all[@]}" --num_experts 2 --train_epochs 18 --batch_train 16 \
  --test_clips 1 ${extra[@]+"${extra[@]}"}
chapter 5 'static-dynamic MTT: the still frames, moved by a dynamic memory that trajectory matching learns' '80 s'
each s2d/MTT.sh 150 1 --spc 1 --dpc 2 "${compact[@]}" --init_dynamic motion --init_hal identity --lr_hal 0 \
  --syn_steps 5 --no-train_lr --Iteration 12 "${at_end[@]}" --expert_epochs 5 --min_start_epoch 6 --max_start_epoch 13

printf '\nTop-1 accuracy on the test videos, mean and standard deviation over %s selections:\n' ${#seeds[@]}
module distill_utils.table --over_seeds "$results"
printf 'A moving picture with a row per class; the last column shows real videos:\n'
newest() { ls -td "$results"/toy/"$1"_* | head -n 1; }
module distill_utils.export "$(newest s2d_MTT)" --format gif --memories --beside "$(newest coreset_random)" --scale 2
