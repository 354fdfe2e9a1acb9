#!/usr/bin/env bash
# Raw videos to frame folders and lists, with the official lists' splits; goes on where it stopped.
# Usage: bash sh/prepare.sh DATASET VIDEOS [any flag of distill_utils/prepare.py]
# UCF101: VIDEOS is UCF-101/, --lists ucfTrainTestlist/; HMDB51: the unpacked classes, --lists testTrainMulti_7030_splits/; Kinetics400: the folder
# with train/, val/ and replacement/, --lists that of train.csv; SSv2: the folder of .webm files, --lists that of the labels' json files;
# custom: a folder per class, or train/, val/ and test/ with a folder per class in each.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
positionals 2 "$@"
dataset=$1 videos=$2
shift 2
install

flags=(
  --videos "$videos"
  --quality 95              # of the JPEGs
)
module distill_utils.prepare "$dataset" "${flags[@]}" "$@"
