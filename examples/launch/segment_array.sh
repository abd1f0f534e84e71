#!/usr/bin/env bash
# Segmentation of many scans as a Slurm array; the arguments of the script are those of `diffdiscover3d segment`:
#
#   sbatch --array=1-8 examples/launch/segment_array.sh /shared/scans -o /shared/parts --level all
#
# Each task works on its share of the scans. All tasks write one manifest and one table of parts into the output folder.
# Submitted again, the array does what is missing. The tests run this file without Slurm.
#SBATCH --job-name=diffdiscover3d-segment
#SBATCH --array=1-8
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --time=08:00:00
set -euo pipefail
: "${SLURM_ARRAY_TASK_ID:?submit this script with sbatch --array=1-N}"
first=${SLURM_ARRAY_TASK_MIN:-1}
count=$((${SLURM_ARRAY_TASK_MAX:-8} - first + 1))
if [ "${SLURM_ARRAY_TASK_COUNT:-$count}" -ne "$count" ]; then
    echo "the array must be a range without gaps, as --array=1-$count: its size decides the shares" >&2
    exit 2
fi
exec diffdiscover3d segment "$@" --share "$((SLURM_ARRAY_TASK_ID - first + 1))/$count" --summary --resume
