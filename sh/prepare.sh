#!/usr/bin/env bash
# Decode raw videos into frame folders and write lists, with the splits of the official lists. Resumes where it stopped.
# Usage: bash sh/prepare.sh DATASET VIDEOS [any flag of distill_utils/prepare.py]
# UCF101: VIDEOS is UCF-101/, --lists ucfTrainTestlist/
# HMDB51: VIDEOS is the folder of the unpacked classes, --lists testTrainMulti_7030_splits/
# Kinetics400: VIDEOS is the folder with train/, val/ and replacement/, --lists the folder of train.csv
# SSv2: VIDEOS is the folder of .webm files, --lists the folder of the labels' json files
# custom: VIDEOS has a folder per class, or train/, val/ and test/ with a folder per class in each.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
positionals 2 "$@"
dataset=$1 videos=$2
shift 2
install

flags=(
  --videos "$videos"
  --quality 95              # JPEG quality
)
become -m distill_utils.prepare "$dataset" "${flags[@]}" "$@"
