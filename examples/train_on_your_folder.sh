#!/usr/bin/env bash
# Both training phases on a folder of .nii/.nii.gz scans, followed by the segmentation of all scans.
#
#   examples/train_on_your_folder.sh SCANS OUTPUT [options of both phases, such as --max-steps 200]
#
# With several GPUs: LAUNCH="accelerate launch --num_processes 8 -m" examples/train_on_your_folder.sh ... --batch-size 8
set -euo pipefail
scans=$1 output=$2
shift 2
launch=${LAUNCH:-python -m}

$launch diffdiscover3d.train diffusion --preset small --dataset "$scans" --output-dir "$output/diffusion" \
    --resume latest "$@"
$launch diffdiscover3d.train discovery --preset small --dataset "$scans" --output-dir "$output/discovery" \
    --teacher "$output/diffusion" --num-parts 4 --stages 2 --resume latest "$@"
diffdiscover3d segment "$scans" --model "$output/discovery" --output "$output/parts" --preview
