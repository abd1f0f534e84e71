#!/usr/bin/env bash
# BraTS as in the paper: both phases, three ablations, and a table of Dice and HD95 of the whole tumour, raw and
# post-processed, that includes k-means on the intensities and on the features.
#
#   examples/brats_table3.sh BRATS OUTPUT
#
# BRATS is the unpacked training set of any edition (2017 to 2021, 2023, or MSD Task01); for 2017 to 2019, the HGG cases
# are used. GPUs are recommended: LAUNCH="accelerate launch --num_processes 8 -m". The variables DATA_OPTIONS (such as
# "--modality t2"), DIFFUSION_OPTIONS and DISCOVERY_OPTIONS set further options. Run the same command again to resume.
set -euo pipefail
brats=$1 output=$2
launch=${LAUNCH:-python -m}
read -ra data <<< "${DATA_OPTIONS:-}"
read -ra diffusion <<< "${DIFFUSION_OPTIONS:-}"
read -ra discovery <<< "${DISCOVERY_OPTIONS:-}"

$launch diffdiscover3d.train diffusion --preset brats --dataset "$brats" --output-dir "$output/diffusion" \
    --resume latest "${data[@]}" "${diffusion[@]}"

discover() {
    $launch diffdiscover3d.train discovery --preset brats --dataset "$brats" --teacher "$output/diffusion" \
        --output-dir "$output/$1" --resume latest "${data[@]}" "${discovery[@]}" "${@:2}"
}
discover ours
discover no-invariance --lambda-invariance 0
discover no-features --lambda-feature 0
discover no-visual --lambda-visual 0

diffdiscover3d evaluate-brats "$brats" --output "$output/table3.json" --overwrite "${data[@]}" \
    --teacher "$output/diffusion" \
    --model ours="$output/ours" \
    --model "no invariance=$output/no-invariance" \
    --model "no features=$output/no-features" \
    --model "no visual=$output/no-visual"
