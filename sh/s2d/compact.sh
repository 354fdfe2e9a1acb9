#!/usr/bin/env bash
# The most accurate set per byte on ROOM6 (docs/results.md): each video is a small still frame and the grey motion of a
# real clip, stored at 4 bits; DM learns both. No static memory of sh/s2d/DC.sh is needed.
# Usage: bash sh/s2d/compact.sh GPU DATASET LR IPC [any flag of distill_s2d.py]
# LR is the learning rate of both: about 1 per video up to IPC 8, 15 for IPC 21; with --width 32 four times as much.
# Measured on ROOM6 (six classes) with LR 7.5, IPC 8, --mirror 0 --pool 100: 69.2 % in 19,932 bytes; without learning
# (--Iteration 0) 60.4 %. On one thread of a CPU a pool of 100 networks took seven minutes, learning three, and the
# evaluation of a network two.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
positionals 4 "$@"
gpu=$1 dataset=$2 lr=$3 ipc=$4
shift 4

case $dataset in UCF101|miniUCF101|HMDB51) side=14 ;; *) side=8 ;; esac  # an eighth of the default clips' side
flags=(
  --method DM
  --dataset "$dataset"
  --ipc "$ipc"              # synthetic videos per class
  --storage uint4           # half the bytes of uint8: twice the videos
  --static real             # the mean frame of a real clip,
  --static_size $side       # busier videos need more pixels
  --train_static
  --lr_static "$lr"
  --init_dynamic residual   # moved by the clip's own grey residual,
  --dynamic_size $side
  --lr_dynamic "$lr"
  --init_hal identity       # which is added to it
  --lr_hal 0
  --Iteration 200           # 100 are enough for IPC 21
  --eval_it 100             # iterations between evaluations
  --pool 150                # networks that DM draws from, made once
  --num_eval 3              # networks per evaluation
  --batch_train 16
  --epoch_eval_train 83     # 250 steps of 16 videos with six classes and IPC 8; fewer classes need more epochs
)
launch "$gpu" distill_s2d.py "${flags[@]}" "$@"
