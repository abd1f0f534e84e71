#!/usr/bin/env bash
# Table 3 of the paper on a BraTS folder: a diffusion model and four discovery networks (ours and three ablations) trained on
# its training cases, brain-flair, and the baselines, scored by Dice and HD95 of the whole tumour, plain and post-processed.
#
#   examples/brats_table3.sh BRATS OUTPUT [options of `diffdiscover3d benchmark`]
#
# BRATS is the unpacked training set of any edition (2017 to 2021, 2023, or MSD Task01); of 2019 the HGG cases are used. The
# trainings need GPUs: --launcher "accelerate launch --num_processes 8 -m". Interrupted, the same line continues.
set -euo pipefail
diffdiscover3d benchmark "$1" --table 3 --output "$2" "${@:3}"
